"""Checkpoints between our runtime and real T5X, both formats, both ways."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
import tiny_runs
from flax.core import freeze, unfreeze

from vit22b_transfer.checkpoints import reading, restoring, writing
from vit22b_transfer.models.freezing import frozen_mask
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, state

_REASON = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
t5x_checkpoints = pytest.importorskip("t5x.checkpoints", reason=_REASON)
t5x_optimizers = pytest.importorskip("t5x.optimizers", reason=_REASON)
t5x_partitioning = pytest.importorskip("t5x.partitioning", reason=_REASON)
t5x_train_state = pytest.importorskip("t5x.train_state", reason=_REASON)
t5x_adapter = pytest.importorskip("vit22b_transfer.t5x_adapter", reason=_REASON)

STEP = 7
MESHES = (tiny_runs.ONE_DEVICE, Partitioning(data=2, model=4))
FROZEN = ("encoder/tower/.*",)


def wrapped_by_t5x(model, params):
    """T5X's own wrapper of the same optax chain, which knows nothing of ours."""
    if not model.frozen:
        return t5x_optimizers.OptaxWrapper(model.optimizer_def)
    mask = frozen_mask(unfreeze(params), model.frozen)
    labels = jax.tree.map(lambda frozen: "frozen" if frozen else "train", mask)
    parts = {"train": model.optimizer_def, "frozen": optax.set_to_zero()}
    return t5x_optimizers.OptaxWrapper(optax.multi_transform(parts, freeze(labels)))


def wrapped_by_us(model, params):
    return t5x_adapter.Optimizer(model.optimizer_def, model.frozen)


# name -> (optimizer, frozen parameters, T5X optimizer made of them)
RUNS = {
    "adamw": (optimizers.adamw(0.1, weight_decay=0.1), (), wrapped_by_t5x),
    "frozen": (optimizers.adamw(0.1, weight_decay=0.1), FROZEN, wrapped_by_t5x),
    "sgd": (optimizers.sgd(0.1, clip_norm=None), (), wrapped_by_t5x),
    "frozen_adapter": (optimizers.adamw(0.1), FROZEN, wrapped_by_us),
    "adafactor_adapter": (optimizers.adafactor(0.1), FROZEN, wrapped_by_us),
    "average_adapter": (optimizers.sgd(0.1, ema_decay=0.9), FROZEN, wrapped_by_us),
}


@functools.cache
def partitioner():
    return t5x_partitioning.PjitPartitioner(model_parallel_submesh=(1, 2, 1, 1))


class Run:
    """A model, and its train state with random values as T5X lays it out."""

    def __init__(self, name):
        optimizer, frozen, wrap = RUNS[name]
        dtype = "bfloat16" if frozen else "float32"
        self.model = tiny_runs.LinearModel(optimizer, frozen=frozen, tower_dtype=dtype)
        batch = tiny_models.batch(8)
        variables = freeze(
            self.model.get_initial_variables(
                jax.random.key(0), {name: array.shape for name, array in batch.items()}
            )
        )
        self.variables = variables
        definition = wrap(self.model, variables["params"])
        fresh = t5x_train_state.FlaxOptimTrainState.create(definition, variables)
        rng = np.random.default_rng(0)

        def draw(leaf):
            value = 10 * rng.standard_normal(np.shape(leaf))
            return np.asarray(np.abs(value)).astype(jnp.result_type(leaf))

        drawn = jax.tree.map(draw, fresh.state_dict())
        drawn["state"]["step"] = np.int32(STEP)
        self.state = partitioner().partition(
            lambda state: state,
            in_axis_resources=None,
            out_axis_resources=partitioner().get_mesh_axes(fresh),
        )(fresh.restore_state(drawn))
        self.arrays = jax.tree.map(np.asarray, unfreeze(self.state.state_dict()))

    def ours(self, partitioning=tiny_runs.ONE_DEVICE):
        """(optimizer, abstract train state) of our runtime."""
        params = tiny_runs.abstract_params(self.model, partitioning)
        optimizer = optimizers.freeze(
            self.model.optimizer_def, params, self.model.frozen
        )
        return optimizer, state.abstract_state(params, optimizer, partitioning)

    def orbax(self, directory, train_state=None):
        return t5x_checkpoints.OrbaxCheckpointManagerInterface(
            str(directory), train_state or self.state, partitioner()
        )

    def save_orbax(self, directory):
        directory.mkdir()
        manager = self.orbax(directory)
        manager.save(self.state)
        manager.wait_until_finished()
        manager.close()

    def save_legacy(self, directory, save_dtype=None):
        directory.mkdir()
        t5x_checkpoints.Checkpointer(
            self.state, partitioner(), str(directory), save_dtype=save_dtype
        ).save(self.state)

    def save_ours(self, directory):
        directory.mkdir()
        partitioning = Partitioning(data=4, model=2, parameter_partitioning_dims=2)
        tree = state.to_checkpoint_tree(self.ours(partitioning)[1])
        writer = writing.CheckpointWriter(str(directory))
        arrays = jax.tree.map(
            lambda x, leaf: jax.device_put(x, leaf.sharding), self.arrays, tree
        )
        writer.save(STEP, arrays, {})
        writer.close()


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    return Run(request.param)


def tree_of_metadata(model_dir):
    path = os.path.join(model_dir, f"checkpoint_{STEP}", "state", "_METADATA")
    with open(path, encoding="utf-8") as file:
        return set(json.load(file)["tree_metadata"])


@pytest.mark.parametrize("form", ["orbax", "legacy"])
def test_a_checkpoint_of_t5x_comes_back_bit_for_bit(run, form, tmp_path):
    model_dir = tmp_path / form
    run.save_orbax(model_dir) if form == "orbax" else run.save_legacy(model_dir)
    assert reading.complete_steps(str(model_dir)) == [STEP]
    for partitioning in MESHES:
        _, abstract = run.ours(partitioning)
        tree = state.to_checkpoint_tree(abstract)
        restored = reading.restore_tree(str(model_dir), tree)
        tiny_runs.assert_same_bits(restored, run.arrays)
        shardings = state.shardings_of(abstract.params)
        params = restoring.restore_params(
            str(model_dir), abstract.params, shardings, model=run.model
        )
        tiny_runs.assert_same_bits(params, run.arrays["target"])
        assert state.shardings_of(params) == shardings


def test_t5x_restores_ours_bit_for_bit(run, tmp_path):
    run.save_ours(tmp_path / "ours")
    manager = run.orbax(tmp_path / "ours", jax.tree.map(jnp.zeros_like, run.state))
    restored = manager.restore(manager.latest_step())
    manager.close()
    assert restored.step == STEP
    tiny_runs.assert_same_bits(unfreeze(restored.state_dict()), run.arrays)


def test_t5x_restores_the_parameters_of_ours_for_inference(run, tmp_path):
    run.save_ours(tmp_path / "ours")
    empty = t5x_train_state.InferenceState.create(run.variables)
    manager = run.orbax(tmp_path / "ours", empty)
    restored = manager.restore(path=str(tmp_path / "ours" / f"checkpoint_{STEP}"))
    manager.close()
    tiny_runs.assert_same_bits(unfreeze(restored.params), run.arrays["target"])


def test_both_write_the_same_tree(run, tmp_path):
    run.save_ours(tmp_path / "ours")
    run.save_orbax(tmp_path / "t5x")
    ours, theirs = (tree_of_metadata(tmp_path / name) for name in ("ours", "t5x"))
    assert ours == theirs


def test_a_step_after_the_checkpoint_of_t5x_is_the_step_of_t5x(run, tmp_path):
    run.save_orbax(tmp_path / "t5x")
    optimizer, abstract = run.ours()
    tree = reading.restore_tree(
        str(tmp_path / "t5x"), state.to_checkpoint_tree(abstract)
    )
    ours = state.from_checkpoint_tree(tree, abstract)
    grads = jax.tree.map(lambda x: jnp.ones_like(x) / 8, ours.params)

    def step(state, grads):
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates)

    params = jax.jit(step)(ours, grads)
    theirs = jax.jit(lambda state, grads: state.apply_gradient(grads, 0.0))(
        run.state, freeze(jax.tree.map(np.asarray, grads))
    )
    # Parameters and updates are up to 40 large: an ulp of those is 4e-6.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
        jax.tree.map(lambda x: np.asarray(x, np.float32), params),
        jax.tree.map(lambda x: np.asarray(x, np.float32), unfreeze(theirs.params)),
    )
    before = run.arrays["target"]["decoder"]["kernel"]
    assert np.all(params["decoder"]["kernel"] != before)


def test_what_t5x_upcast_is_refused_without_cast(tmp_path):
    run = Run("frozen")
    run.save_legacy(tmp_path / "legacy", save_dtype=np.float32)
    _, abstract = run.ours()
    path, params = str(tmp_path / "legacy"), abstract.params
    with pytest.raises(ValueError, match="tower/kernel: dtype float32 in the check"):
        restoring.restore_params(path, params, state.shardings_of(params))
    restored = restoring.restore_partial(path, params, cast=True)
    tiny_runs.assert_same_bits(restored.params, run.arrays["target"])


def test_another_optimizer_of_t5x_is_refused_by_name(tmp_path):
    Run("sgd").save_legacy(tmp_path / "legacy")
    run = Run("adamw")
    tree = state.to_checkpoint_tree(run.ours()[1])
    with pytest.raises(ValueError, match="is of another optimizer") as error:
        reading.restore_tree(str(tmp_path / "legacy"), tree)
    assert "state/param_states/0/trace/decoder/kernel: not in the" in str(error.value)
