"""k-nearest-neighbour probe: the nearest training images vote for their classes.

The protocol is DINO's (eval_knn.py) and DINOv2's (eval/knn.py): vectors of length one,
cosine similarity, a neighbour's vote being exp(similarity / 0.07).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.experiments.labelled import Labelled, Sets, check_alike, unseen
from vit22b_transfer.experiments.outcomes import Outcome

# Images whose similarities to each other are in memory at a time.
_QUERIES, _CANDIDATES = 2048, 8192


@dataclasses.dataclass(frozen=True)
class NearestNeighbours:
    """Protocol of the k-NN probe.

    features: sets of the tower's vectors, each of them judged (`vectors.VECTORS`).
    neighbours: numbers of them, a result for each. temperature: of the votes.
    """

    features: Sequence[Sequence[str]]
    neighbours: Sequence[int]
    temperature: float

    def __post_init__(self):
        if not self.neighbours or min(self.neighbours) < 1 or self.temperature <= 0:
            raise UserError(
                f"neighbours={tuple(self.neighbours)} with temperature="
                f"{self.temperature}: at least one number of neighbours is needed, and "
                "both are positive."
            )

    def run(self, train: Sets, test: Sets) -> list[Outcome]:
        """A result for each set of features and number of neighbours.

        None is called the best of them. Numbers above that of training images are left
        out, and listed in the notes.

        Raises:
          UserError: if all numbers are above.
        """
        return [
            outcome.with_features(name)
            for name, data in train.items()
            for outcome in self._on(data, test[name])
        ]

    def _on(self, train: Labelled, test: Labelled) -> list[Outcome]:
        check_alike(train, test)
        train.constant()  # which says if nothing can be told
        counts = [k for k in self.neighbours if k <= len(train)]
        left_out = [k for k in self.neighbours if k > len(train)]
        if not counts:
            raise UserError(
                f"neighbours={tuple(self.neighbours)}, but {train.what} has only "
                f"{len(train)} images. Ask for fewer."
            )
        notes: dict[str, Any] = {}
        if left_out:
            notes["left_out_neighbours"] = left_out
        if zero := int(np.sum(~train.features.any(1)) + np.sum(~test.features.any(1))):
            notes["vectors_of_length_zero"] = zero
        notes |= unseen(train.counts(), test.labels)
        similarity, places = nearest(train, test, max(counts))
        outcomes = []
        for count in counts:
            classes = train.labels[places[:, :count]]
            predicted = vote(
                similarity[:, :count], classes, train.num_classes, self.temperature
            )
            scores = (predicted == test.labels).astype(np.float64)
            outcomes.append(Outcome({"neighbours": count}, scores, notes))
        return outcomes


def nearest(
    train: Labelled, test: Labelled, count: int
) -> tuple[Float[np.ndarray, "images count"], Int[np.ndarray, "images count"]]:
    """Cosine similarity and number of the `count` nearest training images, best first.

    Of equally near ones the first stands first. Computed in float32 on the default
    device, blocks of test against blocks of training images. A vector of length zero is
    equally far from all.
    """
    similarities, places = [], []
    high, wide = min(_QUERIES, len(test)), min(_CANDIDATES, len(train))
    for queries in test.blocks(high):
        size = queries.stop - queries.start
        best = (
            jnp.full((high, count), -jnp.inf, jnp.float32),
            jnp.zeros((high, count), jnp.int32),
        )
        asked = _unit(jnp.asarray(_filled(test.features[queries], high)))
        for rows in train.blocks(wide):
            block = _filled(train.features[rows], wide)
            found = rows.stop - rows.start
            jax.block_until_ready(best)  # else blocks pile up before the device
            best = _merged(asked, block, np.int32(rows.start), np.int32(found), *best)
        similarities.append(np.asarray(best[0])[:size])
        places.append(np.asarray(best[1])[:size])
    return np.concatenate(similarities), np.concatenate(places)


def vote(
    similarity: Float[np.ndarray, "images neighbours"],
    classes: Int[np.ndarray, "images neighbours"],
    num_classes: int,
    temperature: float,
) -> Int[np.ndarray, " images"]:
    """The class with the most votes of each image; of equal ones the first.

    similarity: in [-1, 1].
    """
    predicted = []
    for start in range(0, len(classes), _QUERIES):
        part = slice(start, start + _QUERIES)
        # Less the largest: a common factor, which keeps exp from overflowing.
        near = similarity[part].astype(np.float64)
        votes = np.exp((near - near[:, :1]) / temperature)
        sums = np.zeros((len(votes), num_classes))
        np.add.at(sums, (np.arange(len(votes))[:, None], classes[part]), votes)
        predicted.append(np.argmax(sums, axis=1))
    return np.concatenate(predicted)


@functools.partial(jax.jit, donate_argnums=(4, 5))
def _merged(
    queries: Float[Array, "queries width"],
    block: Float[Array, "rows width"],
    start: Int[Array, ""],
    found: Int[Array, ""],
    similarity: Float[Array, "queries count"],
    places: Int[Array, "queries count"],
):
    """The nearest ones, those of a block of training images among them."""
    new = jnp.matmul(queries, _unit(block).T, precision="highest")
    number = jnp.arange(len(block), dtype=jnp.int32)
    new = jnp.where((number < found)[None], new, -jnp.inf)
    # Earlier images first: top_k keeps the order of equal ones.
    count = similarity.shape[1]
    similarity = jnp.concatenate([similarity, new], axis=1)
    similarity, chosen = jax.lax.top_k(similarity, count)
    before = jnp.take_along_axis(places, jnp.minimum(chosen, count - 1), axis=1)
    return similarity, jnp.where(chosen < count, before, chosen - count + start)


def _unit(vectors):
    vectors = vectors.astype(jnp.float32)
    length = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / jnp.where(length > 0, length, jnp.ones_like(length))


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` rows, zeros behind those that there are."""
    return np.pad(rows, [(0, count - len(rows)), (0, 0)])
