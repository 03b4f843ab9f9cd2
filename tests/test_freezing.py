"""Frozen parameters: chosen by pattern, zero gradients, not a bit changed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import (
    batch,
    image_text_model,
    jit,
    model_params,
    relative_difference,
    text_config,
    tower_config,
)

from vit22b_transfer import UserError
from vit22b_transfer.models import freezing, lora

PARAMS = {
    "encoder": {"tower": {"kernel": 1, "bias": 2}, "text": {"kernel": 3}},
    "decoder": {"kernel": 4},
}
TOWER = ("encoder/tower/.*",)


def frozen_paths(patterns):
    mask = flatten_dict(freezing.frozen_mask(PARAMS, patterns), sep="/")
    assert set(mask) == set(flatten_dict(PARAMS, sep="/"))
    return {path for path, frozen in mask.items() if frozen}


def test_patterns_match_whole_paths():
    assert frozen_paths([]) == set()
    assert frozen_paths(TOWER) == {"encoder/tower/kernel", "encoder/tower/bias"}
    assert frozen_paths([".*/kernel", ".*/bias"]) == set(flatten_dict(PARAMS, sep="/"))
    assert frozen_paths([r"(en|de)coder/kernel"]) == {"decoder/kernel"}


@pytest.mark.parametrize("pattern", ["encoder/tower", "tower/.*", "encodr/text/.*"])
def test_a_pattern_that_matches_nothing_is_refused_with_near_paths(pattern):
    with pytest.raises(ValueError, match="matches no parameter.*Nearest paths: ") as e:
        freezing.frozen_mask(PARAMS, [".*/bias", pattern])
    assert repr(pattern) in str(e.value) and "encoder/" in str(e.value)


def test_a_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(UserError, match=r"'\(' is no regular expression"):
        freezing.frozen_mask(PARAMS, ["("])


def test_a_pattern_of_the_tower_may_match_nothing_where_there_is_none():
    params = {"encoder": {"text": {"kernel": 3}}, "decoder": {"kernel": 4}}
    mask = freezing.frozen_mask(params, ["encoder/tower/.*", "decoder/.*"])
    assert mask == {"encoder": {"text": {"kernel": False}}, "decoder": {"kernel": True}}
    with pytest.raises(ValueError, match="matches no parameter"):
        freezing.frozen_mask(params, ["encoder/projection/.*"])


def test_all_that_asks_for_something_to_be_frozen_is_heard():
    config = lora.LoraConfig(1, 1.0, ("decoder/.*",), ("decoder/.*bias",))
    for names in itertools.permutations(["decoder/kernel", "encoder/text/.*"]):
        assert freezing.frozen_patterns(names) == names
        patterns = freezing.frozen_patterns(names, tower=True, lora=config)
        assert patterns == (config.frozen, *TOWER, *names)
    assert freezing.frozen_patterns() == ()
    assert freezing.frozen_patterns(TOWER, tower=True, int8_tower=True) == TOWER
    assert freezing.frozen_patterns(int8_tower=True) == TOWER


def test_merging_is_the_inverse_of_splitting():
    trainable, frozen = freezing.split_frozen(PARAMS, TOWER)
    assert frozen == {"encoder": {"tower": {"kernel": 1, "bias": 2}}}
    assert trainable == {"encoder": {"text": {"kernel": 3}}, "decoder": {"kernel": 4}}
    assert freezing.merge_frozen(trainable, frozen) == PARAMS
    assert freezing.split_frozen(PARAMS, []) == (PARAMS, {})
    assert freezing.split_frozen(PARAMS, [".*"]) == ({}, PARAMS)
    assert freezing.merge_frozen({}, PARAMS) == PARAMS


@pytest.fixture(scope="module")
def models():
    """The same small model with all parameters trained, and with a frozen tower."""
    tower = tower_config(depth=1)
    text = text_config(num_encoder_layers=1, num_decoder_layers=1)
    free, frozen = (
        image_text_model(tower, text, frozen=patterns) for patterns in ((), TOWER)
    )
    return free, frozen, model_params(free)


@pytest.mark.slow
def test_frozen_gradients_are_zero_and_the_others_unchanged(models):
    free, frozen, params = models
    example = batch(3)

    def gradients(model):
        def loss(params):
            return model.loss_fn(params, example, None)[0]

        return jit(jax.grad(loss))(params)

    trainable, still = freezing.split_frozen(gradients(frozen), TOWER)
    assert all(np.all(leaf == 0.0) for leaf in jax.tree.leaves(still))
    expected, moving = freezing.split_frozen(gradients(free), TOWER)
    assert all(np.any(leaf != 0.0) for leaf in jax.tree.leaves(moving))
    assert relative_difference(trainable, expected) <= 1e-5


def test_a_frozen_bfloat16_tower_is_bit_identical_after_training_steps(models):
    """The way of our own loop: only the trainable subtree is differentiated."""
    _, _, params = models
    tower = tower_config(depth=1, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    text = text_config(num_encoder_layers=1, num_decoder_layers=1)
    model = image_text_model(tower, text, frozen=TOWER)
    params = model_params(model)
    before = jax.tree.map(np.array, params)
    trainable, frozen = freezing.split_frozen(params, TOWER)
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype(jnp.float32)}

    @jit
    def step(trainable, frozen):
        def loss(trainable):
            merged = freezing.merge_frozen(trainable, frozen)
            return model.loss_fn(merged, batch(3), None)[0]

        value, gradients = jax.value_and_grad(loss)(trainable)
        moved = jax.tree.map(lambda p, g: p - 1e-2 * g, trainable, gradients)
        return value, moved

    values = []
    for _ in range(3):
        value, trainable = step(trainable, frozen)
        values.append(float(value))
    assert values[2] < values[0]
    after = freezing.merge_frozen(trainable, frozen)
    mask = freezing.frozen_mask(params, TOWER)
    same = jax.tree.map(lambda a, b: bool(np.all(np.asarray(a) == b)), after, before)
    assert same == mask
