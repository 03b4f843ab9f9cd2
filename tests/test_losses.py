"""Token losses against NumPy in float64, and their sums over parts of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import assert_within, relative_difference

from vit22b_transfer.models import losses

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(3.0 * RNG.standard_normal((3, 4, 7)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, 7, (3, 4)), jnp.int32)
WEIGHTS = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0], [0.5, 2, 0, 1]], jnp.float32)


def cross_entropy(logits, targets, weights, **options):
    terms = losses.terms_of_logits(logits, targets)
    size = logits.shape[-1]
    return losses.token_cross_entropy(terms, weights, vocab_size=size, **options)


def log_softmax(logits):
    logits = np.float64(logits)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def target_log_probabilities():
    return np.take_along_axis(log_softmax(LOGITS), np.asarray(TARGETS)[..., None], -1)


def test_cross_entropy_is_the_weighted_sum_of_negative_log_probabilities():
    loss, penalty, weight = cross_entropy(LOGITS, TARGETS, WEIGHTS)
    expected = -np.sum(target_log_probabilities()[..., 0] * WEIGHTS)
    assert_within(1e-5, loss, expected)
    per_token = optax.softmax_cross_entropy_with_integer_labels(LOGITS, TARGETS)
    assert_within(1e-5, loss, jnp.sum(per_token * WEIGHTS))
    assert (float(penalty), float(weight)) == (0.0, 9.5)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_the_divergence_from_the_smoothed_targets(smoothing):
    loss, _, _ = cross_entropy(LOGITS, TARGETS, WEIGHTS, label_smoothing=smoothing)
    wanted = np.full((3, 4, 7), smoothing / 6)
    np.put_along_axis(wanted, np.asarray(TARGETS)[..., None], 1 - smoothing, axis=-1)
    divergence = np.sum(wanted * (np.log(wanted) - log_softmax(LOGITS)), axis=-1)
    assert_within(2e-5, loss, np.sum(divergence * WEIGHTS))


def test_a_perfect_prediction_costs_nothing_with_label_smoothing():
    wanted = np.full((1, 1, 5), 0.1 / 4)
    wanted[0, 0, 2] = 0.9
    loss, _, _ = cross_entropy(
        jnp.asarray(np.log(wanted), jnp.float32),
        jnp.asarray([[2]]),
        jnp.ones((1, 1)),
        label_smoothing=0.1,
    )
    assert_within(1e-6, loss, 0.0)


def test_z_loss_is_the_squared_log_normaliser_and_part_of_the_loss():
    plain, _, _ = cross_entropy(LOGITS, TARGETS, WEIGHTS)
    loss, penalty, _ = cross_entropy(LOGITS, TARGETS, WEIGHTS, z_loss=0.01)
    log_z = np.log(np.sum(np.exp(np.float64(LOGITS)), axis=-1))
    assert_within(1e-5, penalty, 0.01 * np.sum(log_z**2 * np.float64(WEIGHTS)))
    assert_within(1e-5, loss, plain + penalty)


def test_gradients_equal_probabilities_minus_targets():
    def loss(logits):
        return cross_entropy(logits, TARGETS, WEIGHTS)[0]

    expected = np.exp(log_softmax(LOGITS)) - np.eye(7)[np.asarray(TARGETS)]
    expected = np.float32(expected * np.asarray(WEIGHTS)[..., None])
    assert relative_difference(jax.grad(loss)(LOGITS), expected) <= 1e-5


def test_sums_of_parts_are_the_sum_of_the_whole():
    options = dict(label_smoothing=0.1, z_loss=1e-3)
    whole = cross_entropy(LOGITS, TARGETS, WEIGHTS, **options)
    parts = [
        cross_entropy(
            LOGITS[i : i + 1], TARGETS[i : i + 1], WEIGHTS[i : i + 1], **options
        )
        for i in range(3)
    ]
    for total, summands in zip(whole, zip(*parts, strict=True), strict=True):
        assert_within(1e-5, sum(summands), total)


def test_tokens_without_weight_count_for_nothing_however_wrong():
    wild = jnp.where(WEIGHTS[..., None] == 0, 1e4 * LOGITS, LOGITS)
    actual = cross_entropy(wild, TARGETS, WEIGHTS)
    expected = cross_entropy(LOGITS, TARGETS, WEIGHTS)
    assert_within(1e-5, jnp.stack(actual), jnp.stack(expected))
    nothing = cross_entropy(LOGITS, TARGETS, jnp.zeros_like(WEIGHTS))
    assert [float(x) for x in nothing] == [0.0, 0.0, 0.0]


def test_huge_logits_give_finite_losses():
    loss, _, _ = cross_entropy(1e4 * LOGITS, TARGETS, WEIGHTS)
    assert np.isfinite(float(loss))


def test_log_probabilities_are_those_of_the_targets():
    terms = losses.terms_of_logits(LOGITS, TARGETS)
    actual = terms.picked - terms.log_z
    assert_within(1e-5, actual, target_log_probabilities()[..., 0])
