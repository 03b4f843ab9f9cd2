"""Fairness over groups of people: parity of answers, accuracy and calibration of each.

Groups are numbered from 0; each needs examples. Debiasing is that of Alabdulmohsin &
Lucic 2021 (arXiv 2106.12887): answers are randomised by a ramp over the score, with one
threshold for each group, fitted on held-out examples. Its thresholds are solved for
exactly here, where the paper's code takes steps of gradient descent.
"""

from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int, Num

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import calibration, class_probabilities

# Width of the ramp in units of the score, which runs from -1 to 1.
RAMP = 0.05
LEVELS = 20


class Subgroups(NamedTuple):
    """Of each group the examples, the accuracy and the calibration error, in [0, 1]."""

    count: Int[np.ndarray, " groups"]
    accuracy: Float[np.ndarray, " groups"]
    calibration_error: Float[np.ndarray, " groups"]


class Sweep(NamedTuple):
    """Debiasing at several limits; all but the limits are measured on the test part.

    `accuracy` and `difference` (of demographic parity) are expectations over the
    randomised answers, not those of one draw.
    """

    limits: Float[np.ndarray, " levels"]
    thresholds: Float[np.ndarray, "levels groups"]
    difference: Float[np.ndarray, " levels"]
    accuracy: Float[np.ndarray, " levels"]
    group_accuracy: Float[np.ndarray, "levels groups"]


def positive_rates(
    answers: Num[np.ndarray, " examples"] | Bool[np.ndarray, " examples"],
    groups: Int[np.ndarray, " examples"],
) -> Float[np.ndarray, " groups"]:
    """Mean answer of each group, from group 0 to the last.

    answers: yes or no, or the probability of yes, in [0, 1].

    Raises:
      UserError: without examples, or if a group below the last has none.
    """
    answers = class_probabilities.checked_unit(answers.astype(np.float64), "answers")
    count = _sizes(groups, len(answers))
    return np.bincount(groups, answers) / count


def demographic_parity_difference(rates: Float[np.ndarray, " groups"]) -> float:
    """The largest positive rate of a group less the smallest, in [0, 1]."""
    return float(np.max(rates) - np.min(rates))


def demographic_parity_ratio(rates: Float[np.ndarray, " groups"]) -> float:
    """The smallest positive rate over the largest, in [0, 1]; NaN if all are 0."""
    return float(np.min(rates) / np.max(rates)) if np.max(rates) else float("nan")


def accuracy_gap(accuracy: Float[np.ndarray, " groups"]) -> float:
    """The best accuracy of a group less the worst: of two groups |a - b|."""
    return float(np.max(accuracy) - np.min(accuracy))


def gap_interval(
    hits: Int[np.ndarray, " groups"], count: Int[np.ndarray, " groups"]
) -> tuple[float, float]:
    """The 95 % interval of the largest difference of the groups' shares, hits / count.

    Of two groups it is Newcombe's hybrid score interval of their difference (Newcombe
    1998, method 10), made one of its absolute value; of more each end is the largest
    over all pairs. Resampling a few examples that are all right would give no width.

    Raises:
      UserError: with fewer than two groups, one without examples, or more hits than
        these.
    """
    if len(count) < 2 or count.min() < 1 or np.any((hits < 0) | (hits > count)):
        raise UserError(
            f"a gap is between two groups or more with examples, but of {count} "
            f"examples {hits} are hits."
        )
    share = hits / count
    ends = [
        scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
        for k, n in zip(hits.tolist(), count.tolist(), strict=True)
    ]
    below, above = np.abs(np.array(ends) - share[:, None]).T
    apart = share[:, None] - share
    low = apart - np.hypot(below[:, None], above)
    high = apart + np.hypot(above[:, None], below)
    pairs = ~np.eye(len(count), dtype=bool)  # not of a group with itself
    return max(0.0, float(low[pairs].max())), min(1.0, float(high[pairs].max()))


def subgroups(
    probabilities: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
    groups: Int[np.ndarray, " examples"],
    bins: int = calibration.BINS,
) -> Subgroups:
    """Accuracy and expected calibration error of each group, before any mitigation.

    The error is that of `calibration.equal_width_bins`, with the same bins for all.
    In a small group it is larger by chance alone: compare groups of one size.

    Raises:
      UserError: as `class_probabilities.answers` and `positive_rates`.
    """
    confidence, correct = class_probabilities.answers(probabilities, labels)
    count = _sizes(groups, len(confidence))
    errors = []
    for group in range(len(count)):
        own = groups == group
        found = calibration.equal_width_bins(confidence[own], correct[own], bins)
        errors.append(calibration.expected_error(found))
    accuracy = np.bincount(groups, correct) / count
    return Subgroups(count, accuracy, np.array(errors))


def fitted_thresholds(
    probabilities: Float[np.ndarray, " examples"],
    groups: Int[np.ndarray, " examples"],
    limit: float,
    *,
    target_rate: float | None = None,
    ramp: float = RAMP,
) -> Float[np.ndarray, " groups"]:
    """Thresholds of the groups so that their positive rates differ by `limit` at most.

    Of scores f = 2p - 1 the randomised answer is yes with the probability
    h = clip((f - t) / ramp, 0, 1), t the group's threshold. The h of all examples have
    the least ramp / 2 |h|^2 - f h for which each group's mean is within `limit` / 2 of
    the target rate. As a group's mean falls in t, the best t is 0 if
    its mean is within, and else the t nearest to 0 whose mean is at the nearer edge.
    Means are piecewise linear in t, so that t is exact to rounding.

    probabilities: of the positive answer. target_rate: their mean if it is not given.

    Raises:
      UserError: as `positive_rates`; if limit or target is outside [0, 1], or the ramp
        is not positive.
    """
    scores = 2 * class_probabilities.checked_unit(probabilities, "probabilities") - 1
    count = len(_sizes(groups, len(scores)))
    target = float(np.mean(scores)) / 2 + 0.5 if target_rate is None else target_rate
    if not (0 <= limit <= 1 and 0 <= target <= 1 and ramp > 0):
        raise UserError(
            f"limit {limit} and target_rate {target} are to be in [0, 1], and ramp "
            f"{ramp} above 0."
        )
    low, high = max(target - limit / 2, 0.0), min(target + limit / 2, 1.0)
    return np.array(
        [_threshold(scores[groups == k], low, high, ramp) for k in range(count)]
    )


def randomised_answers(
    probabilities: Float[np.ndarray, " examples"],
    groups: Int[np.ndarray, " examples"],
    thresholds: Float[np.ndarray, " groups"],
    ramp: float = RAMP,
) -> Float[np.ndarray, " examples"]:
    """The probability of a positive answer after debiasing, in [0, 1].

    thresholds, ramp: of `fitted_thresholds`.

    Raises:
      UserError: for a group without a threshold.
    """
    if len(groups) and not 0 <= groups.min() <= groups.max() < len(thresholds):
        raise UserError(
            f"groups run from {groups.min()} to {groups.max()}, but there are "
            f"thresholds of {len(thresholds)}; fit on examples of all groups."
        )
    scores = 2 * class_probabilities.checked_unit(probabilities, "probabilities") - 1
    return np.clip((scores - thresholds[groups]) / ramp, 0.0, 1.0)


def expected_correct(
    answers: Float[np.ndarray, " examples"], labels: Bool[np.ndarray, " examples"]
) -> Float[np.ndarray, " examples"]:
    """The chance that each randomised answer is right; its mean is the accuracy."""
    return np.where(labels, answers, 1.0 - answers)


def parity_sweep(
    fit: tuple[Float[np.ndarray, " fitted"], Int[np.ndarray, " fitted"]],
    probabilities: Float[np.ndarray, " examples"],
    groups: Int[np.ndarray, " examples"],
    labels: Bool[np.ndarray, " examples"],
    *,
    levels: int = LEVELS,
    ramp: float = RAMP,
) -> Sweep:
    """Accuracy at each limit of demographic parity, as in the ViT-22B paper's figure.

    Limits are `levels` even steps from 0 to the difference of the undebiased answers
    (p > 1/2) of the examples fitted on.

    fit: (probabilities, groups) of held-out examples.

    Raises:
      UserError: as `fitted_thresholds` and `randomised_answers`.
    """
    if levels < 2:
        raise UserError(f"a sweep needs 2 levels or more, but got {levels}.")
    plain = demographic_parity_difference(positive_rates(fit[0] > 0.5, fit[1]))
    limits = np.linspace(0.0, plain, levels)
    rows = []
    for limit in limits.tolist():
        thresholds = fitted_thresholds(*fit, limit, ramp=ramp)
        answers = randomised_answers(probabilities, groups, thresholds, ramp)
        correct = expected_correct(answers, labels)
        rows.append(
            (
                thresholds,
                demographic_parity_difference(positive_rates(answers, groups)),
                np.mean(correct),
                positive_rates(correct, groups),
            )
        )
    return Sweep(limits, *map(np.array, zip(*rows, strict=True)))


def _sizes(groups, examples):
    if not examples or examples != len(groups) or groups.min() < 0:
        raise UserError(
            f"{examples} examples have {len(groups)} groups; give each example one, a "
            "number from 0, and one example at least."
        )
    count = np.bincount(groups)
    if not count.all():
        raise UserError(
            f"group {np.argmin(count)} of 0 to {len(count) - 1} has no example, and "
            "nothing can be said of it; number the groups without it."
        )
    return count


def _threshold(scores, low, high, ramp):
    """The t nearest to 0 whose mean ramp is from `low` to `high`."""
    at_zero = np.mean(np.clip(scores / ramp, 0.0, 1.0))
    if low <= at_zero <= high:
        return 0.0
    # The mean as a function of t: 1, falling from the first corner, 0 from the last.
    corners = np.concatenate([scores - ramp, scores])
    turns = np.repeat([-1.0, 1.0], len(scores)) / (len(scores) * ramp)
    order = np.argsort(corners, kind="stable")
    corners, slopes = corners[order], np.cumsum(turns[order])
    falls = np.append(0.0, slopes[:-1] * np.diff(corners))
    means = np.clip(np.minimum.accumulate(1.0 + np.cumsum(falls)), 0.0, 1.0)
    means[-1] = 0.0
    if at_zero > high:
        after = int(np.argmax(means <= high))
        edge = high
    else:
        after = int(np.flatnonzero(means >= low)[-1]) + 1
        edge = low
    if after == 0:
        return corners[0]
    step = (means[after - 1] - edge) / (means[after - 1] - means[after])
    return corners[after - 1] + step * (corners[after] - corners[after - 1])
