"""Features with labels as probes read them: checked once, read a block at a time."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import scipy.special
from jaxtyping import Bool, Float, Int

from vit22b_transfer import UserError

# Bytes of a block of rows, in float64: what a probe has in memory beside the features.
_BLOCK_BYTES = 1 << 26
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Labelled:
    """One vector and one class of each image of a split.

    features: finite, of any floating dtype. labels: ids from 0 to num_classes - 1.
    what: what messages call the split.

    Raises:
      UserError: for no image, a label out of range, a number that is not finite.
    """

    features: Float[np.ndarray, "vectors width"]
    labels: Int[np.ndarray, " images"]
    num_classes: int
    what: str = "the split"

    def __post_init__(self):
        check_labels(self.labels, self.num_classes, self.what)
        if len(self.features) != len(self.labels):
            raise UserError(
                f"{self.what} has {len(self.features)} vectors and {len(self.labels)} "
                "labels; there must be one for each."
            )
        bad = np.concatenate(
            [~np.isfinite(self.block(rows)).all(axis=1) for rows in self.blocks()]
        )
        if bad.any():
            raise UserError(
                f"{int(bad.sum())} of {len(bad)} feature vectors of {self.what} hold "
                f"numbers that are not finite, the first that of image "
                f"{int(np.argmax(bad))}. The tower or its checkpoint is broken, or its "
                "dtype too narrow: try float32."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.features.shape[1]

    def blocks(self, rows: int | None = None) -> Iterator[slice]:
        """Slices that cover all images in order, as few as memory allows."""
        rows = rows or max(1, _BLOCK_BYTES // (8 * self.width))
        for start in range(0, len(self), rows):
            yield slice(start, min(start + rows, len(self)))

    def block(
        self, rows: slice | Int[np.ndarray, " rows"]
    ) -> Float[np.ndarray, "rows width"]:
        """The vectors of some images, in float64."""
        return self.features[rows].astype(np.float64)

    def counts(self) -> Int[np.ndarray, " classes"]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def constant(self) -> Bool[np.ndarray, " width"]:
        """Which features have one and the same value for all images.

        Raises:
          UserError: if all of them do: then no image can be told from another.
        """
        low, high = (
            find([find(self.features[rows], axis=0) for rows in self.blocks()], axis=0)
            for find in (np.min, np.max)
        )
        constant = np.asarray(low == high)
        if constant.all():
            raise UserError(
                f"all {self.width} features of {self.what} are the same for each of "
                f"its {len(self)} images, so that nothing can be told by them. Is the "
                "tower trained, and are the images different?"
            )
        return constant


# The same images by the names of the vectors that are joined in `features`.
Sets = Mapping[tuple[str, ...], Labelled]


def check_labels(
    labels: Int[np.ndarray, " images"], num_classes: int, what: str
) -> None:
    """Raises UserError unless there are images and all labels are ids of classes."""
    if num_classes < 2:
        raise UserError(
            f"{num_classes} classes: with fewer than 2 there is nothing to tell apart."
        )
    if not len(labels):
        raise UserError(f"{what} has no image with a label, so nothing to probe with.")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        found = np.unique(labels[wrong])
        raise UserError(
            f"{int(wrong.sum())} labels of {what} are out of range, such as that of "
            f"image {int(np.argmax(wrong))}: {_listed(found)}; {num_classes} classes "
            f"have the ids 0 to {num_classes - 1}. Correct the labels, or set "
            "NUM_CLASSES."
        )


def check_alike(train: Labelled, test: Labelled) -> None:
    """Raises UserError unless both have vectors of one width and the same classes."""
    for name in ("width", "num_classes"):
        ours, theirs = getattr(train, name), getattr(test, name)
        if ours != theirs:
            raise UserError(
                f"{train.what} has {name} {ours}, {test.what} {theirs}: both must be "
                "features of one tower, with one class list."
            )


def unseen(
    train_counts: Int[np.ndarray, " classes"], labels: Int[np.ndarray, " images"]
) -> dict[str, int]:
    """How many classes have no training image, and test images are of such a class.

    What a probe cannot know is judged all the same: those images count as wrong.
    train_counts: training images of each class. labels: of the test images.
    """
    missing = train_counts == 0
    images = int(missing[labels].sum())
    found = {
        "classes_without_training_image": int(missing.sum()),
        "test_images_of_such_classes": images,
    }
    return {name: count for name, count in found.items() if count}


def held_out(
    labels: Int[np.ndarray, " images"], share: float, seed: int, what: str
) -> tuple[Int[np.ndarray, " fitted"], Int[np.ndarray, " held"]]:
    """Image numbers to fit on, and a random `share` in (0, 1) of all to choose by.

    Raises:
      UserError: if either part would be empty.
    """
    count = round(share * len(labels)) if 0 < share < 1 else 0
    if not 0 < count < len(labels):
        raise UserError(
            f"held_out={share} of the {len(labels)} images of {what}: a share "
            "between 0 and 1 must leave images on both sides."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.sort(order[count:]), np.sort(order[:count])


def _listed(values: np.ndarray) -> str:
    more = ", ..." if len(values) > _SHOWN else ""
    return ", ".join(map(str, values[:_SHOWN].tolist())) + more


def share_and_loss(
    logits: Float[np.ndarray, "images classes"], labels: Int[np.ndarray, " images"]
) -> tuple[float, float]:
    """The share of images that are right, and the mean cross-entropy in nats.

    A share of NaN and an infinite loss where a logit is not finite.
    """
    logits = logits.astype(np.float64)
    if not np.isfinite(logits).all():
        return float("nan"), float("inf")
    right = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    share = float(np.mean(np.argmax(logits, axis=1) == labels))
    return share, float(np.mean(scipy.special.logsumexp(logits, axis=1) - right))
