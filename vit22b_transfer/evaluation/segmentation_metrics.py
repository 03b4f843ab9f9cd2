"""Segmentation: intersection over union of classes, counted over all pixels of a set.

A pixel without a class counts in nothing. Of a set each class has one intersection and
one union over all its images; a class that no pixel has and none is given has neither,
and is left out of the mean: how many those are is told. A class that is in no mask but
is given to some pixel has 0. So it is in mmsegmentation and DINOv3; torchmetrics'
`MeanIoU` takes means over single images, which is another number.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import intervals

NO_CLASS = -1
# What is counted of each class: right pixels, pixels that have it, that are given it.
RIGHT, TRUE, GIVEN = range(3)


class SegmentationScores(NamedTuple):
    """Of a set, all in [0, 1].

    of_class: intersection over union by class; NaN of one that occurs nowhere. mean: of
    those that occur. pixel_accuracy: share of right pixels. mean_accuracy: mean over
    the classes in the masks of the share of their pixels that is right. absent: classes
    that occur in no mask and no prediction; only_given: in a prediction alone.
    """

    mean: float
    of_class: Float[np.ndarray, " classes"]
    pixel_accuracy: float
    mean_accuracy: float
    absent: int
    only_given: int


def confusion(
    labels: Int[np.ndarray, "rows columns"],
    given: Int[np.ndarray, "rows columns"],
    num_classes: int,
) -> Int[np.ndarray, "classes classes"]:
    """Pixels of each class (row) that are given each class (column).

    labels: `NO_CLASS` where there is none. given: 0 to num_classes - 1 everywhere.

    Raises:
      UserError: for other numbers.
    """
    for name, values, least in (("label", labels, NO_CLASS), ("prediction", given, 0)):
        if values.size and not least <= values.min() <= values.max() < num_classes:
            raise UserError(
                f"a {name} is {values.min()} to {values.max()}; {num_classes} classes "
                f"have the numbers 0 to {num_classes - 1}."
            )
    known = labels != NO_CLASS
    places = labels[known].astype(np.int64) * num_classes + given[known]
    counts = np.bincount(places, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes)


def counts_of(
    matrix: Int[np.ndarray, "classes classes"],
) -> Int[np.ndarray, "3 classes"]:
    """`RIGHT`, `TRUE` and `GIVEN` pixels of each class of a confusion matrix."""
    return np.stack([np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)])


def scores(counts: Int[np.ndarray, "3 classes"]) -> SegmentationScores:
    """The scores of the counts of a whole set.

    Raises:
      UserError: if no pixel has a class.
    """
    right, true, given = counts
    if not true.sum():
        raise UserError(
            "no pixel of the masks has a class, so that nothing can be judged. Look at "
            "the numbers of the ignored labels."
        )
    union = true + given - right
    with np.errstate(invalid="ignore"):
        of_class = np.where(union > 0, right / np.maximum(union, 1), np.nan)
        recall = right[true > 0] / true[true > 0]
    return SegmentationScores(
        mean=float(np.nanmean(of_class)),
        of_class=of_class,
        pixel_accuracy=float(right.sum() / true.sum()),
        mean_accuracy=float(recall.mean()),
        absent=int(np.sum(union == 0)),
        only_given=int(np.sum((true == 0) & (given > 0))),
    )


def mean_interval(
    by_image: Int[np.ndarray, "images 3 classes"],
    *,
    resamples: int = intervals.RESAMPLES,
) -> intervals.Interval:
    """The mean intersection over union, and its interval by resampling images.

    In a resample, too, the classes that occur in it nowhere are left out of its mean.

    Raises:
      UserError: as `scores` and `intervals.bootstrap_of_sums`.
    """
    scores(by_image.sum(axis=0))
    images, _, classes = by_image.shape

    def mean(sums):
        right, true, given = sums.reshape(-1, 3, classes).swapaxes(0, 1)
        union = true + given - right
        occur = np.maximum(np.sum(union > 0, axis=1), 1)
        return np.sum(right / np.maximum(union, 1), axis=1) / occur

    flat = by_image.reshape(images, -1).astype(np.float64)
    return intervals.bootstrap_of_sums(flat, mean, resamples=resamples)
