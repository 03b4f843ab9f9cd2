"""Batches to lines of predictions: for a split, or a part of it while training."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vit22b_transfer.inference import prediction_lines
from vit22b_transfer.partitioning.rules import Partitioning

# Batches handed to the devices before the first one's predictions are fetched.
_BATCHES_AHEAD = 2

Predict = Callable[[Any, Any, np.uint32, np.uint32], tuple[Any, Any]]


@runtime_checkable
class SharedPredict(Protocol):
    """Predictions of batches whose images repeat: `shared_images.SharedImages`."""

    def pays(self, batch: Any) -> bool:
        """Whether enough of them do."""
        ...

    def __call__(
        self, params: Any, batch: Any, seed: np.uint32, number: np.uint32
    ) -> tuple[Any, Any]:
        """As `Predict`, of a whole `data.batches.EvalBatch`."""
        ...


def make_predict(model: Any, partitioning: Partitioning) -> Predict:
    """The jitted (params, batch, seed, number of the batch) -> (predictions, aux).

    Both are trees of arrays with a row for each example.
    """

    def predict(params, batch, seed, number):
        return model.predict_batch_with_aux(
            params, batch, rng=example_keys(seed, number, batch)
        )

    # Replicated: each host then finds its own rows without a mesh's geometry.
    return jax.jit(predict, out_shardings=partitioning.replicated)


def example_keys(seed: jax.Array, number: jax.Array, batch: Any) -> jax.Array:
    """A key for each example, by the seed and its index in the split."""
    size = next(iter(batch.values())).shape[0]
    indices = number * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def predicted_lines(
    rows: Iterable[Any],
    model: Any,
    predict: Predict,
    params: Any,
    *,
    batch_size: int,
    numbers: Iterable[int] | None = None,
    seed: int = 0,
    shared: SharedPredict | None = None,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of examples up to the batch's end, this host's lines) of each batch.

    rows: items of `data.batches.eval_batches`, of the batches of these numbers; None:
      of all from 0 on.
    seed: of `decoding.sample`; every example draws by it and its index.
    shared: predicts batches in which it says that images repeat.

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

    if numbers is None:
        numbers = itertools.count()
    for number, batch in zip(numbers, rows, strict=False):
        drawn = np.uint32(seed), np.uint32(number)
        if shared is not None and shared.pays(batch):
            outputs = shared(params, batch, *drawn)
        else:
            outputs = predict(params, batch.features, *drawn)
        start = number * batch_size
        in_flight.append((start, batch.examples, batch.start_index, outputs))
        if len(in_flight) > _BATCHES_AHEAD:
            yield fetched()
    while in_flight:
        yield fetched()
