"""Kernels of a frozen tower in int8: what they compute, weigh, and come from."""

import dataclasses
import functools
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_captions
import tiny_models
import tiny_runs
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import assert_within

from vit22b_transfer.checkpoints import reading, restoring, writing
from vit22b_transfer.inference import infer
from vit22b_transfer.models import int8, layers, lora, multimodal, vit
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.recipes import loading
from vit22b_transfer.training import optimizers, steps
from vit22b_transfer.training.state import TrainState, abstract_variables
from vit22b_transfer.training.train import InitialCheckpoint, Periods, fine_tune
from vit22b_transfer.weights import export
from vit22b_transfer.weights.families import table

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FROZEN = ("encoder/tower/.*",)
ONE_DEVICE = tiny_runs.ONE_DEVICE


def kernel(*shape, dtype=jnp.float32):
    values = np.random.default_rng(0).standard_normal(shape) * np.arange(shape[-1])
    return jnp.asarray(values, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_moves_a_weight_by_half_a_step_at_most(dtype):
    weights = kernel(3, 20, 7, dtype=dtype)
    values, scales = int8.quantized(weights)
    assert values.dtype == jnp.int8 and scales.dtype == jnp.float32
    assert scales.shape == (3, 7)
    back = int8.dequantized(values, scales, jnp.float32)
    error = np.abs(np.asarray(back) - np.asarray(weights, np.float32))
    assert np.all(error <= 0.5001 * np.asarray(scales)[:, None])
    # The first channel is all zeros, the largest weight of the others is exact.
    assert not np.any(back[..., 0])
    assert np.all(np.max(np.abs(values[..., 1:]), axis=1) == 127)


def quantized_params(params):
    """Parameters of the tower with int8 kernels, from those of the float one."""
    flat = {}
    for path, value in flatten_dict(params).items():
        if path[-1] == "kernel":
            flat[path], flat[(*path[:-1], int8.SCALES)] = int8.quantized(value)
        else:
            flat[path] = value
    return unflatten_dict(flat)


def dequantized_params(params):
    flat = flatten_dict(params)
    for path in [path for path in flat if path[-1] == "kernel"]:
        scales = flat.pop((*path[:-1], int8.SCALES))
        flat[path] = int8.dequantized(flat[path], scales, jnp.float32)
    return unflatten_dict(flat)


@pytest.mark.parametrize(
    "config",
    [
        tiny_models.tower_config(),
        tiny_models.tower_config(fused_projections=True),
        tiny_models.tower_config(
            **tiny_models.TWO_BLOCKS, scan_layers=True, pooling="none"
        ),
        tiny_models.classic_tower_config(gated_mlp=True),
    ],
    ids=["parallel", "fused", "scanned", "classic"],
)
def test_a_tower_computes_with_the_weights_that_its_int8_kernels_stand_for(config):
    images = jnp.asarray(tiny_models.images(2, *tiny_models.IMAGE_SIZE, 3))
    tower = vit.VisionTower(config)
    params = tiny_models.random_params(tower, images)
    rounded = vit.VisionTower(dataclasses.replace(config, int8_kernels=True))
    stored = quantized_params(params)
    shapes = jax.eval_shape(rounded.init, jax.random.key(0), images)
    assert jax.tree.structure(shapes["params"]) == jax.tree.structure(stored)
    for ours, theirs in zip(
        jax.tree.leaves(stored), jax.tree.leaves(shapes["params"]), strict=True
    ):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)

    @functools.partial(tiny_models.jit, static_argnums=0)
    def tokens(tower, params):
        return tower.apply({"params": params}, images).tokens

    expected = tokens(tower, dequantized_params(stored))
    assert_within(1e-5, tokens(rounded, stored), expected)
    # And those are the weights before, rounded: half a step of their channel away.
    before, after = (
        flatten_dict(tree) for tree in (params, dequantized_params(stored))
    )
    for path, scales in flatten_dict(stored).items():
        if path[-1] == int8.SCALES:
            kernel = (*path[:-1], "kernel")
            error = np.abs(np.asarray(after[kernel]) - np.asarray(before[kernel]))
            assert np.all(error <= 0.5001 * np.asarray(scales)[..., None, :]), path


def test_fresh_int8_kernels_spread_as_fresh_ones_do():
    dense = layers.Dense(32, 64, ("embed", "mlp"), int8_kernel=True)
    value = dense.init(jax.random.key(0), jnp.zeros((1, 32)))["params"]
    weights = int8.dequantized(value["kernel"], value[int8.SCALES], jnp.float32)
    # Glorot and Bengio's uniform distribution
    assert np.std(weights) == pytest.approx((2 / (32 + 64)) ** 0.5, rel=0.05)
    assert np.max(np.abs(weights)) <= 1.01 * (6 / (32 + 64)) ** 0.5


def num_bytes(config):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
    shapes = jax.eval_shape(vit.VisionTower(config).init, jax.random.key(0), images)
    leaves = jax.tree.leaves(shapes["params"])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("variant", ["S/16", "B/16", "22B/14"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_an_int8_tower_takes_little_over_half_of_a_bfloat16_one(variant, param_dtype):
    options = dict(pooling="none", scan_layers=True, **tiny_models.TWO_BLOCKS)
    bfloat16 = vit.vit22b_config(variant, param_dtype="bfloat16", **options)
    rounded = vit.vit22b_config(
        variant, param_dtype=param_dtype, int8_kernels=True, **options
    )
    assert num_bytes(rounded) <= 0.55 * num_bytes(bfloat16)


# --- From a checkpoint in floating point ---


def model(**arguments):
    arguments = dict(int8_tower=True, frozen=FROZEN) | arguments
    # compiles fastest
    return tiny_captions.model(optimizer_def=optax.sgd(1e-2), **arguments)


@pytest.fixture(scope="module")
def params():
    return tiny_models.model_params(tiny_captions.model(), seed=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_captions.write_checkpoint(tmp_path_factory.mktemp("float"))


def restored(path, the_model, partitioning=ONE_DEVICE, **arguments):
    abstract = abstract_variables(the_model, partitioning, tiny_models.batch(2))
    return restoring.restore_partial(path, abstract, **arguments).params


def assert_tower_is_rounded(ours, params):
    """The tower is `params`' rounded to int8, all else is theirs."""
    expected = flatten_dict(params, sep="/")
    tower = quantized_params(params["encoder"]["tower"])
    expected |= flatten_dict({"encoder": {"tower": tower}}, sep="/")
    ours = flatten_dict(ours, sep="/")
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype
        # A compiled division may round the other way.
        tolerance = 1 if value.dtype == jnp.int8 else 1e-6
        assert_within(tolerance, ours[name], value, name)


@pytest.mark.parametrize("mesh", [ONE_DEVICE, Partitioning(data=2, model=2)])
def test_a_run_starts_from_kernels_in_floating_point(checkpoint, params, mesh):
    assert_tower_is_rounded(restored(checkpoint, model(), mesh), params)


def test_rules_rename_the_kernels_too(checkpoint, params):
    writer = writing.CheckpointWriter(str(Path(checkpoint).parent), keep=None)
    tree = {"target": {"vit": params["encoder"]["tower"]}, "state": {"step": 1}}
    writer.save(8, tree, {})
    writer.close()
    rules = ((r"encoder/tower/(.*)", r"vit/\1"), (".*", None))
    path = reading.checkpoint_path(str(Path(checkpoint).parent), 8)
    tower = restored(path, model(), rules=rules)
    expected = restored(checkpoint, model())["encoder"]["tower"]
    tiny_runs.assert_same_bits(tower, {"encoder": {"tower": expected}})


def test_inference_reads_a_checkpoint_in_floating_point(checkpoint, params):
    arguments = ONE_DEVICE, checkpoint, tiny_captions.LENGTHS, 4
    assert_tower_is_rounded(infer.restore(model(), *arguments).params, params)


def test_a_kernel_that_is_not_there_is_named(checkpoint):
    deeper = model()
    tower = dataclasses.replace(deeper.module.tower, depth=2)
    deeper.module = deeper.module.clone(tower=tower)
    message = "encoder/tower/layers_1/attention/query/kernel: not in the checkpoint"
    with pytest.raises(ValueError, match=message):
        restored(checkpoint, deeper)


# --- Training beside it ---


def test_training_int8_kernels_is_refused(tmp_path):
    unfrozen = model()
    unfrozen.frozen = ()
    with pytest.raises(
        ValueError, match="encoder/tower/.*kernel is stored as int8 and"
    ):
        tiny_runs.run(tmp_path, unfrozen, eval_data=None, total_steps=1)
    assert not reading.complete_steps(str(tmp_path))


def test_a_blind_model_has_no_tower_to_round():
    with pytest.raises(ValueError, match="int8_tower is set, but .* no tower"):
        tiny_models.image_text_model(blind=True, int8_tower=True)


def test_low_rank_updates_of_an_int8_tower_are_trained():
    config = lora.LoraConfig(2, 4.0, ("encoder/tower/.*attention/query/kernel",))
    the_model = model(lora=config, frozen=())
    batch = tiny_models.batch(2)
    params = abstract_variables(the_model, ONE_DEVICE, batch)
    optimizer = optimizers.freeze(the_model.optimizer_def, params, the_model.frozen)
    update = steps.make_update(the_model, optimizer, ONE_DEVICE)
    opt_state = jax.eval_shape(optimizer.init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    new, _ = jax.eval_shape(update, state, batch, jax.random.key(0))
    assert jax.tree.structure(new.params) == jax.tree.structure(params)
    query = new.params["encoder"]["tower"]["layers_0"]["attention"]["query"]
    assert {"lora_a", "lora_b"} < query.keys() and query["kernel"].dtype == jnp.int8


@pytest.fixture(scope="module")
def run(tmp_path_factory, checkpoint):
    """The latest checkpoint of a training that starts from the float one."""
    result = fine_tune(
        model(),
        model_dir=str(tmp_path_factory.mktemp("run")),
        data=tiny_runs.Data(),
        total_steps=2,
        partitioning=ONE_DEVICE,
        periods=Periods(log=1),
        initial=InitialCheckpoint(checkpoint),
    )
    return result.checkpoint


def test_a_training_keeps_the_int8_tower_and_moves_the_rest(run, checkpoint):
    first = restored(checkpoint, model())
    arguments = ONE_DEVICE, run, tiny_captions.LENGTHS, 4
    last = infer.restore(model(), *arguments).params
    tower = last["encoder"].pop("tower"), first["encoder"].pop("tower")
    tiny_runs.assert_same_bits(*tower)
    for ours, theirs in zip(*map(jax.tree.leaves, (last, first)), strict=True):
        assert np.any(np.asarray(ours) != np.asarray(theirs))


def test_an_int8_checkpoint_is_not_exported_as_if_it_were_floats(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="int8"):
        export.export_weights(run, str(out), table.FAMILIES, family="hf-t5")
    assert not out.exists()


def test_the_gin_file_rounds_and_freezes_the_tower_of_a_recipe():
    files = ["gin_configs/recipes/scenes_vqa.gin", "gin_configs/models/int8_tower.gin"]
    try:
        recipe = loading.read(files, ["MODEL_DIR='/nowhere'"], [str(ROOT)])
        root = multimodal.ImageTextModel
        built = loading.install(recipe, root, [str(ROOT)])()
        assert built.module.tower.int8_kernels and built.frozen == FROZEN
    finally:
        gin.clear_config()
