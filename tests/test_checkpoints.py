"""Checkpoints: what comes back, where it lies, and what is refused by name."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
import tiny_runs
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from vit22b_transfer.checkpoints import identity, reading, restoring, writing
from vit22b_transfer.host import whole_files
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, state


def tree(partitioning=tiny_runs.ONE_DEVICE, model=None):
    """A whole train state as it is saved, with a bfloat16 tower, and its abstract."""
    model = model or tiny_runs.LinearModel(
        tower_dtype="bfloat16", frozen=("encoder/tower/kernel",)
    )
    params = tiny_runs.abstract_params(model, partitioning)
    optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
    abstract = state.abstract_state(params, optimizer, partitioning)
    abstract = state.to_checkpoint_tree(abstract)
    rng = np.random.default_rng(0)

    def draw(leaf):
        value = np.asarray(100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return jax.device_put(value, leaf.sharding)

    return jax.tree.map(draw, abstract), abstract, model


def save(directory, arrays, step=5, record=None, keep=1):
    writer = writing.CheckpointWriter(str(directory), keep)
    writer.save(step, arrays, record or {})
    writer.close()
    return reading.checkpoint_path(str(directory), step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, arrays, abstract, model) of a checkpoint that tests only read."""
    arrays, abstract, model = tree()
    record = {"vocabularies": identity.vocabulary_record(model)}
    path = save(tmp_path_factory.mktemp("saved"), arrays, record=record)
    return path, arrays, abstract, model


def replaced(abstract, name, **changes):
    """`abstract` parameters with another shape or dtype of one."""
    flat = reading.flatten(abstract)
    fields = {k: getattr(flat[name], k) for k in ("shape", "dtype", "sharding")}
    fields |= changes
    flat[name] = jax.ShapeDtypeStruct(
        fields["shape"], fields["dtype"], sharding=fields["sharding"]
    )
    return nested(flat)


def nested(flat):
    return traverse_util.unflatten_dict(flat, sep="/")


# --- What comes back ---


def test_a_train_state_comes_back_bit_for_bit_with_its_dtypes(saved):
    path, arrays, abstract, _ = saved
    restored = reading.restore_tree(path, abstract)
    assert restored["target"]["encoder"]["tower"]["kernel"].dtype == jnp.bfloat16
    assert restored["state"]["step"].dtype == jnp.int32
    tiny_runs.assert_same_bits(reading.flatten(restored), reading.flatten(arrays))


def test_a_checkpoint_has_the_layout_of_t5x(saved):
    path, _, _, _ = saved
    assert os.path.basename(path) == "checkpoint_5"
    assert os.path.isfile(os.path.join(path, "_CHECKPOINT_METADATA"))
    names = set(reading.saved_arrays(path))
    assert "target/decoder/kernel" in names and "state/step" in names
    states = {name for name in names if name.startswith("state/param_states/")}
    assert states and all("encoder/tower/kernel" not in name for name in states)


def test_parts_of_the_optimizer_state_without_arrays_leave_no_trace():
    params = {"x": jnp.zeros((2,))}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale(0.1))
    before = state.TrainState(jnp.int32(3), params, optimizer.init(params))
    written = state.to_checkpoint_tree(before)
    assert set(written["state"]) == {"step"}
    assert state.from_checkpoint_tree(written, before) == before


def test_checkpoints_that_still_have_those_parts_are_read(tmp_path):
    arrays, abstract, _ = tree()
    states = {"inner_states": {"frozen": {"inner_state": {}}}}
    inner = arrays["state"]["param_states"]["inner_states"]
    states["inner_states"]["train"] = {
        "inner_state": {"0": {}} | inner["train"]["inner_state"]
    }
    older = arrays | {"state": {**arrays["state"], "param_states": states}}
    path = save(tmp_path, older)
    restored = reading.restore_tree(path, abstract)
    tiny_runs.assert_same_bits(restored, arrays)


def test_a_checkpoint_of_one_mesh_restores_on_another(tmp_path):
    arrays, _, _ = tree(Partitioning(data=4, model=2, parameter_partitioning_dims=2))
    path = save(tmp_path, arrays)
    for partitioning in (Partitioning(data=2, model=4), tiny_runs.ONE_DEVICE):
        _, abstract, _ = tree(partitioning)
        restored = reading.restore_tree(path, abstract)
        jax.tree.map(
            lambda leaf, want: (
                leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
                or pytest.fail(f"{leaf.sharding} is not {want.sharding}")
            ),
            restored,
            abstract,
        )
        tiny_runs.assert_same_bits(reading.flatten(restored), reading.flatten(arrays))


def test_steps_taken_while_saving_do_not_reach_the_checkpoint(tmp_path):
    sharding = NamedSharding(tiny_runs.ONE_DEVICE.mesh, PartitionSpec())
    arrays = {"target": {"x": jax.device_put(jnp.zeros((1 << 22,)), sharding)}}
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1.0, tree), donate_argnums=0)
    abstract = jax.eval_shape(lambda: arrays)
    writer = writing.CheckpointWriter(str(tmp_path))
    writer.save(1, arrays, {})
    for _ in range(5):
        arrays = add(arrays)
    writer.close()
    path = reading.checkpoint_path(str(tmp_path), 1)
    restored = restoring.restore_params(
        path, abstract["target"], jax.tree.map(lambda _: sharding, abstract["target"])
    )
    assert not np.any(restored["x"])


def test_only_the_parameters_are_read_for_inference(saved):
    path, arrays, abstract, model = saved
    params = abstract["target"]
    for source in (path, os.path.dirname(path)):
        restored = restoring.restore_params(
            source, params, state.shardings_of(params), model=model
        )
        tiny_runs.assert_same_bits(restored, arrays["target"])


def test_files_that_only_newer_versions_of_orbax_write_may_be_absent(saved, tmp_path):
    path, arrays, abstract, _ = saved
    copy = shutil.copytree(path, tmp_path / "checkpoint_5")
    (copy / "_CHECKPOINT_METADATA").unlink()
    (copy / "state" / "_sharding").unlink()
    shutil.rmtree(copy / "state" / "array_metadatas")
    restored = reading.restore_tree(str(tmp_path), abstract)
    tiny_runs.assert_same_bits(restored, arrays)


# --- Directories ---


def test_half_written_checkpoints_are_ignored(saved, tmp_path):
    path, _, _, _ = saved
    shutil.copytree(path, tmp_path / "checkpoint_5")
    shutil.copytree(path, tmp_path / "checkpoint_9")
    (tmp_path / "checkpoint_9" / "state" / "_METADATA").unlink()
    shutil.copytree(path, tmp_path / "checkpoint_8.orbax-checkpoint-tmp-123")
    (tmp_path / "checkpoint_10").mkdir()
    assert reading.latest_step(str(tmp_path)) == 5


def test_a_half_written_checkpoint_is_written_over(tmp_path):
    (tmp_path / "checkpoint_5" / "state").mkdir(parents=True)
    (tmp_path / "checkpoint_4.orbax-checkpoint-tmp-1").mkdir()
    arrays, abstract, _ = tree()
    path = save(tmp_path, arrays)
    assert os.listdir(tmp_path) == ["checkpoint_5"]
    reading.restore_tree(path, abstract)


@pytest.mark.parametrize(("keep", "left"), [(2, [3, 4]), (None, [1, 2, 3, 4])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    writer = writing.CheckpointWriter(str(tmp_path), keep)
    for step in (1, 2, 3, 4):
        writer.save(step, {"target": {"x": jnp.zeros((2,))}}, {})
    writer.close()
    assert reading.complete_steps(str(tmp_path)) == left


def test_checkpoints_of_other_programs_are_never_removed(tmp_path):
    theirs = save(tmp_path, {"target": np.ones(3)}, step=1)
    shutil.rmtree(os.path.join(theirs, "run"))  # T5X writes none
    save(tmp_path, {"target": np.ones(3)}, step=2)
    save(tmp_path, {"target": np.ones(3)}, step=3)
    assert reading.complete_steps(str(tmp_path)) == [1, 3]


def test_keeping_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        writing.CheckpointWriter(str(tmp_path), 0)


def test_a_relative_model_dir_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert whole_files.writable_directory("a/b", "model_dir") == str(
        tmp_path / "a" / "b"
    )
    assert (tmp_path / "a" / "b").is_dir()


def test_an_unwritable_model_dir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run.*cannot be written: Not a dir"):
        whole_files.writable_directory(str(tmp_path / "file" / "run"), "model_dir")


def test_a_path_without_a_checkpoint_says_what_is_there(tmp_path):
    with pytest.raises(ValueError, match="there is no directory"):
        reading.resolve(str(tmp_path / "nothing"))
    (tmp_path / ".lock").write_text("")
    with pytest.raises(ValueError, match="It holds: nothing"):
        reading.resolve(str(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="It holds: notes.txt"):
        reading.resolve(str(tmp_path))


# --- What is refused ---


def test_another_shape_or_dtype_is_an_error_that_names_each_parameter(saved):
    path, _, abstract, _ = saved
    params = replaced(abstract["target"], "token_embedder/embedding", shape=(72, 8))
    params = replaced(params, "encoder/tower/kernel", dtype=jnp.dtype("float32"))
    with pytest.raises(ValueError) as error:
        restoring.restore_params(path, params, state.shardings_of(params))
    message = str(error.value)
    assert (
        "target/token_embedder/embedding: shape (64, 8) in the checkpoint, (72, 8) in "
        "the model" in message
    )
    assert (
        "target/encoder/tower/kernel: dtype bfloat16 in the checkpoint, float32 in the "
        "model" in message
    )
    assert "decoder" not in message


def test_missing_and_left_over_parameters_are_named(saved):
    path, _, abstract, _ = saved
    params = reading.flatten(abstract["target"])
    params["decoder/kernels"] = params.pop("decoder/kernel")
    params = nested(params)
    with pytest.raises(ValueError) as error:
        restoring.restore_params(path, params, state.shardings_of(params))
    assert "target/decoder/kernel: not in the model" in str(error.value)
    assert (
        "target/decoder/kernels: not in the checkpoint; nearest: target/decoder/kernel"
        in str(error.value)
    )


def test_another_optimizer_is_refused_by_name(saved):
    path, _, _, _ = saved
    model = tiny_runs.LinearModel(
        optimizers.sgd(0.1),
        tower_dtype="bfloat16",
        frozen=("encoder/tower/kernel",),
    )
    _, abstract, _ = tree(model=model)
    with pytest.raises(ValueError, match=r"state/param_states/.*: not in the model"):
        reading.restore_tree(path, abstract)


def test_a_vocabulary_that_is_not_the_checkpoints_is_an_error(saved):
    path, _, abstract, _ = saved
    params = abstract["target"]
    other = tiny_runs.LinearModel(vocab_size=60)
    with pytest.raises(ValueError, match="there Vocabulary with 64 .* here .* with 60"):
        restoring.restore_params(path, params, state.shardings_of(params), model=other)


def test_equally_large_vocabularies_differ_by_their_content():
    class SentencePieces(tiny_models.Vocabulary):
        sp_model = b"one"

    class OtherPieces(SentencePieces):
        sp_model = b"two"

    model, other = tiny_runs.LinearModel(), tiny_runs.LinearModel()
    model.input_vocabulary, other.input_vocabulary = SentencePieces(), OtherPieces()
    ours, theirs = (identity.vocabulary_record(m) for m in (model, other))
    assert ours["input_vocabulary"]["sha256"] != theirs["input_vocabulary"]["sha256"]
    assert ours["output_vocabulary"] == theirs["output_vocabulary"]


# --- Partial restore ---


def test_a_partial_restore_loads_keeps_and_renames_by_rules(saved):
    path, arrays, abstract, _ = saved
    params = reading.flatten(abstract["target"])
    params["head/kernel"] = params.pop("decoder/kernel")
    params["new/bias"] = params["encoder/tower/bias"]
    rules = [(r"head/(.*)", r"decoder/\1"), (r"new/.*", None), (r".*embedding", None)]
    restored = restoring.restore_partial(path, nested(params), rules)
    loaded = reading.flatten(restored.params)
    saved_params = reading.flatten(arrays["target"])
    assert set(loaded) == {
        "head/kernel",
        "encoder/tower/kernel",
        "encoder/tower/bias",
    }
    tiny_runs.assert_same_bits(loaded["head/kernel"], saved_params["decoder/kernel"])
    assert restored.kept == ["token_embedder/embedding", "new/bias"]
    assert restored.unused == ["token_embedder/embedding"]
    summary = restored.summary()
    assert "loaded: 3" in summary and "kept: 2" in summary and "unused: 1" in summary
    assert "  head/kernel <- decoder/kernel" in summary.splitlines()


def test_numbered_layers_share_a_line_of_the_summary():
    names = [f"tower/layers_{i}/kernel" for i in range(12)]
    restored = restoring.PartialRestore({}, {}, names, [])
    assert "  tower/layers_*/kernel  (x12)" in restored.summary().splitlines()


def test_a_partial_restore_casts_only_when_told(saved):
    path, arrays, abstract, _ = saved
    name = "encoder/tower/kernel"
    params = replaced(abstract["target"], name, dtype=jnp.dtype("float32"))
    with pytest.raises(ValueError, match=f"{name}: dtype bfloat16 in the checkpoint"):
        restoring.restore_partial(path, params)
    restored = restoring.restore_partial(path, params, cast=True)
    kernel = reading.flatten(restored.params)[name]
    expected = reading.flatten(arrays["target"])[name].astype(jnp.float32)
    tiny_runs.assert_same_bits(kernel, expected)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [(r"head/.*", None)],
            r"rule 'head/\.\*' matches no parameter.* Nearest paths: ",
        ),
        ([(r"decoder/kernel", "deco/kernel")], r"decoder/kernel \(from deco/kernel\)"),
        ([(r".*bias", "decoder/kernel")], "'decoder/kernel' .* another parameter"),
    ],
)
def test_rules_that_cannot_work_are_an_error(saved, rules, message):
    path, _, abstract, _ = saved
    with pytest.raises(ValueError, match=message):
        restoring.restore_partial(path, abstract["target"], rules)


def test_another_vocabulary_may_keep_its_own_token_table(saved):
    path, _, abstract, _ = saved
    other = tiny_runs.LinearModel(vocab_size=60)
    with pytest.raises(ValueError, match="vocabulary is not the one"):
        restoring.restore_partial(path, abstract["target"], model=other)
    rules = [(r"token_embedder/.*", None), (r"decoder/.*", None)]
    restored = restoring.restore_partial(path, abstract["target"], rules, model=other)
    assert set(restored.loaded) == {"encoder/tower/kernel", "encoder/tower/bias"}
