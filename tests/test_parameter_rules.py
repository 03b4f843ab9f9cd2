"""Weight decay and learning rates by parameter: what each rule hits, and refusals."""

import functools
import itertools

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_gin_behind
import tiny_models
from flax.traverse_util import flatten_dict

from vit22b_transfer import UserError
from vit22b_transfer.models import stacking
from vit22b_transfer.training import optimizers, parameter_rules

TOWER = "encoder/tower/.*"
LOGITS = "decoder/logits_dense/kernel"


@pytest.fixture(autouse=True)
def no_gin_left_over():
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def params():
    """Those of an image-text model with 2 blocks in its tower, as abstract arrays."""
    model = tiny_models.image_text_model(
        tiny_models.tower_config(**tiny_models.TWO_BLOCKS),
        tiny_models.text_config(**tiny_models.TWO_LAYERS),
    )
    shapes = {name: array.shape for name, array in tiny_models.batch(1).items()}
    init = functools.partial(model.get_initial_variables, input_shapes=shapes)
    return jax.eval_shape(init, jax.random.key(0))["params"]


def few_params():
    """A tower of 3 blocks and a head; one kernel is large enough to be factored."""
    block = {"mlp": {"kernel": (40, 33), "bias": (33,)}}
    tower = {f"layers_{i}": block for i in range(3)} | {"encoder_norm": (5,)}
    tower["patch_embedding"] = {"kernel": (6, 5)}
    tree = {"encoder": {"tower": tower}, "head": {"kernel": (5, 4)}}
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradients_like(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), params
    )


# --- Layer-wise learning rates ---


def test_rates_fall_with_the_depth_below_the_end_of_the_tower(params):
    """The layer ids of BEiT and MAE: D + 2 of them in a tower of D blocks."""
    rates = parameter_rules.layer_rates(params, 0.5)
    assert rates.keys() == flatten_dict(params, sep="/").keys()
    for start, rate in (
        ("encoder/tower/patch_embedding", 0.125),
        ("encoder/tower/position_embedding", 0.125),
        ("encoder/tower/layers_0", 0.25),
        ("encoder/tower/layers_1", 0.5),
        ("encoder/tower/encoder_norm", 1.0),
        ("encoder/projection", 1.0),
        ("encoder/text", 1.0),
        ("decoder", 1.0),
        ("token_embedder", 1.0),
    ):
        found = {value for path, value in rates.items() if path.startswith(start)}
        assert found == {rate}, start


def test_what_pools_the_tokens_is_behind_the_blocks_and_what_joins_them_before():
    tower = {"layers_0": {"mlp": 0}, "map": {"probe": 0}, "cls": 0, "registers": 0}
    tower = jax.tree.map(np.zeros, tower)
    rates = parameter_rules.layer_rates({"encoder": {"tower": tower}}, 0.5)
    assert [rates[f"encoder/tower/{x}"] for x in ("layers_0/mlp", "map/probe")] == [
        0.5,
        1.0,
    ]
    assert rates["encoder/tower/cls"] == rates["encoder/tower/registers"] == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_stacked_layers_are_updated_as_unrolled_ones(name):
    """All options at once: clip, weight decay by pattern, rates by layer, average."""
    optimizer = getattr(optimizers, name)(
        0.1,
        clip_norm=0.5,
        weight_decay=0.1,
        decay_factors=[("head/kernel", 100.0)],
        layer_decay=0.5,
        ema_decay=0.9,
    )
    unrolled = few_params()

    def after_steps(params, stack):
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for seed in range(3):
            grads = stack(gradients_like(unrolled, seed))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state[-1].weight_average

    def compare(a, b):
        # A momentum on the edge between two bfloat16 numbers may fall to either side.
        assert np.mean(np.isclose(a, b, rtol=1e-5, atol=1e-6)) > 0.995
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)

    expected = after_steps(unrolled, lambda tree: tree)
    stacked = after_steps(tiny_models.stack_layers(unrolled), tiny_models.stack_layers)
    for actual, wanted in zip(stacked, expected, strict=True):
        jax.tree.map(compare, stacking.unstack_layers(actual), wanted)


def test_the_rate_of_a_layer_is_that_of_its_gradient_and_of_its_decay():
    params = few_params()
    plain, slowed = (
        optimizers.sgd(0.1, momentum=0.0, clip_norm=None, weight_decay=0.1, **options)
        for options in ({}, {"layer_decay": 0.5})
    )
    grads = gradients_like(params)
    first, second = (
        flatten_dict(made.update(grads, made.init(params), params)[0], sep="/")
        for made in (plain, slowed)
    )
    rates = parameter_rules.layer_rates(params, 0.5)
    for path, update in first.items():
        np.testing.assert_allclose(rates[path] * update, second[path], rtol=1e-6)


@pytest.mark.parametrize(
    "frozen, tree, words",
    [
        ((TOWER,), None, "all of them are frozen"),
        ((r"encoder/tower/layers.*",), None, "all of them are frozen"),
        ((), {"decoder": {"kernel": jnp.ones(2)}}, "there is none"),
        (
            (),
            {"encoder": {"tower": {"stage_0": {"kernel": jnp.ones(2)}}}},
            r"needs a tower with the blocks .* it has stage_0",
        ),
    ],
)
@pytest.mark.parametrize("stack", [False, True], ids=["unrolled", "stacked"])
def test_a_layer_decay_of_nothing_is_refused(frozen, tree, words, stack):
    tree = tree or few_params()
    tree = tiny_models.stack_layers(tree) if stack else tree
    with pytest.raises(UserError, match=words):
        optimizers.freeze(optimizers.adamw(0.1, layer_decay=0.5), tree, frozen)


def test_the_rates_of_what_is_left_are_those_beside_frozen_layers():
    """The numbers of layers count from the tower's end, whatever of it is frozen."""
    params = few_params()
    optimizer = optimizers.sgd(0.1, momentum=0.0, clip_norm=None, layer_decay=0.5)
    frozen = ("encoder/tower/layers_[12]/.*",)
    some = optimizers.freeze(optimizer, params, frozen)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = some.update(ones, some.init(params), params)
    updates = flatten_dict(updates, sep="/")
    kernel = updates["encoder/tower/layers_0/mlp/kernel"]
    np.testing.assert_allclose(kernel, -0.1 * 0.125, rtol=1e-6)


# --- Weight decay ---


def test_the_log_tells_what_each_strength_hits(params):
    optimizer = optimizers.adamw(
        0.1,
        weight_decay=0.03,
        decay_factors=[(LOGITS, 100.0), ("decoder/relpos.*", 0.0)],
        layer_decay=0.5,
        ema_decay=0.99,
    )
    lines = optimizers.describe(optimizer, params, [])
    assert lines[0] == f"weight decay 3: 1 parameter ({LOGITS})"
    kernels = sum(path.endswith("kernel") for path in flatten_dict(params, sep="/"))
    assert lines[1].startswith(f"weight decay 0.03: {kernels - 1} parameters (decoder/")
    total = len(flatten_dict(params))
    assert lines[2].startswith(f"weight decay 0: {total - kernels} parameters (")
    assert lines[3:] == [
        "learning rate x 0.25 to 0.5 in the tower's blocks, 0.125 before them, x 1 "
        "elsewhere",
        "weights are averaged with a decay of 0.99",
    ]
    # A pattern of frozen parameters alone is no slip of the pen, but is told.
    lines = optimizers.describe(optimizer, params, [LOGITS])
    assert lines[0] == "weight decay 3: 0 parameters"
    assert optimizers.describe(optax.sgd(0.1), params, []) == []


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"decay_factors": [("decoder/logit_dense/kernel", 100.0)]},
            "'decoder/logit_dense/kernel' matches no parameter.* Nearest paths: "
            "decoder/logits_dense/kernel",
        ),
        ({"decay_patterns": [".*/kernel", "absent"]}, "'absent' matches no parameter"),
        (
            {"decay_factors": [(".*", 1.0), (LOGITS, 100.0)], "decay_patterns": ()},
            f"decay_factors: '{LOGITS}' has no effect: .* decided by a pattern before",
        ),
        (
            {"decay_factors": [(LOGITS, 2.0)], "weight_decay": 0.0},
            "no effect without a weight_decay",
        ),
        ({"decay_factors": [(".*", -1.0)]}, "factor of '.*' is -1.0"),
        ({"decay_factors": [("(", 1.0)]}, "'\\(' is no regular expression"),
        ({"decay_factors": [(".*", 0.0)]}, "match no trained parameter"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must be"),
        ({"layer_decay": 1.0}, "layer_decay=1.0 must lie between 0 and 1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must lie between 0 and 1"),
    ],
)
def test_a_rule_without_effect_or_sense_is_refused(params, options, words):
    with pytest.raises(UserError, match=words):
        made = optimizers.adamw(0.1, **({"weight_decay": 0.03} | options))
        optimizers.freeze(made, params, [])


# --- Gin files, beside those that freeze ---


@pytest.mark.slow
def test_gin_files_go_together_in_any_order_or_are_refused():
    # The logits of the recipe's text model are those of its token table.
    no_head = (*test_gin_behind.SMALL, "adafactor.decay_factors=()")
    parts_of = functools.partial(test_gin_behind.parts_of, small=no_head)
    files = ("runs/optimizer_vit22b", "runs/layer_decay", "runs/ema", "models/lora")
    trained = parts_of(*files).trained
    assert trained and all("/lora_" in path for path in trained)
    assert parts_of(*files[::-1]).trained == trained
    for freezes, why in (("frozen_tower", "are frozen"), ("no_tower", "there is none")):
        for names in itertools.permutations((f"models/{freezes}", "runs/layer_decay")):
            with pytest.raises(UserError, match=why):
                test_gin_behind.parts_of(*names)
    assert parts_of("models/frozen_tower", "runs/optimizer_vit22b", "runs/ema").trained
    with pytest.raises(UserError, match="no head of its own: set decay_factors="):
        test_gin_behind.parts_of("runs/optimizer_vit22b")
