"""Scores of strangeness and their rankings: scikit-learn, scipy, figures known."""

import numpy as np
import pytest
import scipy.spatial.distance
import sklearn.metrics
from handwritten_digits import logits_and_labels

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import class_probabilities, out_of_distribution


def test_unknown_digits_are_found_as_known_before():
    logits, labels = logits_and_labels(known=8)
    strange = labels >= 8
    shares = class_probabilities.softmax(logits)
    expected = {
        "improbabilities": (0.931260, 0.708934, 0.212500),
        "entropies": (0.934684, 0.707982, 0.190625),
        "negative_max_logits": (0.942446, 0.737719, 0.157812),
    }
    found = {
        "improbabilities": out_of_distribution.improbabilities(shares),
        "entropies": class_probabilities.entropies(shares),
        "negative_max_logits": out_of_distribution.negative_max_logits(logits),
    }
    for name, scores in found.items():
        result = out_of_distribution.detection(scores[~strange], scores[strange])
        assert list(result) == ["auroc", "average_precision", "fpr95"]
        assert tuple(result.values()) == pytest.approx(expected[name], abs=1e-6), name


def test_entropy_is_in_nats():
    shares = np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]])
    found = class_probabilities.entropies(shares)
    np.testing.assert_allclose(found, np.log([4, 1, 2]))


def test_rankings_with_equal_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    for levels in (3, 10, 1000):
        scores = rng.integers(0, levels, 60).astype(np.float64)
        positive = rng.random(60) < 0.3
        found = out_of_distribution.detection(scores[~positive], scores[positive])
        rates, recalls, _ = sklearn.metrics.roc_curve(
            positive, scores, drop_intermediate=False
        )
        assert found == pytest.approx(
            {
                "auroc": sklearn.metrics.roc_auc_score(positive, scores),
                "average_precision": sklearn.metrics.average_precision_score(
                    positive, scores
                ),
                "fpr95": rates[np.argmax(recalls >= 0.95)],
            }
        )


def test_the_false_positive_rate_is_that_of_the_first_threshold_with_the_recall():
    # 19 of 20 strange examples stand above the known 0.4, a half of those at 0.5.
    scores = np.array([0.9] * 18 + [0.5] + [0.1] + [0.5, 0.4])
    positive = np.arange(22) < 20
    assert out_of_distribution.false_positive_rate(scores, positive) == 0.5
    assert out_of_distribution.false_positive_rate(scores, positive, 0.96) == 1.0
    assert out_of_distribution.false_positive_rate(scores, positive, 0.90) == 0.0


def test_distances_are_those_of_scipy():
    rng = np.random.default_rng(1)
    labels = np.arange(90) % 3
    features = rng.normal(size=(90, 4)) @ rng.normal(size=(4, 4)) + labels[:, None]
    new = rng.normal(size=(5, 4)) * 4
    fitted = out_of_distribution.fitted_gaussians(features, labels, 3)
    means = np.stack([features[labels == k].mean(0) for k in range(3)])
    shared = np.mean([np.cov(features[labels == k].T, ddof=0) for k in range(3)], 0)
    every = np.cov(features.T, ddof=0)
    distance = scipy.spatial.distance.mahalanobis
    inverse = np.linalg.inv(shared)
    nearest = np.array([min(distance(x, m, inverse) ** 2 for m in means) for x in new])
    overall = np.array(
        [distance(x, features.mean(0), np.linalg.inv(every)) ** 2 for x in new]
    )
    found = out_of_distribution.mahalanobis_distances(new, fitted)
    np.testing.assert_allclose(found, nearest, rtol=1e-9)
    found = out_of_distribution.relative_mahalanobis_distances(new, fitted)
    np.testing.assert_allclose(found, nearest - overall, rtol=1e-9)
    near = new / 10
    found = out_of_distribution.improbable_densities(near, fitted)
    density = [
        sum(np.exp(-(distance(x, m, inverse) ** 2) / 2) for m in means) for x in near
    ]
    np.testing.assert_allclose(found, -np.log(density), rtol=1e-9)


def test_a_singular_covariance_is_refused_unless_a_ridge_is_given():
    labels = np.arange(20) % 2
    # By rounding the smallest variance is a little above 0, or below.
    for seed in range(8):
        features = np.random.default_rng(seed).normal(size=(20, 6))
        features[:, 5] = features[:, 4]
        with pytest.raises(UserError, match="singular"):
            out_of_distribution.fitted_gaussians(features, labels, 2)
    fitted = out_of_distribution.fitted_gaussians(features, labels, 2, ridge=1e-3)
    apart = features[:1] + np.array([0, 0, 0, 0, 1, -1])
    distances = out_of_distribution.mahalanobis_distances(
        np.concatenate([features[:1], apart]), fitted
    )
    assert distances[1] > 100 * distances[0]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: out_of_distribution.area_under_roc(np.ones(3), np.ones(3, bool)),
            "3 of 3 examples are positive",
        ),
        (
            lambda: out_of_distribution.detection(np.ones(2), np.array([np.inf])),
            "1 of 3 scores are not finite",
        ),
        (
            lambda: out_of_distribution.fitted_gaussians(
                np.eye(4), np.array([0, 0, 2, 2]), 3
            ),
            "1 of 3 classes have no example, the first is class 1",
        ),
    ],
)
def test_what_cannot_be_ranked_is_said(call, message):
    with pytest.raises(UserError, match=message):
        call()
