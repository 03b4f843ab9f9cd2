"""Legacy T5X checkpoints, written here with tensorstore and msgpack as T5X does."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
import tiny_runs
from flax import serialization, traverse_util

from vit22b_transfer.checkpoints import legacy, reading, restoring
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, state

FSDP = Partitioning(data=4, model=2, parameter_partitioning_dims=2)
KERNEL = "encoder/tower/kernel"


def tree(partitioning=tiny_runs.ONE_DEVICE, optimizer=None):
    """A train state with a frozen bfloat16 tower: arrays, and their abstract."""
    model = tiny_runs.LinearModel(optimizer, tower_dtype="bfloat16", frozen=(KERNEL,))
    params = tiny_runs.abstract_params(model, partitioning)
    optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
    abstract = state.abstract_state(params, optimizer, partitioning)
    abstract = state.to_checkpoint_tree(abstract)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return np.asarray(100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(draw, abstract), abstract


def write(path, arrays, *, version=3, spec=None, index=None):
    """`path` as a legacy checkpoint of nested dicts; scalars are in the index.

    spec: another form of the specs, from the usual one. index: another index, from the
    usual tree of leaves.
    """
    os.makedirs(path)
    leaves = {}
    for name, value in flatten(arrays).items():
        value = np.asarray(value)
        leaves[name] = value
        if value.ndim:
            leaves[name] = store(path, name.replace("/", "."), value)
            leaves[name] = (spec or (lambda leaf: leaf))(leaves[name])
    contents = {"version": version, "optimizer": nested(leaves)}
    contents = contents if index is None else index(contents["optimizer"])
    with open(os.path.join(path, "checkpoint"), "wb") as file:
        file.write(serialization.msgpack_serialize(contents))
    return str(path)


def store(path, name, value):
    spec = {
        "driver": "zarr",
        "dtype": value.dtype.name,
        "kvstore": {"driver": "file", "path": f"{name}/"},
        "metadata": {
            "chunks": [max(1, size // 2) for size in value.shape],
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(value.shape),
        },
    }
    absolute = {"driver": "file", "path": f"{os.path.join(path, name)}/"}
    opened = tensorstore.open(spec | {"kvstore": absolute}, create=True).result()
    opened.write(value).result()
    return spec


def flatten(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def nested(flat):
    return traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, arrays, abstract) of a legacy checkpoint that tests only read."""
    arrays, abstract = tree()
    path = tmp_path_factory.mktemp("legacy") / "checkpoint_5"
    return write(path, arrays), arrays, abstract


@pytest.fixture
def copied(saved, tmp_path):
    """The same as a copy that a test may damage."""
    return shutil.copytree(saved[0], tmp_path / "checkpoint_5")


def read_index(path):
    with open(os.path.join(path, "checkpoint"), "rb") as file:
        return serialization.msgpack_restore(file.read())


def write_index(path, contents):
    with open(os.path.join(path, "checkpoint"), "wb") as file:
        file.write(serialization.msgpack_serialize(contents))


def change_spec(path, **changes):
    """Changes the index entry of the tower's kernel."""
    contents = read_index(path)
    contents["optimizer"]["target"]["encoder"]["tower"]["kernel"] |= changes
    write_index(path, contents)


def restore_params(path, abstract):
    params = abstract["target"]
    return restoring.restore_params(str(path), params, state.shardings_of(params))


# --- What comes back ---


@pytest.mark.parametrize("partitioning", [tiny_runs.ONE_DEVICE, FSDP])
def test_a_train_state_comes_back_bit_for_bit_in_its_shardings(saved, partitioning):
    path, arrays, _ = saved
    _, abstract = tree(partitioning)
    restored = reading.restore_tree(path, abstract)
    tiny_runs.assert_same_bits(restored, arrays)
    jax.tree.map(
        lambda leaf, want: leaf.sharding == want.sharding or pytest.fail(str(leaf)),
        restored,
        abstract,
    )


def test_only_the_parameters_are_read_for_inference(saved):
    path, arrays, abstract = saved
    for source in (path, os.path.dirname(path)):
        restored = restore_params(source, abstract)
        tiny_runs.assert_same_bits(restored, arrays["target"])


def test_shapes_and_dtypes_are_known_without_the_data(copied, saved):
    for directory in copied.iterdir():
        if directory.is_dir():
            for chunk in directory.iterdir():
                chunk.unlink() if chunk.name != ".zarray" else None
    found = {
        name: (leaf.shape, leaf.dtype)
        for name, leaf in reading.saved_arrays(str(copied)).items()
    }
    _, arrays, _ = saved
    assert found == {n: (x.shape, x.dtype) for n, x in flatten(arrays).items()}


def test_little_memory_reads_the_same(saved, monkeypatch):
    path, arrays, _ = saved
    monkeypatch.setattr(legacy, "_BYTES_IN_FLIGHT", 100)
    _, abstract = tree(FSDP)
    tiny_runs.assert_same_bits(reading.restore_tree(path, abstract), arrays)


def test_training_resumes_from_a_legacy_checkpoint(tmp_path):
    whole = tiny_runs.run(tmp_path / "whole", keep=None)
    abstract = state.to_checkpoint_tree(abstract_of_a_run())
    path = reading.checkpoint_path(str(tmp_path / "whole"), 10)
    arrays = reading.restore_tree(path, abstract)
    write(tmp_path / "legacy" / "checkpoint_10", arrays)
    resumed = tiny_runs.run(tmp_path / "legacy")
    assert resumed.step == whole.step == 12
    restored = [
        reading.restore_tree(str(tmp_path / name), abstract)
        for name in ("legacy", "whole")
    ]
    tiny_runs.assert_same_bits(*restored)


def abstract_of_a_run():
    model = tiny_runs.LinearModel()
    params = tiny_runs.abstract_params(model)
    return state.abstract_state(params, model.optimizer_def, tiny_runs.ONE_DEVICE)


# --- Older and other forms ---


def gfile(spec):
    return spec | {"kvstore": spec["kvstore"] | {"driver": "gfile"}}


def bucket(spec):
    store = {"driver": "gcs", "bucket": "dummy", "path": spec["kvstore"]["path"]}
    return spec | {"kvstore": store}


def path_outside_of_the_store(spec):
    store = {"driver": "gcs", "bucket": "dummy"}
    return spec | {"kvstore": store, "path": spec["kvstore"]["path"].rstrip("/")}


@pytest.mark.parametrize("spec", [gfile, bucket, path_outside_of_the_store])
def test_arrays_are_found_beside_the_index_wherever_they_were_written(tmp_path, spec):
    arrays, abstract = tree()
    path = write(tmp_path / "checkpoint_5", arrays, spec=spec)
    tiny_runs.assert_same_bits(reading.restore_tree(path, abstract), arrays)


def test_version_2_holds_bfloat16_as_its_bits(tmp_path):
    arrays, abstract = tree()
    bits = jax.tree.map(
        lambda x: x.view(np.uint16) if x.dtype == jnp.bfloat16 else x, arrays
    )
    path = write(tmp_path / "checkpoint_5", bits, version=2)
    tiny_runs.assert_same_bits(reading.restore_tree(path, abstract), arrays)


def test_version_3_does_not(tmp_path):
    arrays, abstract = tree()
    bits = arrays["target"]["encoder"]["tower"]["kernel"].view(np.uint16)
    arrays["target"]["encoder"]["tower"]["kernel"] = bits
    path = write(tmp_path / "checkpoint_5", arrays)
    with pytest.raises(ValueError, match=f"{KERNEL}: dtype uint16 in the checkpoint"):
        reading.restore_tree(path, abstract)


def test_arrays_may_all_be_in_the_index_and_untrained_states_none(tmp_path):
    arrays, abstract = tree()

    def index(_):
        leaves = nested(flatten(arrays))
        leaves["state"]["step"] = int(arrays["state"]["step"])
        leaves["state"]["param_states"]["nothing"] = None
        return {"version": 3, "optimizer": leaves}

    path = write(tmp_path / "checkpoint_5", arrays, index=index)
    for directory in (tmp_path / "checkpoint_5").iterdir():
        shutil.rmtree(directory) if directory.is_dir() else None
    tiny_runs.assert_same_bits(reading.restore_tree(path, abstract), arrays)


def test_the_first_orbax_layout_names_arrays_by_placeholders(tmp_path):
    arrays, abstract = tree()

    def index(leaves):
        return nested(
            {
                name: leaf
                if isinstance(leaf, np.ndarray)
                else "PLACEHOLDER://" + name.replace("/", ".")
                for name, leaf in flatten_to_specs(leaves).items()
            }
        )

    write(tmp_path / "checkpoint_5" / "state", arrays, index=index)
    restored = reading.restore_tree(str(tmp_path), abstract)
    tiny_runs.assert_same_bits(restored, arrays)


def flatten_to_specs(leaves):
    return traverse_util.flatten_dict(
        leaves, sep="/", is_leaf=lambda _, leaf: "kvstore" in leaf
    )


# --- What is refused ---


def test_an_index_cut_off_anywhere_is_an_error(copied):
    content = (copied / "checkpoint").read_bytes()
    for length in range(0, len(content), 7):
        (copied / "checkpoint").write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged or cut off"):
            reading.saved_arrays(str(copied))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"version": 1, "optimizer": {}},
            "of version 1; readable are versions 2 and 3",
        ),
        ({"version": 4, "optimizer": {}}, "of version 4"),
        ({"target": {}}, "of version None"),
        ({"version": 3}, "with an 'optimizer' inside"),
        ([1, 2], "of version None"),
    ],
)
def test_an_index_of_another_kind_is_an_error(copied, content, message):
    write_index(copied, content)
    with pytest.raises(ValueError, match=message):
        reading.saved_arrays(str(copied))


def test_a_tensorflow_checkpoint_is_named(copied):
    (copied / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-0"\n')
    with pytest.raises(ValueError, match="this is a TensorFlow checkpoint"):
        reading.saved_arrays(str(copied))


@pytest.mark.parametrize(
    "outside", ["../elsewhere/", "/etc/", "target.decoder.kernel/../../elsewhere", ".."]
)
def test_a_path_out_of_the_checkpoint_is_an_error(copied, outside):
    (copied.parent / "elsewhere").mkdir()
    change_spec(copied, kvstore={"driver": "file", "path": outside})
    with pytest.raises(ValueError, match=f"{KERNEL}: .* leads out of the checkpoint"):
        reading.saved_arrays(str(copied))


def test_a_link_out_of_the_checkpoint_is_an_error(copied):
    inside, outside = copied / "target.encoder.tower.kernel", copied.parent / "moved"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(ValueError, match=f"{KERNEL}: .* leads out of the checkpoint"):
        reading.saved_arrays(str(copied))


def test_missing_arrays_are_all_named(copied):
    shutil.rmtree(copied / "target.encoder.tower.kernel")
    (copied / "target.decoder.kernel" / ".zarray").unlink()
    with pytest.raises(ValueError) as error:
        reading.saved_arrays(str(copied))
    message = str(error.value)
    assert "incomplete or damaged" in message
    assert f"target/{KERNEL}: the directory " in message and "is missing" in message
    assert "target.decoder.kernel has no .zarray; some ways to copy" in message
    assert "embedding" not in message


def test_damaged_arrays_are_errors_that_name_them(copied, saved):
    (copied / "target.decoder.kernel" / "1.1").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="target/decoder/kernel cannot be read: ") as e:
        restore_params(copied, saved[2])
    assert "tensorstore_spec" not in str(e.value)
    (copied / "target.decoder.kernel" / ".zarray").write_text("{")
    with pytest.raises(ValueError, match="target/decoder/kernel: .*JSON") as e:
        reading.saved_arrays(str(copied))
    assert "tensorstore_spec" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"driver": "n5"}, "stored by 'n5'; only zarr is readable"),
        ({"kvstore": {"driver": "file"}}, "in the index has no path"),
        ({"metadata": {"shape": [768, 9]}}, r"shape \(768, 8\), the index says .* 9\)"),
    ],
)
def test_an_index_entry_that_cannot_be_followed_is_an_error(copied, changes, message):
    change_spec(copied, **changes)
    with pytest.raises(ValueError, match=f"{KERNEL}: .*{message}"):
        reading.saved_arrays(str(copied))


def test_a_leaf_that_is_no_array_is_an_error(copied):
    contents = read_index(copied)
    contents["optimizer"]["state"]["step"] = "five"
    write_index(copied, contents)
    with pytest.raises(ValueError, match="state/step: .* in the index is a str"):
        reading.saved_arrays(str(copied))


def test_half_written_checkpoints_are_ignored(copied):
    shutil.copytree(copied, copied.parent / "checkpoint_9.tmp-1700000000")
    shutil.copytree(copied, copied.parent / "checkpoint_8")
    (copied.parent / "checkpoint_8" / "checkpoint").unlink()
    assert reading.complete_steps(str(copied.parent)) == [5]


def test_shapes_dtypes_and_names_must_fit_the_model(saved):
    path, _, abstract = saved
    params = flatten(abstract["target"])
    for name, shape, dtype in (
        ("token_embedder/embedding", (72, 8), "float32"),
        (KERNEL, params[KERNEL].shape, "float32"),
    ):
        params[name] = jax.ShapeDtypeStruct(
            shape, jnp.dtype(dtype), sharding=params[name].sharding
        )
    params["decoder/kernels"] = params.pop("decoder/kernel")
    with pytest.raises(ValueError) as error:
        restore_params(path, {"target": nested(params)})
    for line in (
        "target/token_embedder/embedding: shape (64, 8) in the checkpoint, (72, 8) in",
        f"target/{KERNEL}: dtype bfloat16 in the checkpoint, float32 in the model",
        "target/decoder/kernel: not in the model",
        "target/decoder/kernels: not in the checkpoint; nearest: target/decoder/kernel",
    ):
        assert line in str(error.value)


def test_a_state_of_another_optimizer_says_how_to_load_the_parameters(saved):
    path, arrays, _ = saved
    _, abstract = tree(optimizer=optimizers.sgd(0.1))
    with pytest.raises(ValueError, match="of another optimizer") as error:
        reading.restore_tree(path, abstract)
    assert "/train/inner_state/1/trace/decoder/kernel: not in the che" in str(
        error.value
    )
    assert "/train/inner_state/1/nu/decoder/kernel: not in the model" in str(
        error.value
    )
    assert "gin_configs/runs/from_checkpoint.gin" in str(error.value)
    restored = restoring.restore_partial(path, abstract["target"])
    tiny_runs.assert_same_bits(restored.params, arrays["target"])


# --- Partial restore ---


def test_a_partial_restore_renames_and_casts(saved):
    path, arrays, abstract = saved
    params = flatten(abstract["target"])
    kernel = params.pop(KERNEL)
    params["vit/kernel"] = jax.ShapeDtypeStruct(
        kernel.shape, jnp.dtype("float32"), sharding=kernel.sharding
    )
    rules = [(r"vit/(.*)", r"encoder/tower/\1"), (r"token_.*", None)]
    with pytest.raises(ValueError, match=r"vit/kernel .*: dtype bfloat16"):
        restoring.restore_partial(path, nested(params), rules)
    restored = restoring.restore_partial(path, nested(params), rules, cast=True)
    expected = flatten(arrays["target"])[KERNEL].astype(np.float32)
    tiny_runs.assert_same_bits(restored.params["vit"]["kernel"], expected)
    assert restored.kept == ["token_embedder/embedding"]
    assert restored.unused == ["token_embedder/embedding"]


def test_float32_is_rounded_to_the_nearest_bfloat16(tmp_path):
    arrays, abstract = tree()
    exact = np.random.default_rng(1).standard_normal((768, 8)).astype(np.float32)
    arrays["target"]["encoder"]["tower"]["kernel"] = exact
    path = write(tmp_path / "checkpoint_5", arrays)
    restored = restoring.restore_partial(path, abstract["target"], cast=True)
    kernel = restored.params["encoder"]["tower"]["kernel"]
    tiny_runs.assert_same_bits(kernel, jnp.asarray(exact).astype(jnp.bfloat16))


def test_training_starts_from_a_legacy_checkpoint(saved, tmp_path):
    from vit22b_transfer.training.train import InitialCheckpoint

    path, arrays, _ = saved
    model = tiny_runs.LinearModel(optimizers.sgd(0.0))
    initial = InitialCheckpoint(path=path, cast=True)
    tiny_runs.run(tmp_path, model, total_steps=1, initial=initial)
    expected = arrays["target"]["encoder"]["tower"]["kernel"].astype(np.float32)
    trained = tiny_runs.saved_params(tmp_path, model)["encoder"]["tower"]["kernel"]
    tiny_runs.assert_same_bits(trained, expected)


def test_the_index_of_the_writer_here_is_of_the_documented_form(saved):
    contents = read_index(saved[0])
    spec = contents["optimizer"]["target"]["encoder"]["tower"]["kernel"]
    assert contents["version"] == 3
    assert spec["kvstore"] == {"driver": "file", "path": "target.encoder.tower.kernel/"}
    with open(os.path.join(saved[0], spec["kvstore"]["path"], ".zarray")) as file:
        assert json.load(file)["shape"] == [768, 8]
