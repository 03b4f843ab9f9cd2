"""Finding examples of no known class: scores of strangeness, and how well they rank.

Every score is higher for the stranger example, which is the positive class of all
rankings (the convention of Plex, Tran et al. 2022). A split of known classes beside one
of other classes is open-set recognition, beside another data set it is detection of
what is out of distribution; the measures are the same.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.stats
from jaxtyping import Bool, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import class_probabilities, label_metrics

# Examples whose distances to all classes are in memory at a time.
_AT_A_TIME = 4096


class Gaussians(NamedTuple):
    """A Gaussian for each class, all with one covariance, and one for all examples.

    The `roots` are upper triangular matrices whose product with a difference of
    features has the distance as its squared length: inverse Cholesky factors.
    """

    means: Float[np.ndarray, "classes embed"]
    root: Float[np.ndarray, "embed embed"]
    overall_mean: Float[np.ndarray, " embed"]
    overall_root: Float[np.ndarray, "embed embed"]


def improbabilities(
    probabilities: Float[np.ndarray, "examples classes"],
) -> Float[np.ndarray, " examples"]:
    """1 - the largest probability, in [0, 1): MSP of Hendrycks & Gimpel 2017."""
    return 1.0 - class_probabilities.checked(probabilities).max(axis=1)


def negative_max_logits(
    logits: Float[np.ndarray, "examples classes"],
) -> Float[np.ndarray, " examples"]:
    """Minus the largest logit: max logit of Hendrycks et al. 2022."""
    return -class_probabilities.checked_scores(logits, "logits").max(axis=1)


def fitted_gaussians(
    features: Float[np.ndarray, "examples embed"],
    labels: Int[np.ndarray, " examples"],
    classes: int,
    *,
    ridge: float = 0.0,
) -> Gaussians:
    """Class means and covariances of training examples (Lee et al. 2018, eq. 1).

    Covariances are divided by the number of examples. `ridge` times their mean
    variance is added to the diagonal.

    Raises:
      UserError: if a class has no example; or if a covariance is singular, as with
        fewer examples than features: distances along a direction without variance are
        infinite.
    """
    features = class_probabilities.checked_scores(features, "features")
    class_probabilities.checked_labels(labels, len(features), classes)
    count = np.bincount(labels, minlength=classes)
    if not count.all():
        raise UserError(
            f"{np.sum(count == 0)} of {classes} classes have no example, the first is "
            f"class {np.argmin(count)}; fit on examples of all of them."
        )
    means = np.zeros((classes, features.shape[1]))
    np.add.at(means, labels, features)
    means /= count[:, None]
    overall = features.mean(axis=0)
    return Gaussians(
        means,
        _inverse_root(features - means[labels], ridge),
        overall,
        _inverse_root(features - overall, ridge),
    )


def mahalanobis_distances(
    features: Float[np.ndarray, "examples embed"], gaussians: Gaussians
) -> Float[np.ndarray, " examples"]:
    """Squared distance to the nearest class mean, at least 0 (Lee et al. 2018, eq. 2).

    There the score is its negative. Distance is in units of the classes' covariance.
    """
    return _over_classes(features, gaussians, np.minimum)


def relative_mahalanobis_distances(
    features: Float[np.ndarray, "examples embed"], gaussians: Gaussians
) -> Float[np.ndarray, " examples"]:
    """`mahalanobis_distances` less the distance to the one Gaussian of all examples.

    Ren et al. 2021: what is unusual for any class, and not just in itself.
    """
    from_all = (features - gaussians.overall_mean) @ gaussians.overall_root
    return mahalanobis_distances(features, gaussians) - np.sum(from_all**2, axis=1)


def improbable_densities(
    features: Float[np.ndarray, "examples embed"], gaussians: Gaussians
) -> Float[np.ndarray, " examples"]:
    """-log of the sum over classes of exp(-squared distance / 2); may be negative.

    The density score of Plex's active learning, up to a constant: what is in no
    dense place is labelled first.
    """

    def joined(first, second):
        return -np.logaddexp(-first, -second)

    return _over_classes(features, gaussians, joined, scale=0.5)


def area_under_roc(
    scores: Float[np.ndarray, " examples"], positive: Bool[np.ndarray, " examples"]
) -> float:
    """The chance that a positive example scores above a negative one, in [0, 1].

    Equal scores count half. It is scikit-learn's `roc_auc_score`.

    Raises:
      UserError: if a score is not finite, or there is no example of a side.
    """
    scores, positives, negatives = _checked_sides(scores, positive)
    ranks = scipy.stats.rankdata(scores)[positive].sum()
    above = ranks - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def false_positive_rate(
    scores: Float[np.ndarray, " examples"],
    positive: Bool[np.ndarray, " examples"],
    recall: float = 0.95,
) -> float:
    """Share of negatives at or above the highest threshold that finds enough positives.

    That is the first point of the ROC curve whose recall is at least `recall`; there
    is no interpolation between points.

    Raises:
      UserError: as `area_under_roc`.
    """
    scores, positives, negatives = _checked_sides(scores, positive)
    order = np.argsort(-scores, kind="stable")
    ranked, found = scores[order], np.cumsum(positive[order])
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    first = ends[np.argmax(found[ends] / positives >= recall)]
    return float((first + 1 - found[first]) / negatives)


def detection(
    known: Float[np.ndarray, " inside"], strange: Float[np.ndarray, " outside"]
) -> dict[str, float]:
    """`auroc`, `average_precision` and `fpr95` of telling strange examples from known.

    known, strange: scores of the two splits, higher for what is stranger. Average
    precision depends on how many of each there are.
    """
    scores = np.concatenate([known, strange]).astype(np.float64)
    positive = np.arange(len(scores)) >= len(known)
    auroc = area_under_roc(scores, positive)
    precision = label_metrics.average_precisions(scores[:, None], positive[:, None])
    return {
        "auroc": auroc,
        "average_precision": float(precision[0]),
        "fpr95": false_positive_rate(scores, positive),
    }


def _over_classes(features, gaussians, joined, scale=1.0):
    """The scaled squared distances to all class means, two at a time made one."""
    features = class_probabilities.checked_scores(features, "features")
    means = gaussians.means @ gaussians.root
    result = np.full(len(features), np.inf)
    for start in range(0, len(features), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        points = features[part] @ gaussians.root
        # One class after another: exact differences, and the memory of one.
        for mean in means:
            distances = scale * np.sum((points - mean) ** 2, axis=1)
            result[part] = joined(result[part], distances)
    return result


def _checked_sides(scores, positive):
    if len(scores) != len(positive):
        raise UserError(
            f"{len(scores)} scores stand beside {len(positive)} marks of positive "
            "examples; give one of each for every example."
        )
    scores = class_probabilities.checked_scores(scores, "scores")
    positives = int(np.sum(positive))
    if not 0 < positives < len(scores):
        raise UserError(
            f"{positives} of {len(scores)} examples are positive; a ranking needs "
            "examples of both sides."
        )
    return scores, positives, len(scores) - positives


def _inverse_root(differences, ridge):
    """U, upper triangular, with U U^T the inverse covariance."""
    size = differences.shape[1]
    covariance = differences.T @ differences / len(differences)
    covariance[np.diag_indices(size)] += ridge * np.trace(covariance) / size
    spread = np.linalg.eigvalsh(covariance)
    if spread[0] <= spread[-1] * size * np.finfo(np.float64).eps:
        raise UserError(
            f"the covariance of {len(differences)} examples with {size} features is "
            "singular: give more examples than features, leave out features that do "
            "not vary, or set ridge, such as 1e-3."
        )
    lower = np.linalg.cholesky(covariance)
    return scipy.linalg.solve_triangular(lower, np.eye(size), lower=True).T
