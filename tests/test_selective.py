"""Selective prediction against its definitions, over all orders of equal examples."""

import itertools

import numpy as np
import pytest
import sklearn.metrics

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import selective


def test_measures_are_means_over_the_orders_of_equally_sure_examples():
    confidence = np.array([0.9, 0.9, 0.9, 0.4, 0.4, 0.7])
    correct = np.array([True, False, True, False, True, True])
    orders = [
        order
        for order in itertools.permutations(range(6))
        if list(confidence[list(order)]) == sorted(confidence, reverse=True)
    ]
    assert len(orders) == 12
    curves = [np.cumsum(correct[list(o)]) / np.arange(1, 7) for o in orders]
    curve = np.mean(curves, axis=0)
    found = selective.accuracy_by_coverage(confidence, correct)
    np.testing.assert_allclose(found, curve)
    area = selective.area_under_response_rate_accuracy(confidence, correct)
    assert area == pytest.approx(np.mean(curve))
    for asked, fraction in ((0, 0.1), (1, 0.2), (2, 0.34), (3, 0.5), (6, 1.0)):
        helped = np.mean([correct[list(o)][: 6 - asked].sum() + asked for o in orders])
        result = selective.collaborative_accuracy(confidence, correct, fraction)
        assert result == pytest.approx(helped / 6), fraction


def test_the_whole_part_of_a_fraction_is_asked():
    confidence = np.linspace(0, 1, 100)
    found = selective.collaborative_accuracy(confidence, np.zeros(100, bool), 0.29)
    assert found == 0.29


def test_the_calibration_area_is_that_of_finding_wrong_answers():
    rng = np.random.default_rng(0)
    confidence = rng.integers(0, 9, 80) / 8
    correct = rng.random(80) < confidence
    expected = sklearn.metrics.roc_auc_score(~correct, -confidence)
    assert selective.calibration_auc(confidence, correct) == pytest.approx(expected)


def collaborative_by_loops(scores, positive, asked, certainty=None):
    """Thresholds, bins and expected corrections, one example after another."""
    points = []
    for number in range(200):
        threshold = number / 199
        taken = [float(s > threshold) for s in scores]
        if number == 0:
            taken = [1.0] * len(scores)
        elif number == 199:
            taken = [0.0] * len(scores)
        else:
            bins = {}
            for i, s in enumerate(scores):
                sure = abs(s - threshold) if certainty is None else certainty[i]
                bins.setdefault(min(int(sure * 1000), 999), []).append(i)
            left = asked
            for key in sorted(bins):
                share = min(1.0, left / len(bins[key]))
                left -= share * len(bins[key])
                for i in bins[key]:
                    taken[i] = share * positive[i] + (1 - share) * taken[i]
        true = sum(t for t, p in zip(taken, positive, strict=True) if p)
        false = sum(taken) - true
        points.append((false / sum(~positive), true / sum(positive)))
    return sum(
        (x - next_x) * (y + next_y) / 2
        for (x, y), (next_x, next_y) in itertools.pairwise(points)
    )


@pytest.mark.parametrize("fixed", [False, True])
def test_the_collaborative_area_is_that_of_its_definition(fixed):
    rng = np.random.default_rng(1)
    scores = rng.random(60)
    scores[:6] = scores[6:12]
    scores[12:16] = 100 / 199  # at a threshold, which is above none of them
    positive = rng.random(60) < scores
    positive[12:16] = True, False, True, False
    certainty = np.round(rng.random(60), 1) if fixed else None
    last = 0.0
    for fraction, asked in ((0.0, 0), (0.02, 1), (0.05, 3), (0.2, 12), (1.0, 60)):
        found = selective.collaborative_auc(scores, positive, fraction, certainty)
        expected = collaborative_by_loops(scores, positive, asked, certainty)
        assert found == pytest.approx(expected)
        assert found >= last
        last = found
    assert last == pytest.approx(1.0)
    alone = sklearn.metrics.roc_auc_score(positive, scores)
    found = selective.collaborative_auc(scores, positive, 0.0)
    assert found == pytest.approx(alone, abs=0.01)


def test_what_is_labelled_next_is_what_is_least_sure():
    shares = np.array([[0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.7, 0.2, 0.1], [1, 0, 0]])
    margins = selective.small_margins(shares)
    np.testing.assert_allclose(margins, [1.0, 0.9, 0.5, 0.0])
    labelled = np.array([False, True, False, False])
    np.testing.assert_array_equal(selective.chosen(margins, 2, labelled), [0, 2])
    equal = np.ones(4)
    np.testing.assert_array_equal(selective.chosen(equal, 3, labelled), [0, 2, 3])
    assert np.array_equal(selective.chances(5, 3), selective.chances(5, 3))
    assert not np.array_equal(selective.chances(5, 3), selective.chances(5, 4))


def test_a_reliability_score_is_the_mean_of_normalised_categories():
    found = selective.reliability_scores(
        {
            "prediction": {
                "imagenet/accuracy": (0.8, 1000),
                "imagenet/nll": (np.log(1000) / 4, 1000),
                "brier": (0.3, 1000),
            },
            "uncertainty": {"ece": (0.1, 1000), "auroc": (0.7, 2)},
            "adaptation": {"nll": (2 * np.log(10), 10)},
        }
    )
    expected = {
        "prediction": (0.8 + 0.75 + 0.85) / 3,
        "uncertainty": 0.8,
        "adaptation": -1.0,
        "score": ((0.8 + 0.75 + 0.85) / 3 + 0.8 - 1.0) / 3,
    }
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: selective.collaborative_accuracy(np.ones(1), np.ones(1, bool), 1.5),
            r"fraction in \[0, 1\], but 1.5",
        ),
        (
            lambda: selective.collaborative_auc(np.ones(2), np.ones(2, bool), 0.1),
            "2 of 2 examples are positive",
        ),
        (
            lambda: selective.collaborative_auc(
                np.array([0.5, 2]), np.array([True, False]), 0.1
            ),
            r"1 of 2 scores are outside \[0, 1\], such as 2",
        ),
        (
            lambda: selective.chosen(np.ones(3), 2, np.array([True, True, False])),
            "1 of 3 have no label yet",
        ),
        (
            lambda: selective.reliability_scores({"prediction": {"bleu": (0.5, 2)}}),
            "'bleu' of 2 classes .* cannot be normalised",
        ),
        (lambda: selective.reliability_scores({"prediction": {}}), "has no metric"),
    ],
)
def test_what_cannot_be_measured_is_said(call, message):
    with pytest.raises(UserError, match=message):
        call()
