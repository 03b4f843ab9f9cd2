"""Probes on arrays: against scikit-learn, pinned values, what they refuse and count.

Pinned: scikit-learn's digits, pixels in [0, 1], first 1000 images to learn from.
"""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import sklearn.linear_model
import sklearn.neighbors
import threadpoolctl
from sklearn.datasets import load_digits

from vit22b_transfer import UserError
from vit22b_transfer.experiments import (
    few_shot,
    labelled,
    linear,
    logistic,
    nearest_neighbours,
    outcomes,
)
from vit22b_transfer.experiments.labelled import Labelled

RAW = ("raw",)
SGD = linear.Sgd((1e-2, 3e-1), 0.9, 0.0, epochs=5, batch_size=100)


def made(features, labels, what="some"):
    labels = np.asarray(labels)
    return Labelled(np.asarray(features), labels, int(labels.max()) + 1, what)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    images = images / 16
    return made(images[:1000], labels[:1000]), made(images[1000:], labels[1000:])


@pytest.fixture
def small():
    """Three classes around three points, in float32: 40 images, and 20 others."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    centres = rng.normal(size=(3, 6))
    features = (centres[labels] + rng.normal(size=(60, 6))).astype(np.float32)
    return made(features[:40], labels[:40]), made(features[40:], labels[40:])


def run(probe, train, test):
    return probe.run({RAW: train}, {RAW: test})


def changed(data, **fields):
    return dataclasses.replace(data, **fields)


# --- Few-shot ---

FEW = few_shot.FewShot([RAW], (1, 5, 10, 25), (0, 1, 2), 1024.0)


def test_few_shot_gives_the_pinned_values(digits):
    expected = {
        1: (0.567127, 0.529486, 0.579674),
        5: (0.717691, 0.762861, 0.739021),
        10: (0.791719, 0.770389, 0.805521),
        25: (0.843162, 0.841907, 0.856964),
    }
    for outcome in run(FEW, *digits):
        shots = outcome.settings["shots"]
        assert outcome.settings["by_seed"] == pytest.approx(expected[shots], abs=1e-6)
        assert outcome.value == pytest.approx(np.mean(expected[shots]), abs=1e-6)


@pytest.mark.parametrize("count", [40, 1000], ids=["few images", "many"])
def test_ridge_is_that_of_scikit_learn_in_both_forms(digits, count, monkeypatch):
    monkeypatch.setattr(labelled, "_BLOCK_BYTES", 8 * 64 * 300)
    data = made(digits[0].features[:count], digits[0].labels[:count])
    fit = few_shot.fit_ridge(data, 7.0)
    columns = fit.columns(data.features)
    oracle = sklearn.linear_model.Ridge(alpha=7.0, fit_intercept=False)
    oracle.fit(columns, 2.0 * np.eye(10)[data.labels] - 1)
    np.testing.assert_allclose(fit.weights, oracle.coef_.T, atol=1e-8)


def test_a_feature_that_is_constant_in_the_few_images_says_nothing(small):
    train, test = (
        changed(x, features=np.insert(x.features, 2, 0.7, axis=1)) for x in small
    )
    test.features[:, 2] = 1e6 * np.arange(20)
    probe = few_shot.FewShot([RAW], (5,), (0,), 1.0)
    (with_it,), (without,) = run(probe, train, test), run(probe, *small)
    np.testing.assert_array_equal(with_it.scores, without.scores)
    assert with_it.notes == {"constant_features": 1} and not without.notes


def test_a_class_with_fewer_images_than_shots_is_counted_one_without_is_refused(small):
    train, test = small
    few = few_shot.FewShot([RAW], (13, 14), (0,), 1.0)
    assert [o.notes.get("classes_with_fewer_images") for o in run(few, *small)] == [
        None,
        2,
    ]
    message = r"1 of 4 classes have no image in some \(ids 3\)"
    with pytest.raises(UserError, match=message):
        run(few, changed(train, num_classes=4), changed(test, num_classes=4))


# --- Nearest neighbours ---

NEAREST = nearest_neighbours.NearestNeighbours([RAW], (10, 20, 100, 200), 0.07)


def test_nearest_neighbours_give_the_pinned_values(digits):
    found = [outcome.value for outcome in run(NEAREST, *digits)]
    assert found == pytest.approx([0.961104, 0.956085, 0.933501, 0.924718], abs=1e-6)


def test_nearest_neighbours_are_those_of_scikit_learn_in_any_blocks(
    digits, monkeypatch
):
    train, test = digits
    for name, size in (("_CANDIDATES", 130), ("_QUERIES", 300)):
        monkeypatch.setattr(nearest_neighbours, name, size)
    similarity, places = nearest_neighbours.nearest(train, test, 15)
    oracle = sklearn.neighbors.NearestNeighbors(metric="cosine", algorithm="brute")
    distances, expected = oracle.fit(train.features).kneighbors(test.features, 15)
    np.testing.assert_allclose(1 - similarity, distances, atol=1e-6)
    assert np.mean(places == expected) > 0.999  # neighbours at one distance may swap


def test_of_equally_near_images_the_first_is_taken_in_all_blocks(monkeypatch):
    monkeypatch.setattr(nearest_neighbours, "_CANDIDATES", 4)
    train = made(np.tile([[1.0, 0.0], [0.0, 2.0]], (6, 1)), [0, 1] * 6)
    test = made([[3.0, 0.0], [0.0, 0.0]], [0, 1])
    _, places = nearest_neighbours.nearest(train, test, 4)
    np.testing.assert_array_equal(places, [[0, 2, 4, 6], [0, 1, 2, 3]])


def test_more_neighbours_than_images_are_left_out_and_told(small):
    probe = nearest_neighbours.NearestNeighbours([RAW], (5, 40, 41), 0.07)
    found = run(probe, *small)
    assert [o.settings["neighbours"] for o in found] == [5, 40]
    assert found[0].notes == {"left_out_neighbours": [41]}
    too_many = dataclasses.replace(probe, neighbours=(41,))
    with pytest.raises(UserError, match="some has only 40 images"):
        run(too_many, *small)


# --- Logistic regression ---


def objective(data, weights, bias, strength):
    """scikit-learn's loss, divided by C and the number of images."""
    scores = data.features @ weights + bias
    own = scores[np.arange(len(data)), data.labels]
    mean = np.mean(scipy.special.logsumexp(scores, axis=1) - own)
    return mean + np.sum(weights**2) / (2 * strength * len(data))


def optimum(data, strength):
    fit = sklearn.linear_model.LogisticRegression(C=strength, tol=1e-6, max_iter=2000)
    with threadpoolctl.threadpool_limits(1):
        fit.fit(data.features, data.labels)
    return objective(data, fit.coef_.T, fit.intercept_, strength)


def test_logistic_regression_finds_scikit_learns_optimum(digits, monkeypatch):
    monkeypatch.setattr(labelled, "_BLOCK_BYTES", 8 * 64 * 600)
    train, test = digits
    with threadpoolctl.threadpool_limits(1):  # for so small matrices several wait
        fit = logistic.fit_logistic(train, 1.0, 1000)
    assert fit.converged
    assert fit.loss == pytest.approx(optimum(train, 1.0), rel=1e-6)
    assert np.mean(fit.logits(test).argmax(1) == test.labels) == pytest.approx(
        0.932246, abs=1e-6
    )


def test_the_strength_is_chosen_on_what_is_held_out(small):
    probe = logistic.LogisticProbe([RAW], (1e-4, 1.0, 1e2), 0.25, 3)
    (outcome,) = run(probe, *small)
    tried = outcome.settings["tried"]["raw"]
    assert [*tried] == ["0.0001", "1", "100"]
    assert outcome.settings["held_out_accuracy"] == max(tried.values())
    assert outcome.notes["fits_not_converged"] > 0  # of three steps each
    assert logistic.spaced_strengths(1e-2, 1e2, 3) == pytest.approx((1e-2, 1.0, 1e2))


# --- The sweep of linear heads ---


def test_sgd_comes_within_a_percent_of_scikit_learns_optimum(digits):
    train, _ = digits
    decay = 1e-3
    sgd = linear.Sgd((2.0,), 0.9, decay, epochs=45, batch_size=128)
    heads = linear.learn(train, sgd)
    strength = 1 / (decay * len(train))
    least = optimum(train, strength)
    found = objective(train, heads.kernel[:, 0], heads.bias[0], strength)
    assert least <= found < 1.01 * least


def test_rates_learned_together_are_those_learned_alone(small, monkeypatch):
    train, _ = small
    rows = np.arange(0, 40, 2)
    sgd = dataclasses.replace(SGD, batch_size=8, weight_decay=0.1)
    whole = linear.learn(train, sgd, rows=rows)
    # Calls of three steps, of which the last has two.
    monkeypatch.setattr(linear, "_CALL_BYTES", 3 * 8 * 6 * 4)
    for number, rate in enumerate(sgd.rates):
        alone = linear.learn(train, dataclasses.replace(sgd, rates=(rate,)), rows=rows)
        np.testing.assert_allclose(
            whole.kernel[:, number], alone.kernel[:, 0], rtol=1e-5, atol=1e-6
        )
    found = linear.logits(whole, train)
    expected = np.einsum("nd,drc->nrc", train.features, whole.kernel) + whole.bias
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("common", "rates"), [(0.0, (1e-2, 1e-1)), (10.0, (1e-4, 1e-3))]
)
def test_rates_tried_in_bfloat16_are_judged_as_in_float32(digits, common, rates):
    """Also where vectors have much in common, which bfloat16 would round away."""
    train = changed(digits[0], features=digits[0].features + common)
    sgd = linear.Sgd(rates, 0.9, 0.1, epochs=20, batch_size=256)
    rows, held = np.arange(900), np.arange(900, 1000)
    whole = linear.learn(train, sgd, rows=rows)
    tried = linear.learn(train, sgd, rows=rows, dtype=linear.TRIED_IN)
    shares, losses = linear.judged(whole, train, held)
    assert losses[0] > losses[1] + 0.04 and shares[1] > 0.4
    found, near = linear.judged(tried, train, held)
    assert found == shares
    np.testing.assert_allclose(near, losses, rtol=1e-4)
    np.testing.assert_allclose(tried.kernel, whole.kernel, atol=1e-3)


def test_of_equally_accurate_rates_that_of_the_least_loss_is_taken(small):
    """One by which a head has hardly begun tells no probabilities."""
    apart = [
        changed(x, features=x.features + 9 * np.eye(6, dtype=np.float32)[x.labels])
        for x in small
    ]
    sgd = linear.Sgd((1e-2, 1e-1), 0.9, 0.0, epochs=20, batch_size=20)
    (outcome,) = run(linear.LinearProbe([RAW], sgd, 0.2), *apart)
    settings = outcome.settings
    assert settings["tried"]["raw"] == {"0.01": 1.0, "0.1": 1.0}
    assert settings["rate"] == 0.1 and settings["held_out_loss"] < 0.05


def test_one_step_of_sgd_is_that_of_the_formula(small):
    train, _ = small
    sgd = linear.Sgd((0.5,), 0.9, 0.1, epochs=2, batch_size=64)
    assert sgd.steps(40) == (40, 2)
    kernel, bias, speeds = None, np.zeros(3), [0.0, 0.0]
    generator = np.random.default_rng(0)
    kernel = generator.normal(0, 0.01, (6, 1, 3))[:, 0]
    for factor in (1.0, 0.5):
        scores = train.features @ kernel + bias
        error = (scipy.special.softmax(scores, axis=1) - np.eye(3)[train.labels]) / 40
        slopes = train.features.T @ error + 0.1 * kernel, error.sum(axis=0)
        speeds = [0.9 * v + slope for v, slope in zip(speeds, slopes, strict=True)]
        kernel = kernel - 0.5 * 40 / 256 * factor * speeds[0]
        bias = bias - 0.5 * 40 / 256 * factor * speeds[1]
    heads = linear.learn(train, sgd)
    np.testing.assert_allclose(heads.kernel[:, 0], kernel, atol=1e-6)
    np.testing.assert_allclose(heads.bias[0], bias, atol=1e-6)


def test_a_rate_that_diverges_is_counted_and_never_chosen(small):
    train, test = (changed(x, features=np.float32(1e30) * x.features) for x in small)
    good = small[0].features
    sets = {("wild",): train, RAW: changed(train, features=good)}
    others = {("wild",): test, RAW: small[1]}
    probe = linear.LinearProbe(
        [("wild",), RAW], dataclasses.replace(SGD, epochs=20), 0.2
    )
    (outcome,) = probe.run(sets, others)
    assert outcome.settings["features"] == ["raw"] and outcome.value > 0.6
    assert outcome.notes["diverged_rates"] == 2
    assert outcome.settings["tried"]["wild"] == {"0.01": None, "0.3": None}
    with pytest.raises(UserError, match="every one of the learning rates .* diverges"):
        probe.run({("wild",): train}, {("wild",): test})
    sgd = dataclasses.replace(SGD, rates=(1e-9, 0.3))
    (outcome,) = run(linear.LinearProbe([RAW], sgd, 0.2), *small)
    assert "the largest" in outcome.notes["chosen_rate"]


@pytest.mark.parametrize("kind", ["linear", "logistic"])
def test_labels_that_mean_nothing_are_not_learned_by_what_chooses(kind):
    """With more features than images all are learned, and held-out ones are not."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(60) % 2)
    data = made(rng.normal(size=(60, 80)).astype(np.float32), labels)
    probe = linear.LinearProbe([RAW], dataclasses.replace(SGD, epochs=40), 0.5)
    if kind == "logistic":
        probe = logistic.LogisticProbe([RAW], (1.0,), 0.5, 100)
    (outcome,) = run(probe, data, data)
    assert outcome.value == 1.0 and outcome.settings["held_out_accuracy"] < 0.8


def test_what_is_held_out_is_not_learned_from(small):
    fitted, held = labelled.held_out(small[0].labels, 0.1, 3, "some")
    assert len(held) == 4 and sorted([*fitted, *held]) == list(range(40))
    with pytest.raises(UserError, match=r"held_out=0.01 of the 40 images"):
        labelled.held_out(small[0].labels, 0.01, 3, "some")


# --- What all have in common ---


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"labels": np.array([0, 1, 5])}, "1 labels of some .* image 2: 5; 3 classes"),
        (
            {"labels": np.array([0, -1, 1])},
            "image 1: -1; 3 classes have the ids 0 to 2",
        ),
        ({"labels": np.zeros(2, int)}, "3 vectors and 2 labels"),
        ({"labels": np.zeros(0, int)}, "no image with a label"),
        ({"num_classes": 1}, "fewer than 2 there is nothing"),
    ],
)
def test_wrong_labels_are_said(fields, message):
    with pytest.raises(UserError, match=message):
        changed(made(np.eye(3), [0, 1, 2]), **fields)


def test_features_that_are_not_finite_are_said():
    features = np.eye(3)
    features[1:, 0] = np.nan, np.inf
    with pytest.raises(UserError, match="2 of 3 feature vectors .* of image 1"):
        made(features, [0, 1, 2])


PROBES = [
    few_shot.FewShot([RAW], (1,), (0,), 1.0),
    nearest_neighbours.NearestNeighbours([RAW], (1,), 0.07),
    linear.LinearProbe([RAW], SGD, 0.5),
    logistic.LogisticProbe([RAW], (1.0,), 0.5, 10),
]


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: type(probe).__name__)
def test_features_that_are_all_constant_and_unequal_widths_are_refused(probe, small):
    train, test = small
    with pytest.raises(UserError, match="all 6 features of .*some are the same"):
        run(probe, changed(train, features=np.ones((40, 6))), test)
    with pytest.raises(UserError, match="some has width 6, some 5"):
        run(probe, train, changed(test, features=test.features[:, 1:]))


@pytest.mark.parametrize("probe", PROBES[1:], ids=lambda probe: type(probe).__name__)
def test_images_of_a_class_without_training_images_count_as_wrong(probe, small):
    train, test = (changed(x, num_classes=5) for x in small)
    test.labels[:3] = 4
    (outcome,) = run(probe, train, test)
    assert not outcome.scores[:3].any()
    assert outcome.notes["classes_without_training_image"] == 2
    assert outcome.notes["test_images_of_such_classes"] == 3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: few_shot.FewShot([RAW], (0,), (0,), 1.0), "a shot is at least one"),
        (lambda: dataclasses.replace(NEAREST, temperature=0.0), "both are positive"),
        (lambda: dataclasses.replace(SGD, rates=(1.0, 1.0)), "positive and different"),
        (lambda: dataclasses.replace(SGD, momentum=1.0), r"momentum=1.0 .*\[0, 1\)"),
        (lambda: dataclasses.replace(SGD, epochs=0), "at least 1"),
        (lambda: logistic.LogisticProbe([RAW], (), 0.1, 5), "at least one strength"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("hits, count", [(0, 7), (7, 7), (300, 797), (1, 2)])
def test_intervals_are_wilsons(hits, count):
    scores = np.zeros(count)
    scores[:hits] = 1
    expected = scipy.stats.binomtest(hits, count).proportion_ci(0.95, "wilson")
    found = outcomes.Outcome({}, scores).interval
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
