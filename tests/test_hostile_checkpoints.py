"""Checkpoints of strangers, and those that a power cut left: each damage is named."""

import json

import jax
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hostile_files import measured

from vit22b_transfer import UserError, cli
from vit22b_transfer.checkpoints import legacy, reading, stored_sizes
from vit22b_transfer.weights import export
from vit22b_transfer.weights.files import tensor_files
from vit22b_transfer.weights.files.checkpoint_output import CheckpointOutput
from vit22b_transfer.weights.mapping import Slot

# --- T5X's before Orbax ---

frugal = pytest.fixture(measured)


def write_legacy(path, metadata=None, index=None):
    """A checkpoint with one array of 4 numbers, whose files say something else."""
    folder = path / "target.kernel"
    folder.mkdir(parents=True)
    zarr = dict(
        zarr_format=2,
        shape=[4],
        chunks=[4],
        dtype="<f4",
        compressor=None,
        fill_value=None,
        filters=None,
        order="C",
    )
    text = json.dumps(zarr | (metadata or {}))
    (folder / ".zarray").write_text(text)
    (folder / "0").write_bytes(np.arange(4, dtype="<f4").tobytes())
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": "target.kernel"}}
    tree = {"version": 3, "optimizer": {"target": {"kernel": spec | (index or {})}}}
    (path / "checkpoint").write_bytes(msgpack.packb(tree))
    return str(path)


def test_the_legacy_checkpoint_of_these_tests_is_whole(tmp_path):
    path = write_legacy(tmp_path / "checkpoint_1")
    np.testing.assert_array_equal(legacy.read_array(path, "target/kernel"), range(4))


@pytest.mark.parametrize(
    "metadata, match",
    [
        (dict(chunks=[2**31]), r"chunks are \(2147483648,\), 8589934592 bytes each"),
        (dict(chunks=[2**31], shape=[2**31]), "in files of [0-9]+ bytes"),
        (dict(chunks=[2**40], dtype="|u1"), r"chunks are \(1099511627776,\)"),
        (dict(chunks=[2**62]), "target/kernel: it cannot be read"),
        (dict(chunks=[0]), "target/kernel: it cannot be read"),
        (dict(shape="x"), "target/kernel: it cannot be read"),
        (dict(pad="x" * (2 << 20)), "zarray has more than 1048576 bytes"),
    ],
)
def test_chunks_that_no_file_holds_are_refused_before_they_are_read(
    metadata, match, frugal, tmp_path
):
    path = write_legacy(tmp_path / "checkpoint_1", metadata)
    with pytest.raises(UserError, match=match) as error:
        legacy.read_array(path, "target/kernel")
    assert path in str(error.value)


def test_arrays_without_files_are_not_taken_for_weights(tmp_path, capsys):
    """A chunk that is left out is zeros: of nothing but these there is no model."""
    big = dict(shape=[2**20, 2**15], chunks=[1, 1])
    path = write_legacy(tmp_path / "checkpoint_1", big)
    assert cli.main(["inspect", path, "--stats"]) == 1
    assert "arrays would take 137438953472 in memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "index, match",
    [
        (dict(metadata=[1]), "the index says None"),
        (dict(metadata={"shape": 4}), "the index says 4"),
        (dict(metadata={"shape": [None]}), "the index says"),
        (dict(kvstore={"path": "a\0b"}), "target/kernel: it cannot be read"),
        (dict(kvstore={"path": "x" * 10**5}), "target/kernel: "),
        (dict(driver={"a": 1}), "stored by .*only zarr is readable"),
    ],
)
def test_an_index_of_other_types_is_named(index, match, tmp_path):
    path = write_legacy(tmp_path / "checkpoint_1", index=index)
    with pytest.raises(UserError, match=match) as error:
        legacy.saved_arrays(path)
    assert path in str(error.value) and len(str(error.value)) < 1500


@pytest.mark.parametrize(
    "content, match",
    [
        (b"\x91" * 5000, "damaged or cut off: it cannot be read"),
        (msgpack.packb({"version": [3], "optimizer": {}}), "of version"),
        (msgpack.packb({"version": 3, "optimizer": {"a\n": 1}}), "an array is called"),
        (msgpack.packb({"version": 3, "optimizer": {"a": 2**40}}), "a: it cannot be"),
        (
            msgpack.packb(
                {"version": 3, "optimizer": {"a": {"__msgpack_chunked_array__": 1}}}
            ),
            "damaged or cut off: it cannot be read",
        ),
        (b"\0" * (9 << 20), "more than 8388608 bytes, too many for an index"),
    ],
)
def test_an_index_that_is_none_is_named(content, match, tmp_path):
    (tmp_path / "checkpoint_1").mkdir()
    (tmp_path / "checkpoint_1" / "checkpoint").write_bytes(content)
    with pytest.raises(UserError, match=match):
        legacy.saved_arrays(str(tmp_path / "checkpoint_1"))


# --- Ours ---


@pytest.fixture
def ours(tmp_path):
    """A checkpoint of ours with one array."""
    output = CheckpointOutput(
        str(tmp_path), {"kernel": ((4,), np.dtype(np.float32))}, "x"
    )
    output.write(Slot("kernel"), np.arange(4, dtype=np.float32), "kernel")
    output.write_record({})
    return tmp_path, output.finish()


def test_damage_in_orbaxs_own_files_is_named(ours):
    folder, path = ours
    for name in ("_METADATA", "manifest.ocdbt"):
        file = folder / "checkpoint_0" / "state" / name
        content = file.read_bytes()
        for damage in (
            b"",
            b"[" * 3000,
            b'{"a": 1}',
            content[:-9],
            bytes(len(content)),
        ):
            file.write_bytes(damage)
            for read in (tensor_files.open_tensors, reading.saved_arrays):
                with pytest.raises(UserError, match=str(folder)):
                    read(path)
        file.write_bytes(content)
    assert tensor_files.open_tensors(path)["target/kernel"].read().tolist()[3] == 3


@pytest.mark.parametrize(
    "content", [b'["x"]', b'{"array_metadatas": 7}', b"", b"[" * 3000]
)
def test_damage_in_what_orbax_reads_at_the_restore_is_named(content, ours):
    folder, path = ours
    (file,) = (folder / "checkpoint_0" / "state" / "array_metadatas").iterdir()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kernel = jax.ShapeDtypeStruct((4,), np.float32, sharding=one)
    tree = {"target": {"kernel": kernel}}
    assert reading.read_arrays(path, tree)["target"]["kernel"].tolist()[3] == 3
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"checkpoint {path} cannot be read: "):
        reading.read_arrays(path, tree)


@pytest.mark.parametrize("read", [tensor_files.open_tensors, reading.metadata])
def test_chunks_that_orbax_cannot_have_written_are_refused(read, tmp_path, frugal):
    """Each array's metadata is a file of its own where T5X was told so."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        tree = {"target": {"kernel": np.arange(4, dtype=np.float32)}}
        checkpointer.save(tmp_path / "state", args=ocp.args.PyTreeSave(tree))
    path = str(tmp_path / "state")
    assert read(path)
    (file,) = (tmp_path / "state").glob("*/.zarray")
    said = json.loads(file.read_text())
    for change in (dict(chunks=[2**31]), dict(chunks=[2**31], shape=[2**31])):
        file.write_text(json.dumps(said | change))
        with pytest.raises(UserError, match=r"kernel: its chunks are .2147483648") as e:
            read(path)
        assert path in str(e.value)


@pytest.mark.parametrize(
    "record, match",
    [
        (b"", "line 1, column 1: malformed JSON"),
        (b"\0" * 40, "malformed JSON"),
        (b"[]", "holds no JSON object"),
        (b'{"lora": {"alpha": "4"}}', "says lora = "),
        (b'{"lora": [1]}', "says lora = "),
        (b'{"tower": {"checkpoint": 1, "digest": "x"}}', "says tower = "),
        (b'{"vocabularies": {"input_vocabulary": {"class": "x"}}}', "says vocab"),
        (b'{"vocabularies": {"input_vocabulary": 7}}', "says vocab"),
        (b'{"window": {"a": "x"}}', "says window = "),
        (b'{"settings": [1]}', "says settings = "),
        (b'{"settings": {"task": {"a": 1}}}', "says settings = "),
    ],
)
def test_a_damaged_record_of_a_run_is_named(record, match, ours):
    _, path = ours
    with open(reading.record_file(path), "wb") as file:
        file.write(record)
    with pytest.raises(UserError, match=match) as error:
        reading.read_record(path)
    assert f"{path}/run/metadata" in str(error.value)


def test_towers_that_name_each_other_end_in_an_error(ours):
    _, path = ours
    with open(reading.record_file(path), "w") as file:
        json.dump({"tower": {"checkpoint": path, "digest": "x"}}, file)
    with pytest.raises(UserError, match="leads back to it"):
        reading.saved_arrays(path)


def test_chunks_are_compared_with_bytes_of_files():
    stored_sizes.check_chunk((8, 8), (8, 8), 4, 0)
    stored_sizes.check_chunk((2**30,), (2**28,), 4, 2**20)  # zeros
    for shape, chunk in (((4,), (2**30,)), ((2**40,), (2**40,))):
        with pytest.raises(UserError, match="its chunks are"):
            stored_sizes.check_chunk(shape, chunk, 4, 2**20)


# --- Our own records ---


def test_damaged_lines_of_an_interrupted_import_are_counted(tmp_path, caplog):
    arrays = {name: ((4,), np.dtype(np.float32)) for name in "abcd"}
    output = CheckpointOutput(str(tmp_path), arrays, "x")
    for name in "abc":
        output.write(Slot(name), np.ones(4, np.float32), name)
    record = tmp_path / "checkpoint_0.importing" / "import_progress.jsonl"
    lines = record.read_bytes().split(b"\n")
    lines[1:3] = [b"\0" * len(lines[1]), b'["b", 1.5, "x"]']
    record.write_bytes(b"\n".join(lines))
    again = CheckpointOutput(str(tmp_path), arrays, "x")
    assert [again.has(Slot(name)) for name in "abcd"] == [False, False, True, False]
    assert "has 2 damaged lines" in caplog.text


@pytest.mark.parametrize(
    "content, match",
    [
        ('{"family": 7, "tensors": {}}', "family = 7"),
        ('{"tensors": {}}', "lacks family"),
        ('{"family": "hf-t5", "tensors": [1]}', r"tensors = \[1\]"),
        ('{"family": "hf-t5", "tensors": {"a": [1e9]}}', "that a has the shape"),
        ('{"family": "hf-t5", "tensors": {"a": [-1]}}', "that a has the shape"),
        ('{"family": "hf-t5", "tensors": {"a": 4}}', "that a has the shape 4"),
        ("[", "malformed JSON"),
    ],
)
def test_a_damaged_record_of_an_import_is_named(content, match, tmp_path):
    (tmp_path / "import.json").write_text(content)
    with pytest.raises(UserError, match=match) as error:
        export._recorded(str(tmp_path), "hf-t5")
    assert "import.json" in str(error.value)
