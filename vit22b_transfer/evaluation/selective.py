"""Selective prediction: what is gained if the least sure answers are not taken.

They may be refused (accuracy by coverage), answered by an oracle who is always right
(collaborative accuracy and area), or labelled to learn from (active learning). Equally
sure examples are taken in no order: measures are means over all orders of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import class_probabilities
from vit22b_transfer.evaluation.out_of_distribution import area_under_roc

# Shares that the oracle answers in Plex.
ORACLE_FRACTIONS = (0.005, 0.01, 0.02, 0.05)
_THRESHOLDS = 200
_CERTAINTY_BINS = 1000


def accuracy_by_coverage(
    confidence: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
) -> Float[np.ndarray, " examples"]:
    """Accuracy among the 1, 2, ..., n most confident examples, each in [0, 1].

    One minus it is the risk of a risk-coverage curve (Geifman & El-Yaniv 2017).
    """
    hits = _hits_among_surest(confidence, correct)
    return hits[1:] / np.arange(1, len(hits))


def area_under_response_rate_accuracy(
    confidence: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
) -> float:
    """AURRA of Hendrycks et al. 2021 (natural adversarial examples), in [0, 1].

    The mean of `accuracy_by_coverage` over the response rates 1/n, 2/n, ..., 1.
    """
    return float(np.mean(accuracy_by_coverage(confidence, correct)))


def calibration_auc(
    confidence: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
) -> float:
    """The chance that a wrong answer is less sure than a right one, in [0, 1].

    Area under the ROC curve with wrong answers as the positive class (Kivlichan et
    al. 2021).

    Raises:
      UserError: if all answers are right, or all wrong.
    """
    return area_under_roc(-np.asarray(confidence, np.float64), ~correct)


def collaborative_accuracy(
    confidence: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
    fraction: float,
) -> float:
    """Accuracy in [0, 1] after an oracle answers the least confident examples.

    These are the whole part of n * `fraction` (Kivlichan et al. 2021).

    Raises:
      UserError: if the fraction is outside [0, 1].
    """
    hits = _hits_among_surest(confidence, correct)
    count = len(hits) - 1
    asked = _asked(count, fraction)
    return float((hits[count - asked] + asked) / count)


def collaborative_auc(
    scores: Float[np.ndarray, " examples"],
    positive: Bool[np.ndarray, " examples"],
    fraction: float,
    certainty: Float[np.ndarray, " examples"] | None = None,
) -> float:
    """Area under the ROC curve of scores with an oracle's help, in [0, 1].

    At each of 200 thresholds over [0, 1] the oracle corrects the whole part of
    n * `fraction` examples of the least certainty, and true and false positives are
    counted; none is corrected at the two thresholds outside [0, 1]. Certainty is in
    1000 bins, and of the last bin asked each example is corrected in part, as in
    Plex (Tran et al. 2022; Kivlichan et al. 2021).

    scores: of the positive class, in [0, 1].
    certainty: in [0, 1]; without it, the distance of a score from the threshold.

    Plex prints this for many classes with the predicted class id as the score and
    "label is not class 0" as positive, which measures class 0 alone; its figure of a
    data set is had with `scores` min(predicted id, 1) and `certainty` the confidence.

    Raises:
      UserError: if a score, certainty or fraction is outside [0, 1], or if there is no
        example of a side.
    """
    if certainty is None:
        whole = np.arange(len(scores))
        return CollaborativeAreas.of(scores, positive)(whole, (fraction,))[fraction]
    scores = class_probabilities.checked_unit(scores, "scores")
    positives, negatives = _sides(positive)
    certainty = class_probabilities.checked_unit(certainty, "certainties")
    corrected = _corrected(certainty, _asked(len(scores), fraction))
    rates = []
    for number in range(_THRESHOLDS):
        threshold = number / (_THRESHOLDS - 1)
        if number in (0, _THRESHOLDS - 1):
            taken = np.full(len(scores), float(number == 0))
        else:
            taken = (scores > threshold).astype(np.float64)
            taken += corrected * (positive - taken)
        hits = taken[positive].sum()
        rates.append(((taken.sum() - hits) / negatives, hits / positives))
    false, true = np.array(rates[::-1]).T
    return float(np.trapezoid(true, false))


class CollaborativeAreas(NamedTuple):
    """`collaborative_auc` without certainties, of any resample of the same examples.

    The examples that an oracle is asked at a threshold are those between two places in
    the order of scores, whichever examples are drawn how often: these places are found
    once. Make it by `of`.

    order: of the examples by score. positive: in that order. first, last: for each
    threshold inside (0, 1) the range of the examples that are less than 0, 1, 2, ...
    bins of certainty away from it.
    """

    order: Int[np.ndarray, " examples"]
    positive: Bool[np.ndarray, " examples"]
    first: Int[np.ndarray, "thresholds steps"]
    last: Int[np.ndarray, "thresholds steps"]

    @classmethod
    def of(
        cls,
        scores: Float[np.ndarray, " examples"],
        positive: Bool[np.ndarray, " examples"],
    ) -> "CollaborativeAreas":
        """Raises UserError for a score outside [0, 1] or without examples of a side."""
        scores = class_probabilities.checked_unit(scores, "scores")
        _sides(positive)
        order = np.argsort(scores, kind="stable")
        ranked = scores[order]
        steps = np.arange(_CERTAINTY_BINS + 1)
        first, last = [], []
        for number in range(1, _THRESHOLDS - 1):
            threshold = number / (_THRESHOLDS - 1)
            bins = _bins(np.abs(ranked - threshold))
            turn = int(np.searchsorted(ranked, threshold, side="right"))
            below = np.searchsorted(bins[:turn][::-1], steps)
            above = np.searchsorted(bins[turn:], steps)
            first.append(turn - below)
            last.append(turn + above)
        return cls(order, positive[order], *map(np.array, (first, last)))

    def __call__(
        self, rows: Int[np.ndarray, " drawn"], fractions: Sequence[float]
    ) -> dict[float, float]:
        """The area of each fraction, of the examples `rows`, some of them repeatedly.

        Raises:
          UserError: if the rows have no example of a side; for a fraction outside
            [0, 1].
        """
        times = np.bincount(rows, minlength=len(self.order))[self.order]
        right = np.append(0, np.cumsum(times * self.positive))
        wrong = np.append(0, np.cumsum(times * ~self.positive))
        positives, negatives = int(right[-1]), int(wrong[-1])
        _check_sides(positives, negatives)
        every = right + wrong
        among = every[self.last] - every[self.first]
        places = np.arange(len(among))
        found = {}
        for fraction in fractions:
            asked = _asked(positives + negatives, fraction)
            # The last bin of which the oracle is asked a part, or all.
            step = np.minimum((among <= asked).sum(axis=1), _CERTAINTY_BINS)
            before = among[places, step - 1]
            part = (asked - before) / np.maximum(among[places, step] - before, 1)
            part = np.minimum(part, 1.0)
            ends = [
                (1 - part) * side[places, step - 1] + part * side[places, step]
                for side in (right[self.first], wrong[self.last])
            ]
            hits = positives - ends[0]
            false = negatives - ends[1]
            true = np.concatenate([[0.0], hits[::-1] / positives, [1.0]])
            false = np.concatenate([[0.0], false[::-1] / negatives, [1.0]])
            found[fraction] = float(np.trapezoid(true, false))
        return found


def small_margins(
    probabilities: Float[np.ndarray, "examples classes"],
) -> Float[np.ndarray, " examples"]:
    """1 - (largest - second probability), in [0, 1]: of two classes alike it is 1.

    A score of active learning, beside `class_probabilities.entropies`,
    `out_of_distribution.improbabilities` and `improbable_densities`, and `chances`.
    """
    probabilities = class_probabilities.checked(probabilities)
    if probabilities.shape[1] < 2:
        raise UserError("a margin needs two classes, but there is one.")
    best = np.partition(probabilities, -2, axis=1)[:, -2:]
    return 1.0 - (best[:, 1] - best[:, 0])


def chances(examples: int, seed: int) -> Float[np.ndarray, " examples"]:
    """Random scores in [0, 1), the same for a seed: what others have to beat."""
    return np.random.default_rng(seed).random(examples)


def chosen(
    scores: Float[np.ndarray, " pool"], count: int, labelled: Bool[np.ndarray, " pool"]
) -> Int[np.ndarray, " chosen"]:
    """Which `count` examples to label next: the highest scores without a label yet.

    Of equal scores the first come first.

    Raises:
      UserError: if fewer are left.
    """
    scores = class_probabilities.checked_scores(scores, "scores")
    left = int(np.sum(~labelled))
    if not 0 <= count <= left:
        raise UserError(
            f"{count} examples are to be chosen, but {left} of {len(scores)} have no "
            "label yet; choose fewer."
        )
    order = np.argsort(-scores, kind="stable")
    return order[~labelled[order]][:count]


# How a metric becomes a part of the score of Plex: in [0, 1], higher is better.
NORMALISED: Mapping[str, Callable[[float, int], float]] = {
    **dict.fromkeys(
        (
            "accuracy",
            "auroc",
            "average_precision",
            "calibration_auc",
            "collaborative_accuracy",
            "collaborative_auc",
            "few_shot_accuracy",
        ),
        lambda value, classes: value,
    ),
    **dict.fromkeys(("ece", "fpr95"), lambda value, classes: 1.0 - value),
    "brier": lambda value, classes: 1.0 - value / 2.0,
    "nll": lambda value, classes: 1.0 - value / float(np.log(classes)),
}


def reliability_scores(
    results: Mapping[str, Mapping[str, tuple[float, int]]],
) -> dict[str, float]:
    """The mean normalised metric of each category, and `score`, the mean of these.

    results: for each category (Plex: prediction, uncertainty, adaptation; Tran et al.
      2022) name -> (value, number of classes). A name is one of
      `NORMALISED`, or such with a data set before it: "imagenet/nll".

    The likelihood is divided by that of uniform guesses, log(classes), and is below 0
    if it is worse than these: nothing is cropped.

    Raises:
      UserError: for an empty category, an unknown name, a value that is not finite.
    """
    means = {}
    for category, metrics in results.items():
        parts = []
        for name, (value, classes) in metrics.items():
            kind = name.rpartition("/")[2]
            if kind not in NORMALISED or not np.isfinite(value) or classes < 2:
                raise UserError(
                    f"{category}: {name!r} of {classes} classes with the value {value} "
                    "cannot be normalised. Give finite values, two classes or more, "
                    f"and the metrics {', '.join(sorted(NORMALISED))}."
                )
            parts.append(NORMALISED[kind](value, classes))
        if not parts:
            raise UserError(f"{category} has no metric; leave it out or measure one.")
        means[category] = float(np.mean(parts))
    if not means:
        raise UserError("there is no category to take a score of.")
    return {**means, "score": float(np.mean(list(means.values())))}


def _hits_among_surest(confidence, correct):
    """Right answers among the 0, 1, ..., n most confident; shares of equal ones."""
    if len(confidence) != len(correct):
        raise UserError(
            f"{len(confidence)} confidences stand beside {len(correct)} answers; give "
            "one of each for every example."
        )
    confidence = class_probabilities.checked_scores(confidence, "confidences")
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) + 1
    hits = np.cumsum(correct[order])[ends - 1]
    places = np.arange(len(ranked) + 1)
    return np.interp(places, np.append(0, ends), np.append(0, hits))


def _asked(count, fraction):
    if not 0 <= fraction <= 1:
        raise UserError(
            f"the oracle answers a fraction in [0, 1], but {fraction} was given."
        )
    # 0.29 * 100 is a little less than 29.
    return int(count * fraction + 1e-9)


def _corrected(certainty, asked):
    """Of each example the share that the oracle answers; together `asked`."""
    bins = _bins(certainty)
    count = np.bincount(bins, minlength=_CERTAINTY_BINS)
    before = np.cumsum(count) - count
    shares = np.clip((asked - before) / np.maximum(count, 1), 0.0, 1.0)
    return shares[bins]


def _bins(certainty):
    return np.minimum((certainty * _CERTAINTY_BINS).astype(int), _CERTAINTY_BINS - 1)


def _sides(positive):
    """How many examples are positive and negative."""
    positives = int(np.sum(positive))
    _check_sides(positives, len(positive) - positives)
    return positives, len(positive) - positives


def _check_sides(positives, negatives):
    if not positives or not negatives:
        raise UserError(
            f"{positives} of {positives + negatives} examples are positive; a ranking "
            "needs examples of both sides."
        )
