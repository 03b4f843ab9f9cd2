"""Few-shot linear probe: ridge regression in closed form on a few images per class.

The protocol is big_vision's (evaluators/fewshot_lsr.py), which ViT-22B's few-shot
curves follow: features whitened by the few images, a constant appended, targets of -1
and 1, the penalty 2^10. All in float64.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.experiments.labelled import Labelled, Sets, check_alike
from vit22b_transfer.experiments.outcomes import Outcome

# Added to each deviation, and the value of the constant feature.
_EPSILON, _CONSTANT = 1e-5, 100.0


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Protocol of the few-shot probe.

    features: sets of the tower's vectors, each of them judged (`vectors.VECTORS`).
    shots: images per class, a number for each. seeds: of the draws of these images, an
      average over which is each number. penalty: on squared weights.
    """

    features: Sequence[Sequence[str]]
    shots: Sequence[int]
    seeds: Sequence[int]
    penalty: float

    def __post_init__(self):
        if not self.shots or min(self.shots) < 1 or not self.seeds:
            raise UserError(
                f"shots={tuple(self.shots)} with seeds={tuple(self.seeds)}: there must "
                "be at least one of each, and a shot is at least one image."
            )
        if self.penalty <= 0:
            raise UserError(f"penalty={self.penalty} must be positive.")

    def run(self, train: Sets, test: Sets) -> list[Outcome]:
        """A result for each set of features and number of shots.

        A class with fewer images gives those that it has, which is counted.

        Raises:
          UserError: if a class has no training image.
        """
        return [
            outcome.with_features(name)
            for name, data in train.items()
            for outcome in self._on(data, test[name])
        ]

    def _on(self, train: Labelled, test: Labelled) -> list[Outcome]:
        check_alike(train, test)
        check_every_class(train)
        outcomes = []
        for shots in self.shots:
            hits, notes = [], {}
            short = int(np.sum(train.counts() < shots))
            if short:
                notes["classes_with_fewer_images"] = short
            for seed in self.seeds:
                rows = draw_shots(train.labels, train.num_classes, shots, seed)
                few = Labelled(
                    train.features[rows],
                    train.labels[rows],
                    train.num_classes,
                    f"{shots} shots of {train.what}",
                )
                fit = fit_ridge(few, self.penalty)
                hits.append(fit.predict(test) == test.labels)
                if constant := int(np.sum(fit.scale == 0)):  # the most of any seed
                    known = notes.get("constant_features", 0)
                    notes["constant_features"] = max(known, constant)
            by_seed = [float(np.mean(hit)) for hit in hits]
            scores = np.mean(np.stack(hits), axis=0)
            settings = {"shots": shots, "by_seed": by_seed}
            outcomes.append(Outcome(settings, scores, notes))
        return outcomes


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A fit: scores of classes are ((x - mean) * scale, 100) @ weights.

    scale: 0 for a feature that is constant, which then says nothing.
    """

    mean: Float[np.ndarray, " width"]
    scale: Float[np.ndarray, " width"]
    weights: Float[np.ndarray, "columns classes"]

    def predict(self, data: Labelled) -> Int[np.ndarray, " images"]:
        """The best class of each image; of equal ones the first."""
        best = [
            np.argmax(self.columns(data.block(rows)) @ self.weights, axis=1)
            for rows in data.blocks()
        ]
        return np.concatenate(best)

    def columns(
        self, features: Float[np.ndarray, "rows width"]
    ) -> Float[np.ndarray, "rows columns"]:
        """Whitened features, the constant behind them."""
        white = (features - self.mean) * self.scale
        return np.concatenate([white, np.full((len(white), 1), _CONSTANT)], axis=1)


def fit_ridge(train: Labelled, penalty: float) -> Ridge:
    """Ridge regression to -1 and 1 on whitened features, on any number of images.

    W = (X'X + penalty I)^-1 X'Y, from sums over blocks of images, each read once; with
    fewer images than columns X' (XX' + penalty I)^-1 Y, which is the same. The constant
    is penalised like the other columns. Deviations are those of the population, plus
    1e-5.
    """
    constant = train.constant()
    if len(train) >= train.width + 1:
        return _fit_from_sums(train, penalty, constant)
    features = train.block(slice(None))
    scale = _scale(features.var(axis=0), constant)
    nothing = np.zeros((train.width + 1, train.num_classes))
    fit = Ridge(features.mean(axis=0), scale, nothing)
    columns = fit.columns(features)
    kernel = columns @ columns.T + penalty * np.eye(len(train))
    targets = np.full((len(train), train.num_classes), -1.0)
    targets[np.arange(len(train)), train.labels] = 1.0
    weights = columns.T @ np.linalg.solve(kernel, targets)
    return dataclasses.replace(fit, weights=weights)


def _fit_from_sums(train: Labelled, penalty: float, constant: np.ndarray) -> Ridge:
    """From sums of the features, and of their products, about the first block's mean.

    Whitening and targets are worked into the sums: whitened columns sum to 0.
    """
    counts = train.counts()
    centre, squares = np.zeros(0), np.zeros((train.width, train.width))
    of_classes = np.zeros((train.num_classes, train.width))
    for rows in train.blocks():
        near = train.block(rows)
        centre = centre if len(centre) else near.mean(axis=0)
        near -= centre
        squares += near.T @ near
        number = np.arange(len(near))
        entries = (np.ones(len(near)), (train.labels[rows], number))
        shape = (train.num_classes, len(near))
        of_classes += scipy.sparse.csr_array(entries, shape=shape) @ near
    shift = of_classes.sum(axis=0) / len(train)
    squares -= len(train) * np.outer(shift, shift)
    of_classes -= counts[:, None] * shift
    scale = _scale(np.maximum(np.diag(squares), 0) / len(train), constant)
    gram = penalty * np.eye(train.width + 1)
    gram[:-1, :-1] += squares * np.outer(scale, scale)
    gram[-1, -1] += len(train) * _CONSTANT**2
    products = np.zeros((train.width + 1, train.num_classes))
    products[:-1] = 2 * scale[:, None] * of_classes.T
    products[-1] = _CONSTANT * (2 * counts - len(train))
    return Ridge(centre + shift, scale, np.linalg.solve(gram, products))


def _scale(variance: np.ndarray, constant: np.ndarray) -> np.ndarray:
    return np.where(constant, 0.0, 1.0 / (np.sqrt(variance) + _EPSILON))


def draw_shots(
    labels: Int[np.ndarray, " images"], num_classes: int, shots: int, seed: int
) -> Int[np.ndarray, " drawn"]:
    """Numbers of up to `shots` images of each class, class after class.

    One generator serves the classes in their order; of each it permutes the images.
    """
    generator = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(num_classes + 1))
    drawn = [
        generator.permutation(order[start:stop])[:shots]
        for start, stop in zip(starts[:-1], starts[1:], strict=True)
    ]
    return np.concatenate(drawn)


def check_every_class(train: Labelled) -> None:
    """Raises UserError naming the first classes without a training image."""
    missing = np.flatnonzero(train.counts() == 0)
    if len(missing):
        shown = ", ".join(map(str, missing[:5].tolist()))
        raise UserError(
            f"{len(missing)} of {train.num_classes} classes have no image in "
            f"{train.what} (ids {shown}{', ...' if len(missing) > 5 else ''}), so "
            "that few shots of every class cannot be drawn. Add images, or take these "
            "classes off the class list."
        )
