"""What a metric is made of, example by example, so that any part can be scored again.

Most metrics are the mean of examples' scores. Others are made of sums over examples,
such as BLEU's counts. Either way the metric of a slice or of a resample needs no text:
it is the same function of other sums.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vit22b_transfer.evaluation import intervals
from vit22b_transfer.evaluation.intervals import Difference, Interval

Statistic = Callable[
    [Float[np.ndarray, "samples numbers"]], Float[np.ndarray, " samples"]
]


class ExampleNumbers(NamedTuple):
    """The numbers of each example, and the metric for rows of their sums.

    rows: NaN where the metric does not score the example, such as an image without
      labels. statistic: None of a mean, whose rows have one number each, the score.
    """

    rows: Float[np.ndarray, "examples numbers"]
    statistic: Statistic | None = None

    def value(self) -> float:
        """The metric; NaN if it scores none of the examples."""
        rows = self.rows[_scored(self.rows)]
        if not len(rows):
            return float("nan")
        if self.statistic is None:
            return float(np.mean(rows[:, 0]))
        return float(self.statistic(rows.sum(axis=0)[None])[0])

    def of(self, places: Sequence[int]) -> "ExampleNumbers":
        """Those of some of the examples."""
        return ExampleNumbers(self.rows[np.asarray(places, int)], self.statistic)


def mean_of(scores: Sequence[float]) -> ExampleNumbers:
    """A metric that is the mean of these."""
    return ExampleNumbers(np.asarray(scores, np.float64)[:, None])


def interval(
    numbers: ExampleNumbers,
    images: Int[np.ndarray, " examples"],
    *,
    resamples: int = intervals.RESAMPLES,
) -> Interval | None:
    """The interval of the metric by resampling images; None of fewer than two."""
    scored = _scored(numbers.rows)
    rows, images = numbers.rows[scored], images[scored]
    if len(np.unique(images)) < 2:
        return None
    if numbers.statistic is None:
        sums, counts = intervals.by_image(rows[:, 0], images)
        return intervals.bootstrap(sums, counts, resamples=resamples)
    return intervals.bootstrap_of_sums(
        _by_image(rows, images), numbers.statistic, resamples=resamples
    )


def clustered_error(
    numbers: ExampleNumbers, images: Int[np.ndarray, " examples"]
) -> float | None:
    """The clustered standard error in closed form; None if the metric is no mean."""
    scored = _scored(numbers.rows)
    if numbers.statistic is not None or scored.sum() < 2:
        return None
    rows = numbers.rows[scored, 0]
    return intervals.clustered_standard_error(rows, images[scored])


def difference(
    first: ExampleNumbers,
    second: ExampleNumbers,
    images: Int[np.ndarray, " examples"],
    *,
    resamples: int = intervals.RESAMPLES,
) -> Difference | None:
    """The first's metric less the second's on the same images in each resample.

    Of the examples that both score; None of fewer than two images. The share below zero
    is NaN of a metric that is no mean.
    """
    scored = _scored(first.rows) & _scored(second.rows)
    one, other, images = first.rows[scored], second.rows[scored], images[scored]
    if len(np.unique(images)) < 2:
        return None
    if first.statistic is None or second.statistic is None:
        sums, counts = intervals.by_image(one[:, 0], images)
        others, _ = intervals.by_image(other[:, 0], images)
        return intervals.paired_difference(sums, others, counts, resamples=resamples)
    width, one_of, other_of = one.shape[1], first.statistic, second.statistic
    columns = _by_image(np.concatenate([one, other], axis=1), images)
    found = intervals.bootstrap_of_sums(
        columns,
        lambda sums: one_of(sums[:, :width]) - other_of(sums[:, width:]),
        resamples=resamples,
    )
    return Difference(found, float("nan"))


def _scored(rows: np.ndarray) -> np.ndarray:
    return np.asarray(~np.isnan(rows).any(axis=1))


def _by_image(rows: np.ndarray, images: np.ndarray) -> np.ndarray:
    names, places = np.unique(images, return_inverse=True)
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, places, rows)
    return sums
