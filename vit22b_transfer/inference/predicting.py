"""Batches to lines of predictions: for a split, or a part of it while training."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from vit22b_transfer.inference import prediction_lines
from vit22b_transfer.partitioning.rules import Partitioning

# Batches handed to the devices before the first one's predictions are fetched.
_BATCHES_AHEAD = 2

Predict = Callable[[Any, Any, np.uint32, np.uint32], tuple[Any, Any]]


def make_predict(model: Any, partitioning: Partitioning) -> Predict:
    """The jitted (params, batch, seed, number of the batch) -> (predictions, aux).

    Both are trees of arrays with a row for each example.
    """

    def predict(params, batch, seed, number):
        rng = jax.random.fold_in(jax.random.key(seed), number)
        return model.predict_batch_with_aux(params, batch, rng=rng)

    # Replicated: each host then finds its own rows without a mesh's geometry.
    return jax.jit(predict, out_shardings=partitioning.replicated)


def predicted_lines(
    rows: Iterable[Any],
    model: Any,
    predict: Predict,
    params: Any,
    *,
    batch_size: int,
    first_batch: int = 0,
    seed: int = 0,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of examples up to the batch's end, this host's lines) of each batch.

    rows: items of `data.batches.eval_batches` from batch `first_batch` on.
    seed: of `decoding.sample`; every batch draws by it and its number.

    Raises:
      NotFiniteError: naming an example whose score is not finite.
    """
    in_flight = collections.deque()

    def fetched():
        start, examples, first, outputs = in_flight.popleft()
        outputs = jax.device_get(outputs)
        lines = prediction_lines.of_batch(
            examples, first, first - start, outputs, model
        )
        return start + batch_size, list(lines)

    for number, batch in enumerate(rows, first_batch):
        outputs = predict(params, batch.features, np.uint32(seed), np.uint32(number))
        start = number * batch_size
        in_flight.append((start, batch.examples, batch.start_index, outputs))
        if len(in_flight) > _BATCHES_AHEAD:
            yield fetched()
    while in_flight:
        yield fetched()
