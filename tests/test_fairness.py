"""Fairness against its definitions, and thresholds against a general solver."""

import numpy as np
import pytest
import scipy.optimize

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import calibration, fairness


def test_parity_is_that_of_the_rates():
    answers = np.array([1, 1, 1, 0, 1, 0, 0, 0], bool)
    groups = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    rates = fairness.positive_rates(answers, groups)
    np.testing.assert_allclose(rates, [0.75, 0.5, 0])
    assert fairness.demographic_parity_difference(rates) == 0.75
    assert fairness.demographic_parity_ratio(rates) == 0.0
    assert fairness.demographic_parity_ratio(rates[:2]) == pytest.approx(2 / 3)
    assert np.isnan(fairness.demographic_parity_ratio(np.zeros(2)))


def drawn(count, seed):
    """Probabilities of two unlike groups, their groups and labels."""
    rng = np.random.default_rng(seed)
    groups = np.append([0, 1], rng.integers(0, 2, count - 2))
    probabilities = rng.beta(2 + 2 * groups, 3)
    return probabilities, groups, rng.random(count) < probabilities


@pytest.mark.parametrize("limit", [0.0, 0.1])
@pytest.mark.parametrize("target", [None, 0.3])
def test_thresholds_solve_the_quadratic_programme(limit, target):
    probabilities, groups, _ = drawn(24, 0)
    ramp = 0.3
    thresholds = fairness.fitted_thresholds(
        probabilities, groups, limit, target_rate=target, ramp=ramp
    )
    found = fairness.randomised_answers(probabilities, groups, thresholds, ramp)
    scores = 2 * probabilities - 1
    rate = probabilities.mean() if target is None else target
    within = [
        scipy.optimize.LinearConstraint(
            (groups == k) / np.sum(groups == k), rate - limit / 2, rate + limit / 2
        )
        for k in (0, 1)
    ]
    best = scipy.optimize.minimize(
        lambda x: ramp / 2 * x @ x - scores @ x,
        np.full(24, rate),
        jac=lambda x: ramp * x - scores,
        bounds=[(0, 1)] * 24,
        constraints=within,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    np.testing.assert_allclose(found, best.x, atol=1e-6)


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.3])
def test_rates_of_the_fitted_examples_keep_the_limit_and_stay_if_they_do(limit):
    for seed in range(5):
        probabilities, groups, _ = drawn(200, seed)
        # Equal scores make steps, and scores at the ends leave no room.
        probabilities = np.round(probabilities, 1)
        thresholds = fairness.fitted_thresholds(probabilities, groups, limit)
        answers = fairness.randomised_answers(probabilities, groups, thresholds)
        rates = fairness.positive_rates(answers, groups)
        assert fairness.demographic_parity_difference(rates) <= limit + 1e-12
        plain = np.clip((2 * probabilities - 1) / fairness.RAMP, 0, 1)
        plain = fairness.positive_rates(plain, groups)
        kept = np.abs(plain - probabilities.mean()) <= limit / 2
        np.testing.assert_array_equal(thresholds == 0, kept)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_all_or_none_can_be_asked_for(rate):
    probabilities, groups, _ = drawn(50, 1)
    thresholds = fairness.fitted_thresholds(
        probabilities, groups, 0.0, target_rate=rate
    )
    answers = fairness.randomised_answers(probabilities, groups, thresholds)
    np.testing.assert_allclose(answers, rate, atol=1e-12)


def test_a_sweep_trades_accuracy_for_parity():
    probabilities, groups, labels = drawn(2000, 2)
    fit = (probabilities[:1000], groups[:1000])
    test = (probabilities[1000:], groups[1000:], labels[1000:])
    sweep = fairness.parity_sweep(fit, *test, levels=5)
    hard = fairness.positive_rates(fit[0] > 0.5, fit[1])
    plain = fairness.demographic_parity_difference(hard)
    np.testing.assert_allclose(sweep.limits, np.linspace(0, plain, 5))
    assert sweep.difference[0] < 0.06 and np.all(np.diff(sweep.difference) > 0)
    assert sweep.accuracy[0] < sweep.accuracy[-1] - 0.01
    fitted = fairness.fitted_thresholds(*fit, float(sweep.limits[1]))
    np.testing.assert_array_equal(sweep.thresholds[1], fitted)
    # The accuracy is that of many draws of the answers.
    answers = fairness.randomised_answers(test[0], test[1], sweep.thresholds[1])
    draws = np.random.default_rng(0).random((500, 1000)) < answers
    assert np.mean(draws == test[2]) == pytest.approx(sweep.accuracy[1], abs=3e-3)
    shares = np.bincount(test[1]) / 1000
    assert sweep.group_accuracy[1] @ shares == pytest.approx(sweep.accuracy[1])


def test_subgroups_are_measured_apart():
    probabilities, groups, labels = drawn(300, 3)
    both = np.stack([1 - probabilities, probabilities], axis=1)
    found = fairness.subgroups(both, labels.astype(int), groups)
    right = (probabilities > 0.5) == labels
    confidence = np.maximum(probabilities, 1 - probabilities)
    for k in (0, 1):
        own = groups == k
        bins = calibration.equal_width_bins(confidence[own], right[own])
        assert found.count[k] == own.sum()
        assert found.accuracy[k] == pytest.approx(right[own].mean())
        error = calibration.expected_error(bins)
        assert found.calibration_error[k] == pytest.approx(error)
    gap = abs(found.accuracy[0] - found.accuracy[1])
    assert fairness.accuracy_gap(found.accuracy) == gap


HALVES = np.full(3, 0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: fairness.positive_rates(HALVES, np.array([0, 2, 2])),
            "group 1 of 0 to 2 has no example",
        ),
        (lambda: fairness.positive_rates(HALVES, np.array([0, -1, 0])), "from 0"),
        (
            lambda: fairness.fitted_thresholds(HALVES * 3, np.array([0, 1, 1]), 0.1),
            "3 of 3 probabilities are outside",
        ),
        (
            lambda: fairness.fitted_thresholds(HALVES, np.array([0, 1, 1]), 1.1),
            "limit 1.1",
        ),
        (
            lambda: fairness.randomised_answers(
                HALVES, np.array([0, 1, 2]), np.zeros(2)
            ),
            "from 0 to 2, but there are thresholds of 2",
        ),
    ],
)
def test_what_cannot_be_measured_is_said(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_interval_of_a_gap_is_newcombe_s():
    # Table II of Newcombe 1998, method 10: 56/70 and 48/80, 9/10 and 3/10, 10/10 and
    # 0/20.
    for hits, count, expected in (
        ((56, 48), (70, 80), (0.0524, 0.3339)),
        ((3, 9), (10, 10), (0.1705, 0.8090)),
        ((10, 0), (10, 20), (0.6791, 1.0)),
    ):
        found = fairness.gap_interval(np.array(hits), np.array(count))
        assert found == pytest.approx(expected, abs=5e-5)
    # A small group beside a huge one is not as unsure as two small ones: Wilson's end
    # of 5 of 10 is 0.2634 from the share, of the other as good as nothing.
    uneven = fairness.gap_interval(np.array([5, 500_000]), np.array([10, 1_000_000]))
    assert uneven == pytest.approx((0.0, 0.2634), abs=5e-5)
    low, high = fairness.gap_interval(np.array([4, 4]), np.array([4, 4]))
    assert low == 0 and high > 0.4  # all right in both: no gap, and nothing is sure
    three = fairness.gap_interval(np.array([56, 48, 50]), np.array([70, 80, 70]))
    assert three == pytest.approx((0.0524, 0.3339), abs=5e-5)
    for hits, count in (([1], [2]), ([1, 0], [2, 0]), ([3, 0], [2, 1])):
        with pytest.raises(UserError, match="a gap is between two groups"):
            fairness.gap_interval(np.array(hits), np.array(count))


def test_the_interval_of_a_gap_holds_it():
    rng = np.random.default_rng(0)
    count = np.array([12, 9])
    held = []
    for _ in range(300):
        low, high = fairness.gap_interval(rng.binomial(count, (0.9, 0.5)), count)
        held.append(low <= 0.4 <= high)
    assert np.mean(held) > 0.92
