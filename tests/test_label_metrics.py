"""Metrics of classification against their definitions, counted by hand."""

import numpy as np
import pytest

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import label_metrics


def by_definition(scores, relevant):
    """(recall - recall before) * precision, a threshold at every different score."""
    total, before, result = sum(relevant), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [r for s, r in zip(scores, relevant, strict=True) if s >= threshold]
        recall = sum(taken) / total
        result += (recall - before) * sum(taken) / len(taken)
        before = recall
    return result


def test_average_precision_is_the_sum_over_thresholds():
    # The example in scikit-learn's documentation of average_precision_score.
    scores = np.array([[0.1], [0.4], [0.35], [0.8]])
    relevant = np.array([[0], [0], [1], [1]], bool)
    found = label_metrics.average_precisions(scores, relevant)
    np.testing.assert_allclose(found, [0.8333333], rtol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(20):
        # Few different scores: ties within and between labels.
        scores = rng.integers(0, 5, (30, 4)).astype(np.float64)
        relevant = rng.random((30, 4)) < 0.2
        relevant[0] = True
        expected = [by_definition(*c) for c in zip(scores.T, relevant.T, strict=True)]
        found = label_metrics.average_precisions(scores, relevant)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


AUX = {
    "top_classes": [[1, 0, 2, 3, 4], [2, 1, 0, 3, 4], [5, 1, 0, 3, 4], [0, 1, 2, 3, 4]],
    "all_scores": np.array(
        [
            [0.2, 0.9, 0.1, 0, 0, 0],
            [0.1, 0.3, 0.8, 0, 0, 0],
            [0.5, 0.6, 0.1, 0, 0, 0.7],
            [0.9, 0.1, 0.0, 0, 0, 0],
        ]
    ),
}
TARGETS, PREDICTIONS = [[1], [0, 1], [2], []], [1, 2, 5, 0]


def test_hits_are_counted_over_labelled_images_alone():
    found = label_metrics.single_label(TARGETS, PREDICTIONS, AUX)
    assert found == {
        "accuracy": pytest.approx(1 / 3),
        "accuracy_top_5": pytest.approx(2 / 3),
        "unlabelled": 1.0,
    }
    few = {"top_classes": [[1, 0], [0, 1]]}
    assert label_metrics.single_label([[1], [1]], [1, 0], few) == {"accuracy": 0.5}


def test_mean_average_precision_is_over_the_classes_that_images_have():
    found = label_metrics.multi_label(TARGETS, PREDICTIONS, AUX)
    # Class 0: rank 3 of 3; class 1: ranks 1 and 3; class 2: equal scores, 2 and 3 of 3.
    expected = np.mean([1 / 3, (1 + 2 / 3) / 2, 1 / 3])
    assert found["mean_average_precision"] == pytest.approx(expected)
    assert (found["classes_with_images"], found["unlabelled"]) == (3.0, 1.0)


@pytest.mark.parametrize(
    "targets, aux, message",
    [
        (TARGETS, {"top_classes": AUX["top_classes"]}, "all_scores = True"),
        ([[1], [0], [6], []], AUX, r"image 2 has the label ids \[6\]"),
        ([[], [], [], []], AUX, "no image has a label"),
        (TARGETS, AUX | {"all_scores": AUX["all_scores"] * np.nan}, "not finite"),
        (TARGETS, AUX | {"all_scores": ["a"] * 4}, "not as many numbers"),
        (TARGETS, {"all_scores": AUX["all_scores"]}, "no `top_classes`"),
    ],
)
def test_what_cannot_be_scored_is_said(targets, aux, message):
    with pytest.raises(UserError, match=message):
        label_metrics.multi_label(targets, PREDICTIONS, aux)
