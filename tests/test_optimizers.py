"""Optimizers and schedules against NumPy references, and what freezing leaves alone."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from vit22b_transfer.training import optimizers

RATE = 0.1
STEPS = 12


def params():
    """A kernel that is factored (32 or more twice), one that is not, and two biases."""
    rng = np.random.default_rng(0)
    shapes = {
        "tower": {"kernel": (40, 33), "bias": (33,)},
        "head": {"kernel": (3, 33, 8), "bias": (8,)},
    }
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradients(step):
    rng = np.random.default_rng(100 + step)
    draw = lambda p: rng.standard_normal(p.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, params())


def optimize(optimizer, steps=STEPS):
    """Parameters after `steps` steps."""
    current = params()
    opt_state = optimizer.init(current)
    for step in range(steps):
        updates, opt_state = optimizer.update(gradients(step), opt_state, current)
        current = optax.apply_updates(current, updates)
    return current


def reference(direction, *, weight_decay=0.0, decayed=("kernel",), clip=None):
    """The same in NumPy; `direction(memory, gradient, t)` of one array, t from 1."""
    current = jax.tree.map(np.float64, params())
    memory = jax.tree.map(lambda _: {}, current)
    for step in range(STEPS):
        grads = jax.tree.map(np.float64, gradients(step))
        if clip is not None:
            norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
            grads = jax.tree.map(lambda g, n=norm: g * min(1.0, clip / n), grads)
        for scope, arrays in current.items():
            for name, array in arrays.items():
                gradient = grads[scope][name]
                update = direction(memory[scope][name], gradient, step + 1)
                decay = weight_decay * array if name in decayed else 0.0
                arrays[name] = array - schedule(step) * (update + decay)
    return current


def schedule(step):
    return RATE / (1.0 + step)


def schedule_jax(step):
    return RATE / (1.0 + step.astype(jnp.float32))


def adam_direction(memory, g, t, b1=0.9, b2=0.999, eps=1e-8):
    memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g**2
    return memory["m"] / (1 - b1**t) / (np.sqrt(memory["v"] / (1 - b2**t)) + eps)


def momentum_direction(memory, g, t):
    memory["m"] = 0.9 * memory.get("m", 0.0) + g
    return memory["m"]


def adafactor_direction(memory, g, t, cap=0.999):
    """Zhai et al. 2021: factored over the two largest sizes if both are at least 32."""
    beta = min(cap, 1 - t**-0.8)
    square = g**2 + 1e-30
    small, large = np.argsort(g.shape)[-2:] if g.ndim > 1 else (0, 0)
    if g.ndim > 1 and g.shape[small] >= 32:
        row = beta * memory.get("row", 0.0) + (1 - beta) * square.mean(large)
        col = beta * memory.get("col", 0.0) + (1 - beta) * square.mean(small)
        memory["row"], memory["col"] = row, col
        row = np.expand_dims(row, large)
        estimate = row / row.mean(small, keepdims=True) * np.expand_dims(col, small)
    else:
        memory["v"] = beta * memory.get("v", 0.0) + (1 - beta) * square
        estimate = memory["v"]
    # The momentum lives in bfloat16, and so does its decay.
    bfloat16 = ml_dtypes.bfloat16
    old = memory.get("m", np.zeros(g.shape, bfloat16))
    old = np.float64(old * bfloat16(0.9))
    new = old + 0.1 * g / np.sqrt(estimate)
    memory["m"] = new.astype(np.float32).astype(bfloat16)
    return new


def assert_close(actual, expected):
    def compare(a, b):
        # A momentum on the edge between two bfloat16 numbers may fall to either side.
        assert np.mean(np.isclose(a, b, rtol=1e-5, atol=1e-5)) > 0.995
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)

    jax.tree.map(compare, actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "direction"),
    [
        (optimizers.adamw, adam_direction),
        (optimizers.sgd, momentum_direction),
        (optimizers.adafactor, adafactor_direction),
    ],
)
def test_an_optimizer_equals_its_definition(optimizer, direction):
    plain = optimizer(schedule_jax, clip_norm=None)
    assert_close(optimize(plain), reference(direction))
    full = optimizer(schedule_jax, weight_decay=0.3, clip_norm=1.0)
    assert_close(optimize(full), reference(direction, weight_decay=0.3, clip=1.0))


def test_adafactor_caps_the_decay_of_its_second_moment():
    def capped(memory, g, t):
        return adafactor_direction(memory, g, t, cap=0.5)

    optimizer = optimizers.adafactor(schedule_jax, beta2_cap=0.5, clip_norm=None)
    assert_close(optimize(optimizer), reference(capped))


def test_adafactor_stores_rows_columns_and_a_bfloat16_momentum():
    factored, momentum = optimizers.adafactor(schedule_jax, clip_norm=None).init(
        params()
    )[0]
    assert factored.v_row["tower"]["kernel"].shape == (33,)
    assert factored.v_col["tower"]["kernel"].shape == (40,)
    assert factored.v["tower"]["kernel"].shape == (1,)
    assert factored.v["head"]["kernel"].shape == (3, 33, 8)
    assert momentum.ema["tower"]["kernel"].dtype == jnp.bfloat16


def test_weight_decay_touches_what_its_patterns_match():
    optimizer = optimizers.sgd(
        schedule_jax, weight_decay=0.3, decay_patterns=["tower/.*"], clip_norm=None
    )
    tower = reference(momentum_direction, weight_decay=0.3, decayed=("kernel", "bias"))[
        "tower"
    ]
    actual = optimize(optimizer)
    assert_close(actual["tower"], tower)
    assert_close(actual["head"], reference(momentum_direction)["head"])


def test_decay_patterns_that_match_nothing_are_an_error():
    optimizer = optimizers.sgd(
        schedule_jax, weight_decay=0.3, decay_patterns=["kernels"]
    )
    with pytest.raises(ValueError, match=r"\['kernels'\] match no trained parameter"):
        optimizer.init(params())


def test_a_number_is_a_constant_learning_rate():
    number = optimizers.sgd(0.01)
    assert_close(optimize(number), optimize(optimizers.sgd(optimizers.constant(0.01))))


# --- Schedules ---

SCHEDULES = {
    "rsqrt": (
        optimizers.rsqrt(
            2.0, total_steps=100, warmup_steps=10, cooldown_steps=20, timescale=30
        ),
        lambda s: (
            2.0
            * (1 / np.sqrt(1 + (s - 10) / 30) if s >= 10 else 1.0)
            * min(1.0, s / 10)
            * min(1.0, (100 - s) / 20)
        ),
    ),
    "cosine": (
        optimizers.cosine(2.0, total_steps=100, warmup_steps=10),
        lambda s: min(1.0, s / 10) * (1 + np.cos(np.pi * max(0, s - 10) / 90)),
    ),
    "constant": (
        optimizers.constant(2.0, warmup_steps=10),
        lambda s: 2.0 * min(1.0, s / 10),
    ),
    "linear decay": (
        optimizers.constant(2.0, total_steps=100, cooldown_steps=100),
        lambda s: 2.0 * (1 - s / 100),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_equals_its_formula(name):
    actual, formula = SCHEDULES[name]
    for step in (0, 1, 9, 10, 11, 40, 79, 80, 81, 99, 100):
        np.testing.assert_allclose(
            actual(jnp.int32(step)), formula(step), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("name", ["rsqrt", "cosine", "linear decay"])
def test_a_decaying_schedule_ends_at_zero_and_stays_there(name):
    end = [float(SCHEDULES[name][0](jnp.int32(step))) for step in (100, 150)]
    np.testing.assert_allclose(end, 0.0, atol=1e-7)


def test_phases_that_do_not_fit_into_the_steps_are_an_error():
    with pytest.raises(
        ValueError, match="into total_steps=100. .* WARMUP_STEPS and TR"
    ):
        optimizers.rsqrt(1.0, total_steps=100, warmup_steps=50, cooldown_steps=60)
    with pytest.raises(ValueError, match="leaves no step"):
        optimizers.cosine(1.0, total_steps=100, warmup_steps=100)
    with pytest.raises(ValueError, match="needs total_steps"):
        optimizers.constant(1.0, cooldown_steps=10)


def test_the_schedule_an_optimizer_carries_is_the_rate_it_uses():
    peak = optimizers.cosine(1.0, total_steps=10, warmup_steps=2)
    optimizer = optimizers.sgd(peak, momentum=0.0, clip_norm=None)
    one = {"kernel": jnp.ones((2,))}
    opt_state = optimizer.init(one)
    for step in range(10):
        updates, opt_state = optimizer.update(one, opt_state, one)
        rate = optimizer.learning_rate(jnp.int32(step))
        np.testing.assert_array_equal(updates["kernel"], np.full(2, -rate))


# --- Freezing ---


def test_frozen_parameters_have_no_state_and_no_update():
    for make in (optimizers.adamw, optimizers.adafactor, optimizers.sgd):
        optimizer = optimizers.freeze(
            make(schedule_jax, weight_decay=0.3), params(), ["tower/.*"]
        )
        opt_state = optimizer.init(params())
        trained = make(schedule_jax, weight_decay=0.3).init({"head": params()["head"]})
        assert [leaf.shape for leaf in jax.tree.leaves(opt_state)] == [
            leaf.shape for leaf in jax.tree.leaves(trained)
        ]
        updates, _ = optimizer.update(gradients(0), opt_state, params())
        assert not np.any(updates["tower"]["kernel"])
        assert np.all(updates["head"]["bias"] != 0)


def test_the_clipped_norm_leaves_frozen_parameters_out():
    optimizer = optimizers.sgd(schedule_jax, momentum=0.0, clip_norm=1.0)
    frozen = optimizers.freeze(optimizer, params(), ["tower/.*"])
    updates, _ = frozen.update(gradients(0), frozen.init(params()), params())
    np.testing.assert_allclose(optax.tree.norm(updates["head"]), RATE, rtol=1e-5)


def test_no_patterns_freeze_nothing():
    optimizer = optimizers.sgd(schedule_jax)
    assert optimizers.freeze(optimizer, params(), []) is optimizer


def test_freezing_everything_is_an_error():
    with pytest.raises(ValueError, match="nothing is left to train"):
        optimizers.freeze(optimizers.sgd(schedule_jax), params(), [".*"])
