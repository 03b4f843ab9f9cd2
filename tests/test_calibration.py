"""Calibration against its definitions, scikit-learn, and figures known before."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics
from handwritten_digits import logits_and_labels

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import calibration, class_probabilities


def test_metrics_of_digits_are_those_known_before():
    found = calibration.metrics(*logits_and_labels())
    expected = {
        "accuracy": 0.932246,
        "ece": 0.0656395,
        "ece_equal_mass": 0.0606588,
        "nll": 0.283388,
        "brier": 0.114868,
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected, abs=2e-6)
    logits, labels = logits_and_labels()
    shares = scipy.special.softmax(logits, axis=1)
    assert found["nll"] == pytest.approx(sklearn.metrics.log_loss(labels, shares))
    brier = np.mean(np.sum((shares - np.eye(10)[labels]) ** 2, axis=1))
    assert found["brier"] == pytest.approx(brier)


def by_loops(confidence, correct, groups):
    """Expected and root mean square error over groups of examples."""
    gaps = [abs(np.mean(correct[g]) - np.mean(confidence[g])) for g in groups if len(g)]
    shares = [len(g) / len(confidence) for g in groups if len(g)]
    return np.dot(shares, gaps), np.sqrt(np.dot(shares, np.square(gaps)))


def test_bins_and_errors_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    for count in (7, 45, 200):
        confidence = rng.uniform(0.2, 1, count)
        correct = rng.random(count) < confidence**2
        order = np.argsort(confidence)
        lower = [k / 15 for k in range(15)]
        wide = [
            np.flatnonzero((confidence >= k) & (confidence < k + 1 / 15)) for k in lower
        ]
        for bins, groups in (
            (calibration.equal_width_bins(confidence, correct), wide),
            (
                calibration.equal_mass_bins(confidence, correct),
                np.array_split(order, 15),
            ),
        ):
            np.testing.assert_array_equal(bins.count, [len(g) for g in groups])
            found = (
                calibration.expected_error(bins),
                calibration.root_mean_square_error(bins),
            )
            assert found == pytest.approx(by_loops(confidence, correct, groups))


def test_edges_belong_to_the_bin_above_and_one_to_the_last():
    confidence = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    correct = np.array([False, True, True, False, True, True])
    found = calibration.equal_width_bins(confidence, correct, 5)
    np.testing.assert_array_equal(found.count, [1, 1, 1, 1, 2])
    np.testing.assert_allclose(found.upper, [0.2, 0.4, 0.6, 0.8, 1])
    assert found.confidence[4] == pytest.approx(0.9)
    empty = calibration.equal_width_bins(confidence[:2], correct[:2], 5)
    assert np.isnan(empty.accuracy[2:]).all() and empty.count[2:].sum() == 0
    # 0.2 from a right answer of confidence 0.2 and 0 from a wrong one of 0.
    assert calibration.expected_error(empty) == pytest.approx(0.4)


def test_equally_sure_examples_are_one_bin_in_any_order():
    rng = np.random.default_rng(1)
    confidence = rng.choice([0.3, 0.5, 0.9, 1.0], 100, p=[0.1, 0.2, 0.3, 0.4])
    correct = rng.random(100) < 0.6
    first = calibration.equal_mass_bins(confidence, correct, 10)
    order = rng.permutation(100)
    again = calibration.equal_mass_bins(confidence[order], correct[order], 10)
    np.testing.assert_array_equal(first.count, again.count)
    np.testing.assert_allclose(first.accuracy, again.accuracy)
    assert sorted(first.count[first.count > 0]) == sorted(
        np.unique(confidence, return_counts=True)[1]
    )


def test_soft_labels_have_the_cross_entropy_of_scipy():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(20, 4)) * 3
    targets = rng.dirichlet(np.ones(4), 20)
    targets[0] = [1, 0, 0, 0]
    logs = class_probabilities.log_softmax(logits)
    logs[0] = [0, -np.inf, -np.inf, -np.inf]
    divergence = scipy.stats.entropy(targets, np.exp(logs), axis=1)
    expected = np.mean(divergence + scipy.stats.entropy(targets, axis=1))
    assert calibration.cross_entropy(logs, targets) == pytest.approx(expected)


def test_the_temperature_is_where_the_likelihood_is_greatest():
    logits, labels = logits_and_labels()
    found = calibration.fitted_temperature(logits, labels)

    def loss(log):
        logs = scipy.special.log_softmax(logits * np.exp(-log), axis=1)
        return -np.mean(logs[np.arange(len(labels)), labels])

    best = scipy.optimize.minimize_scalar(loss, (-2, 2), tol=1e-10).x
    assert np.log(found) == pytest.approx(best, abs=1e-6)
    # A temperature of the logits is found back, however large.
    for scale in (1e-4, 1.0, 1e5):
        again = calibration.fitted_temperature(logits * scale, labels)
        assert again == pytest.approx(found * scale, rel=1e-10)


def test_what_is_scaled_is_measured_on_other_examples():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2000, 4)) * 2
    shares = scipy.special.softmax(logits, axis=1)
    labels = (shares.cumsum(axis=1) < rng.random((2000, 1))).sum(axis=1)
    # Three times too sure.
    found = calibration.scaled_metrics(3 * logits, labels)
    assert (found["fitted_on"], found["measured_on"]) == (400, 1600)
    fitted = calibration.fitted_temperature(3 * logits[:400], labels[:400])
    assert found["temperature"] == fitted == pytest.approx(3, rel=0.15)
    after = calibration.metrics(3 * logits[400:] / fitted, labels[400:])
    before = calibration.metrics(3 * logits[400:], labels[400:])
    assert {k: found[f"scaled/{k}"] for k in after} == pytest.approx(after)
    assert {k: found[k] for k in before} == pytest.approx(before)
    assert after["accuracy"] == before["accuracy"]
    assert after["ece"] < 0.04 < 0.1 < before["ece"]


CONFIDENCE, CORRECT = np.array([0.5, 0.7]), np.array([True, False])
THIRDS, ONES = np.full((2, 3), 1 / 3), np.ones((2, 3))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: calibration.equal_width_bins(CONFIDENCE * 2, CORRECT),
            r"outside \[0, 1\], such as 1.4",
        ),
        (
            lambda: calibration.equal_mass_bins(CONFIDENCE[:0], CORRECT[:0]),
            "no confidences",
        ),
        (lambda: calibration.equal_mass_bins(CONFIDENCE, CORRECT, 0), "0 bins"),
        (
            lambda: class_probabilities.answers(ONES, np.array([0, 1])),
            "2 of 2 rows .* sums to 3",
        ),
        (
            lambda: class_probabilities.answers(THIRDS, np.array([0, -1])),
            "example 1 has -1, but classes are 0 to 2",
        ),
        (
            lambda: class_probabilities.checked_labels(np.array([0]), 2, 3),
            "2 predictions have 1 labels",
        ),
        (
            lambda: calibration.metrics(THIRDS * np.nan, np.array([0, 1])),
            "6 of 6 logits are not finite",
        ),
        (
            lambda: calibration.negative_log_likelihood(THIRDS, np.array([0, 1])),
            "no logarithms",
        ),
        (
            lambda: calibration.fitted_temperature(np.eye(3), np.arange(3)),
            "each label has the largest logit",
        ),
        (
            lambda: calibration.fitted_temperature(-np.eye(3), np.arange(3)),
            "no higher than those of other classes",
        ),
        (
            lambda: calibration.scaled_metrics(np.eye(3), np.arange(3)),
            "a part without any",
        ),
    ],
)
def test_what_cannot_be_measured_is_said(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_head_without_any_error_has_one_by_chance():
    # One bin, four answers that are sure by half: the error is |hits / 4 - 1 / 2|.
    drawn = calibration.chance_errors(np.full(4, 0.5), 1, 2_000)
    shares = [np.mean(np.isclose(drawn, error)) for error in (0, 0.25, 0.5)]
    np.testing.assert_allclose(shares, [6 / 16, 8 / 16, 2 / 16], atol=0.04)
    sure = np.random.default_rng(1).uniform(0.5, 1, 4_000)
    assert calibration.chance_errors(sure, draws=5).max() < 0.05
