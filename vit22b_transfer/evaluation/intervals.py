"""How sure a score is: intervals by resampling images, tests of two models, power.

What is drawn is the image: all its questions come with it, as they are alike. A score
is then a ratio, the sum of all questions' scores over their number, and functions take
both for each image (`by_image`). A score that is no mean of questions' scores, such as
CIDEr, is resampled with what it is made of kept: with the document frequencies of all
references.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.special
import scipy.stats
from jaxtyping import Bool, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import class_probabilities

RESAMPLES = 9_999
CONFIDENCE = 0.95
# Numbers of images that are drawn at a time.
_AT_A_TIME = 2_000_000


class Interval(NamedTuple):
    """A score, its interval and standard error, and by which method it was found.

    method: "BCa", or "BC" of `resampled`; "percentile" if that is undefined, as all
    resamples are equal or on one side.
    """

    value: float
    low: float
    high: float
    standard_error: float
    method: str


class Difference(NamedTuple):
    """The interval of a score less another's, and the share of resamples below 0.

    Resamples at 0 count half.
    """

    interval: Interval
    share_below_zero: float


class Exact(NamedTuple):
    """McNemar's test: examples that one alone has right, two-sided probability."""

    only_first: int
    only_second: int
    probability: float


def by_image(
    scores: Float[np.ndarray, " questions"], images: Int[np.ndarray, " questions"]
) -> tuple[Float[np.ndarray, " images"], Int[np.ndarray, " images"]]:
    """(sum of the scores, number of questions) of each image, in the order of ids.

    Raises:
      UserError: if there is no score, or one is not finite.
    """
    scores = class_probabilities.checked_scores(scores, "scores")
    _, places, counts = np.unique(images, return_inverse=True, return_counts=True)
    return np.bincount(places, scores), counts


def bootstrap(
    sums: Float[np.ndarray, " images"],
    counts: Int[np.ndarray, " images"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The interval of sum(sums) / sum(counts) by resampling images.

    Bias-corrected and accelerated (Efron 1987): percentiles of the resampled scores
    that are shifted by how many are below the score, and by its skewness, from leaving
    out each image once. It is scipy's `stats.bootstrap` of the pairs.

    Raises:
      UserError: with fewer than two images, fewer resamples than an end of the interval
        needs, an image without questions, or a confidence outside (0, 1).
    """
    _check(sums, counts, resamples, confidence)
    drawn = _drawn((sums, counts), seed, resamples)
    found = drawn[0] / drawn[1]
    total, number = sums.sum(), counts.sum()
    one_out = (total - sums) / (number - counts)
    return _interval(total / number, found, one_out, confidence)


def resampled(
    measure: Callable[..., Mapping[str, float]],
    images: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = 1_000,
    confidence: float = CONFIDENCE,
) -> dict[str, Interval]:
    """Intervals of numbers that are no mean over images, such as an AUROC.

    Bias-corrected percentiles (Efron 1981): as `bootstrap` without its acceleration,
    which would take a pass for each image. A number that is biased in small samples
    (a calibration error is too large) has an interval that is corrected for it.

    measure: of numbers of images, drawn with repetition, of each group; gives names and
      values. images: how many each group has; groups are resampled apart.

    Resamples in which a value is not defined (it raises a UserError, or is no number)
    are left out of its interval, and `method` says how many.

    Raises:
      UserError: for a group of fewer than two images, too few resamples, or as
        `measure` of all images.
    """
    _check_resamples(resamples, confidence)
    if min(images) < 2:
        raise UserError(
            f"an interval needs two images or more, but there are {min(images)}."
        )
    whole = measure(*map(np.arange, images))
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in whole}
    for _ in range(resamples):
        rows = [rng.integers(0, count, count) for count in images]
        try:
            found = measure(*rows)
        except UserError:
            continue
        for name in whole:
            if name in found and np.isfinite(found[name]):
                drawn[name].append(found[name])
    result = {}
    for name, value in whole.items():
        if len(drawn[name]) < 2:
            nan = float("nan")
            result[name] = Interval(float(value), nan, nan, nan, "undefined")
            continue
        interval = _interval(value, np.array(drawn[name]), None, confidence)
        if lost := resamples - len(drawn[name]):
            said = f"{interval.method}, {lost} of {resamples} resamples undefined"
            interval = interval._replace(method=said)
        result[name] = interval
    return result


def bootstrap_of_sums(
    columns: Float[np.ndarray, "images numbers"],
    statistic: Callable[
        [Float[np.ndarray, "samples numbers"]], Float[np.ndarray, " samples"]
    ],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The interval of a number made of sums over images, by resampling these.

    columns: of each image what is summed. statistic: the number for each row of sums;
      it must be finite of any resample. As `bootstrap`, which is of one ratio.

    Raises:
      UserError: as `bootstrap`.
    """
    images = len(columns)
    _check(columns[:, 0], np.ones(images, int), resamples, confidence)
    total = columns.sum(axis=0)
    found = []
    for chosen in _choices(images, seed, resamples):
        rows = np.repeat(np.arange(len(chosen)), images)
        times = np.bincount(rows * images + chosen.ravel(), minlength=chosen.size)
        found.append(statistic(times.reshape(chosen.shape) @ columns))
    value = float(statistic(total[None])[0])
    one_out = statistic(total - columns)
    return _interval(value, np.concatenate(found), one_out, confidence)


def paired_difference(
    first: Float[np.ndarray, " images"],
    second: Float[np.ndarray, " images"],
    counts: Int[np.ndarray, " images"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Difference:
    """The first model's score less the second's, on the same images in each resample.

    first, second: sums of the scores of each image's questions; counts: of these.

    Raises:
      UserError: as `bootstrap`.
    """
    gaps = first - second
    _check(gaps, counts, resamples, confidence)
    drawn = _drawn((gaps, counts), seed, resamples)
    found = drawn[0] / drawn[1]
    total, number = gaps.sum(), counts.sum()
    one_out = (total - gaps) / (number - counts)
    below = float(np.mean(found < 0) + np.mean(found == 0) / 2)
    return Difference(_interval(total / number, found, one_out, confidence), below)


def clustered_standard_error(
    scores: Float[np.ndarray, " questions"], images: Int[np.ndarray, " questions"]
) -> float:
    """The standard error of the mean score, with questions of an image not independent.

    Miller 2024 (arXiv 2411.00640): the variance of the mean of independent questions,
    and 1 / n^2 times the products of all pairs of an image.

    Raises:
      UserError: with fewer than two questions; as `by_image`.
    """
    if len(scores) < 2:
        raise UserError(
            f"a standard error needs two scores or more, but there are {len(scores)}."
        )
    scores = class_probabilities.checked_scores(scores, "scores")
    apart = scores - scores.mean()
    sums, _ = by_image(apart, images)
    pairs = np.sum(sums**2) - np.sum(apart**2)
    # Pairs may be negative; all of it is below 0 by rounding at most.
    variance = np.var(scores, ddof=1) / len(scores) + pairs / len(scores) ** 2
    return float(np.sqrt(max(variance, 0.0)))


def mcnemar(
    first: Bool[np.ndarray, " examples"], second: Bool[np.ndarray, " examples"]
) -> Exact:
    """Whether two models' accuracies differ by more than chance (McNemar 1947).

    first, second: whether each has each example right. Of the examples that one alone
    has right each model has half, if they are equally good: the exact binomial test,
    two-sided, with the probability 1 if there are none. Examples are to be independent;
    of several questions an image, take `paired_difference`.

    Raises:
      UserError: without examples, or if there are not as many of both.
    """
    if not len(first) or len(first) != len(second):
        raise UserError(
            "the test needs the same examples of both models, one at least, but got "
            f"{len(first)} and {len(second)}."
        )
    one, other = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    if not one + other:
        return Exact(0, 0, 1.0)
    return Exact(one, other, float(scipy.stats.binomtest(one, one + other).pvalue))


def deviation_of_difference(
    first: float, second: float, correlation: float = 0.0
) -> float:
    """The standard deviation of a difference: that of each, and their correlation.

    The correlation is 0 if the two have answered different questions.

    Raises:
      UserError: for a negative deviation, or a correlation outside [-1, 1].
    """
    if min(first, second) < 0 or not -1 <= correlation <= 1:
        raise UserError(
            f"deviations {first} and {second} are to be 0 or more, and the correlation "
            f"{correlation} in [-1, 1]."
        )
    variance = first**2 + second**2 - 2 * correlation * first * second
    return float(np.sqrt(max(variance, 0.0)))


def needed_examples(
    effect: float,
    deviation: float,
    *,
    significance: float = 0.05,
    power: float = 0.8,
) -> int:
    """How many examples show a difference of `effect`, rounded up.

    ((z of 1 - significance / 2 + z of power) * deviation / effect)^2, of a two-sided
    test (Miller 2024). `deviation` is that of an example's difference.

    Raises:
      UserError: if the effect is 0 or the deviation negative, or the others are not
        between 0 and 1.
    """
    if not (effect and deviation >= 0 and 0 < significance < 1 and 0 < power < 1):
        raise UserError(
            f"effect {effect} is to be other than 0, deviation {deviation} 0 or more, "
            f"significance {significance} and power {power} between 0 and 1."
        )
    z = scipy.special.ndtri(1 - significance / 2) + scipy.special.ndtri(power)
    return max(int(np.ceil((z * deviation / effect) ** 2)), 1)


def _check(sums, counts, resamples, confidence):
    class_probabilities.checked_scores(sums, "sums of scores")
    if len(sums) < 2 or len(sums) != len(counts) or counts.min() < 1:
        raise UserError(
            f"an interval needs two images or more, with a question each; got sums of "
            f"{len(sums)} and counts of {len(counts)} images, the least "
            f"{counts.min() if len(counts) else 0}."
        )
    _check_resamples(resamples, confidence)


def _check_resamples(resamples, confidence):
    if not 0 < confidence < 1 or resamples * (1 - confidence) / 2 < 1:
        raise UserError(
            f"{resamples} resamples are too few for a confidence of {confidence}, "
            "which is to be between 0 and 1; take more, such as 9999."
        )


def _drawn(columns, seed, resamples):
    """The sums of each column over as many images, drawn with repetition."""
    parts = []
    for chosen in _choices(len(columns[0]), seed, resamples):
        parts.append([column[chosen].sum(axis=1) for column in columns])
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def _choices(images, seed, resamples):
    """Numbers of the images of each resample, some resamples at a time."""
    rng = np.random.default_rng(seed)
    step = max(_AT_A_TIME // images, 1)
    for start in range(0, resamples, step):
        yield rng.integers(0, images, (min(step, resamples - start), images))


def _interval(value, found, one_out, confidence):
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    below = (np.mean(found < value) + np.mean(found <= value)) / 2
    method, acceleration, spread = "percentile", 0.0, 1.0
    if one_out is not None:
        apart = one_out.mean() - one_out
        spread = np.sum(apart**2)
    if 0 < below < 1 and spread > 0 and np.ptp(found) > 0:
        method = "BC"
        if one_out is not None:
            method = "BCa"
            acceleration = np.sum(apart**3) / (6 * spread**1.5)
        bias = scipy.special.ndtri(below)
        moved = bias + scipy.special.ndtri(tails)
        tails = scipy.special.ndtr(bias + moved / (1 - acceleration * moved))
    low, high = np.percentile(found, 100 * tails)
    error = np.std(found, ddof=1)
    return Interval(float(value), float(low), float(high), float(error), method)
