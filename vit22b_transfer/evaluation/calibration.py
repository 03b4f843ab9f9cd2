"""Calibration: whether a model that is 80 % sure is right in 80 % of the cases.

Confidence is the largest probability, correctness whether that class is the label
(`class_probabilities.answers`). Sums over bins leave empty bins out.
"""

from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Bool, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import class_probabilities

BINS = 15
# Doublings of the inverse temperature in search of a slope of the other sign.
_MOST_DOUBLINGS = 200


class Reliability(NamedTuple):
    """The data of a reliability diagram (Guo et al. 2017, figure 1), a row per bin.

    A bin is [lower, upper), the last one with its upper edge. Mean confidence and
    accuracy, both in [0, 1], are NaN in bins without examples.
    """

    lower: Float[np.ndarray, " bins"]
    upper: Float[np.ndarray, " bins"]
    count: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]


def equal_width_bins(
    confidence: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
    bins: int = BINS,
) -> Reliability:
    """Bins of width 1 / `bins` over [0, 1], as in Plex (Tran et al. 2022).

    An edge belongs to the bin above it, and 1 to the last; Guo et al. give it to the
    bin below. The edges are k / `bins` in float64.

    Raises:
      UserError: without examples, or if a confidence is outside [0, 1].
    """
    confidence = _checked_confidence(confidence, correct, bins)
    edges = np.arange(bins + 1) / bins
    places = np.searchsorted(edges[1:-1], confidence, side="right")
    return _reliability(confidence, correct, places, edges)


def equal_mass_bins(
    confidence: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
    bins: int = BINS,
) -> Reliability:
    """Bins of equally many examples (adaptive bins: Nguyen & O'Connor 2015).

    Of n examples in the order of confidence the first n % `bins` bins take one more.
    Equal confidences are one bin, the one where the last of them would fall, so that
    the order of examples does not matter; bins may then be empty. The published code
    of Plex rounds places of even distance: its bins may differ by one example.

    Raises:
      UserError: as `equal_width_bins`.
    """
    confidence = _checked_confidence(confidence, correct, bins)
    ranked = np.sort(confidence)
    whole, more = divmod(len(ranked), bins)
    # The first rank of each bin but the first.
    starts = np.arange(1, bins) * whole + np.minimum(np.arange(1, bins), more)
    inner = np.append(ranked, ranked[-1])[starts]
    # With fewer examples than bins the last ones start behind the last example.
    inner[starts >= len(ranked)] = np.inf
    places = np.searchsorted(inner, confidence, side="right")
    edges = np.concatenate([[0.0], np.minimum(inner, 1.0), [1.0]])
    return _reliability(confidence, correct, places, edges)


def expected_error(bins: Reliability) -> float:
    """Expected calibration error in [0, 1]: the mean over examples of their bin's gap.

    The gap is |accuracy - mean confidence| (Guo et al. 2017, eq. 3).
    """
    gaps, shares = _gaps(bins)
    return float(np.sum(shares * gaps))


def chance_errors(
    confidence: Float[np.ndarray, " examples"],
    bins: int = BINS,
    draws: int = 1_000,
    seed: int = 0,
) -> Float[np.ndarray, " draws"]:
    """`expected_error` of answers that are right as often as they are sure.

    Consistency resampling (Broecker & Smith 2007): each draw has the confidences given,
    every answer right with its confidence for a chance. Such a head has no calibration
    error, and what is measured of it is what a split of this size has by chance.

    Raises:
      UserError: as `equal_width_bins`.
    """
    rng = np.random.default_rng(seed)
    found = [
        equal_width_bins(confidence, rng.random(len(confidence)) < confidence, bins)
        for _ in range(draws)
    ]
    return np.array([expected_error(one) for one in found])


def root_mean_square_error(bins: Reliability) -> float:
    """The root of the mean over examples of their bin's squared gap, in [0, 1].

    Nguyen & O'Connor 2015; with equal-mass bins the "RMS calibration error" of
    Hendrycks et al. 2019. Every bin counts, the last one too.
    """
    gaps, shares = _gaps(bins)
    return float(np.sqrt(np.sum(shares * gaps**2)))


def negative_log_likelihood(
    log_probabilities: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
) -> float:
    """Mean of -log p(label) in nats; infinite if a label has the probability 0.

    log_probabilities: `class_probabilities.log_softmax` of the logits.
    """
    logs = _checked_logs(log_probabilities)
    labels = class_probabilities.checked_labels(labels, *logs.shape)
    return -float(np.mean(logs[np.arange(len(labels)), labels]))


def cross_entropy(
    log_probabilities: Float[np.ndarray, "examples classes"],
    targets: Float[np.ndarray, "examples classes"],
) -> float:
    """Mean over examples of -sum of target * log p, in nats: the loss of soft labels.

    targets: distributions over the classes, such as how many people chose each.

    Raises:
      UserError: if a row of targets or of exp(log_probabilities) is no distribution,
        or the two differ in shape.
    """
    targets = class_probabilities.checked(targets)
    logs = _checked_logs(log_probabilities)
    if targets.shape != logs.shape:
        raise UserError(
            f"targets have the shape {targets.shape}, predictions {logs.shape}; they "
            "must be equal."
        )
    # A class that nobody chose costs nothing, even where its probability is 0.
    losses = -targets * np.where(targets > 0, logs, 0.0)
    return float(np.mean(np.sum(losses, axis=1)))


def brier_score(
    probabilities: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
) -> float:
    """Mean over examples of the sum over classes of (p - one-hot)^2, in [0, 2].

    Brier 1950; some divide by the number of classes, this does not.
    """
    probabilities = class_probabilities.checked(probabilities)
    labels = class_probabilities.checked_labels(labels, *probabilities.shape)
    errors = probabilities.copy()
    errors[np.arange(len(labels)), labels] -= 1
    return float(np.mean(np.sum(errors**2, axis=1)))


def metrics(
    logits: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
    bins: int = BINS,
) -> dict[str, float]:
    """`accuracy`, `ece`, `ece_equal_mass`, `rms_calibration_error`, `nll`, `brier`.

    `rms_calibration_error` is over bins of equal mass. All but `nll` (nats) and
    `brier` (up to 2) are in [0, 1].
    """
    probabilities = class_probabilities.softmax(logits)
    confidence, correct = class_probabilities.answers(probabilities, labels)
    mass = equal_mass_bins(confidence, correct, bins)
    logs = class_probabilities.log_softmax(logits)
    return {
        "accuracy": float(np.mean(correct)),
        "ece": expected_error(equal_width_bins(confidence, correct, bins)),
        "ece_equal_mass": expected_error(mass),
        "rms_calibration_error": root_mean_square_error(mass),
        "nll": negative_log_likelihood(logs, labels),
        "brier": brier_score(probabilities, labels),
    }


def fitted_temperature(
    logits: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
) -> float:
    """The T > 0 with the least negative log likelihood of softmax(logits / T).

    Guo et al. 2017, section 4.2. The likelihood is convex in 1 / T, whose slope is
    solved for zero to a relative 1e-12: no learning rate, no number of steps.

    Raises:
      UserError: if no T is best: every label has the largest logit (the likelihood
        rises for ever as T falls to 0), or the logits are no better than chance (as T
        grows). Fit on other examples then.
    """
    logits = class_probabilities.checked_scores(logits, "logits")
    labels = class_probabilities.checked_labels(labels, *logits.shape)
    logits = logits - logits.max(axis=1, keepdims=True)
    own = logits[np.arange(len(labels)), labels]

    def slope(log_inverse):
        shares = scipy.special.softmax(np.exp(log_inverse) * logits, axis=1)
        return np.mean(np.sum(shares * logits, axis=1) - own)

    if np.mean(np.mean(logits, axis=1) - own) >= 0:
        raise UserError(
            f"no temperature is best for these {len(labels)} examples: the logits of "
            "their labels are no higher than those of other classes. Check that labels "
            "and logits have one order of classes and examples."
        )
    if not np.any(own < 0):
        raise UserError(
            f"no temperature is best for these {len(labels)} examples: each label has "
            "the largest logit, so that ever lower ones are better. Fit on held-out "
            "examples, and on more of them."
        )
    # The sides of the root, from where the logits are of the size of 1.
    low = high = -np.log(-logits.min())
    for _ in range(_MOST_DOUBLINGS):
        if slope(low) < 0:
            break
        low -= np.log(2)
    for _ in range(_MOST_DOUBLINGS):
        if slope(high) > 0:
            break
        high += np.log(2)
    found = scipy.optimize.root_scalar(
        slope, bracket=(low, high), method="brentq", xtol=1e-12
    )
    return float(np.exp(-found.root))


def scaled_metrics(
    logits: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
    *,
    fit_share: float = 0.2,
    bins: int = BINS,
) -> dict[str, float]:
    """`metrics` of the later examples, before and `scaled/` by a fitted temperature.

    The temperature is fitted on the first `fit_share` of the examples, in the order
    given, and everything is measured on the rest: on ImageNet the first 20 % of the
    validation images. Also told: `temperature`, `fitted_on`, `measured_on`.

    Raises:
      UserError: if a part would be empty; as `fitted_temperature`.
    """
    if len(logits) != len(labels):
        raise UserError(
            f"{len(logits)} predictions have {len(labels)} labels; give each one."
        )
    cut = fitted_on(len(labels), fit_share)
    temperature = fitted_temperature(logits[:cut], labels[:cut])
    rest, right = np.asarray(logits[cut:], np.float64), labels[cut:]
    scaled = metrics(rest / temperature, right, bins)
    return {
        **metrics(rest, right, bins),
        **{f"scaled/{name}": value for name, value in scaled.items()},
        "temperature": temperature,
        "fitted_on": float(cut),
        "measured_on": float(len(labels) - cut),
    }


def fitted_on(examples: int, fit_share: float) -> int:
    """How many examples a temperature is fitted on, the first ones.

    Raises:
      UserError: if they, or those that are left, are none.
    """
    cut = int(examples * fit_share)
    if not 0 < cut < examples:
        raise UserError(
            f"a share of {fit_share} of {examples} examples leaves a part without any; "
            "choose one between 0 and 1, or more examples."
        )
    return cut


def _checked_logs(log_probabilities):
    logs = np.asarray(log_probabilities, np.float64)
    if not logs.size:
        raise UserError("there are no predictions; choose a split with examples.")
    bad = ~(np.abs(scipy.special.logsumexp(logs, axis=1)) <= 1e-3)
    if bad.any():
        raise UserError(
            f"{np.sum(bad)} of {len(logs)} rows, first row {np.argmax(bad)}, are no "
            "logarithms of probabilities that sum to 1. Take the log_softmax of the "
            "logits in float32."
        )
    return logs


def _checked_confidence(confidence, correct, bins):
    if bins < 1:
        raise UserError(f"{bins} bins hold nothing; choose 1 or more.")
    if len(confidence) != len(correct):
        raise UserError(
            f"{len(confidence)} confidences stand beside {len(correct)} answers; give "
            "one of each for every example."
        )
    return class_probabilities.checked_unit(confidence, "confidences")


def _reliability(confidence, correct, places, edges):
    bins = len(edges) - 1
    count = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            edges[:-1],
            edges[1:],
            count,
            np.bincount(places, confidence, bins) / count,
            np.bincount(places, correct, bins) / count,
        )


def _gaps(bins):
    used = bins.count > 0
    gaps = np.abs(bins.accuracy - bins.confidence)[used]
    return gaps, bins.count[used] / bins.count.sum()
