"""Intervals and tests against scipy, and against many drawn samples."""

import numpy as np
import pytest
import scipy.stats

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import intervals


def answered(images=40, seed=0, lift=0.0):
    """Scores of 1 to 5 questions an image, alike within one, and their images."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, images)
    ease = rng.normal(-0.3 + lift, 1.5, images)
    ids = np.repeat(np.arange(images), counts)
    return (rng.normal(size=len(ids)) < ease[ids]).astype(np.float64), ids


def test_the_interval_is_that_of_scipy_with_the_same_chance(monkeypatch):
    # Several parts draw what one draws.
    monkeypatch.setattr(intervals, "_AT_A_TIME", 7_001)
    scores, ids = answered()
    sums, counts = intervals.by_image(scores, ids)
    found = intervals.bootstrap(sums, counts, seed=3, resamples=1999, confidence=0.9)
    expected = scipy.stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=1999,
        confidence_level=0.9,
        method="BCa",
        rng=np.random.default_rng(3),
    )
    assert found.value == pytest.approx(scores.mean()) and found.method == "BCa"
    assert (found.low, found.high) == pytest.approx(expected.confidence_interval)
    assert found.standard_error == pytest.approx(expected.standard_error)


def test_sums_and_counts_are_of_each_image():
    sums, counts = intervals.by_image(np.array([1.0, 0.5, 0.25]), np.array([7, 2, 7]))
    np.testing.assert_array_equal(sums, [0.5, 1.25])
    np.testing.assert_array_equal(counts, [1, 2])


def test_equal_resamples_have_percentiles_and_say_so():
    found = intervals.bootstrap(np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3]))
    assert found == (1.0, 1.0, 1.0, 0.0, "percentile")


def test_clustered_errors_are_those_of_drawing_images_anew():
    scores, ids = answered(images=200)
    found = intervals.clustered_standard_error(scores, ids)
    sums, counts = intervals.by_image(scores, ids)
    drawn = intervals.bootstrap(sums, counts, resamples=2000).standard_error
    naive = scores.std(ddof=1) / np.sqrt(len(scores))
    assert found == pytest.approx(drawn, rel=0.06) and naive < 0.85 * found
    alone = intervals.clustered_standard_error(scores, np.arange(len(scores)))
    assert alone == pytest.approx(naive)
    # By the definition: all pairs of two questions of one image.
    apart = scores - scores.mean()
    alike = (ids[:, None] == ids) & ~np.eye(len(ids), dtype=bool)
    pairs = np.sum(np.outer(apart, apart)[alike]) / len(ids) ** 2
    assert found == pytest.approx(np.sqrt(naive**2 + pairs))


def test_a_difference_is_over_the_same_images():
    (first, ids), (second, _) = answered(lift=0.4), answered()
    sums, counts = intervals.by_image(first, ids)
    others, _ = intervals.by_image(second, ids)
    found = intervals.paired_difference(sums, others, counts, resamples=1999)
    assert found.interval.value == pytest.approx(first.mean() - second.mean())
    alone = intervals.bootstrap(sums, counts, resamples=1999)
    # The two are alike, so that their difference is surer than each.
    assert found.interval.standard_error < alone.standard_error
    assert found.share_below_zero < 0.5
    back = intervals.paired_difference(others, sums, counts, resamples=1999)
    assert back.share_below_zero == pytest.approx(1 - found.share_below_zero)
    same = intervals.paired_difference(sums, sums, counts)
    assert same.share_below_zero == 0.5 and same.interval.method == "percentile"


def test_mcnemar_is_the_binomial_test_of_what_one_alone_has_right():
    first = np.repeat([True, True, False, False], [20, 9, 2, 5])
    second = np.repeat([True, False, True, False], [20, 9, 2, 5])
    found = intervals.mcnemar(first, second)
    # 2 * (1 + 11 + 55) / 2^11
    assert found == (9, 2, pytest.approx(2 * 67 / 2048))
    assert intervals.mcnemar(second, first) == (2, 9, found.probability)
    assert intervals.mcnemar(first, first) == (0, 0, 1.0)


def test_as_many_examples_as_needed_show_an_effect():
    deviation = intervals.deviation_of_difference(0.4, 0.5, 0.5)
    assert deviation == pytest.approx(np.sqrt(0.16 + 0.25 - 0.2))
    needed = intervals.needed_examples(0.5, 1.0)
    assert needed == 32  # ((1.959964 + 0.841621) / 0.5)^2 = 31.4
    draws = np.random.default_rng(0).normal(0.5, 1.0, (4000, needed))
    shown = np.abs(draws.mean(axis=1)) * np.sqrt(needed) > 1.959964
    assert shown.mean() == pytest.approx(0.8, abs=0.03)


ONES, TWOS = np.ones(3), np.full(3, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: intervals.bootstrap(ONES[:1], TWOS[:1]), "two images or more"),
        (lambda: intervals.bootstrap(ONES, TWOS * 0), "the least 0"),
        (lambda: intervals.bootstrap(ONES, TWOS, resamples=30), "30 resamples are too"),
        (lambda: intervals.bootstrap(ONES * np.nan, TWOS), "3 of 3 sums"),
        (lambda: intervals.mcnemar(ONES[:0] > 0, ONES[:0] > 0), "got 0 and 0"),
        (lambda: intervals.clustered_standard_error(ONES[:1], TWOS[:1]), "two scores"),
        (lambda: intervals.needed_examples(0.0, 1.0), "effect 0.0 is to be other"),
        (lambda: intervals.deviation_of_difference(1.0, 1.0, 2.0), "correlation 2.0"),
    ],
)
def test_what_has_no_interval_is_said(call, message):
    with pytest.raises(UserError, match=message):
        call()
