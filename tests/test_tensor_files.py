"""Files of weights: read as their own libraries do, refused when they are broken."""

import io
import json
import pickle
import struct
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from torch_peers import torch

from vit22b_transfer.checkpoints import writing
from vit22b_transfer.weights.files import (
    config_values,
    tensor_files,
    tensor_writing,
)
from vit22b_transfer.weights.files.tensor_writing import LazyTensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "b.kernel": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "a.bias": rng.standard_normal(7).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
        "c": rng.standard_normal((2, 3)).astype(BFLOAT16),
    }


def assert_read(source, expected):
    found = tensor_files.open_tensors(str(source))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        tensor = found[name]
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
        assert tensor.nbytes == array.nbytes
        assert tensor.read().tobytes() == array.tobytes()
        for i in range(array.shape[0] if array.ndim else 0):
            assert tensor.read(i).tobytes() == array[i].tobytes()


def lazy(arrays):
    return [
        LazyTensor(name, array.shape, array.dtype, lambda array=array: array)
        for name, array in arrays.items()
    ]


# --- Reading what others wrote ---


def test_safetensors_are_read_as_their_library_wrote_them(tmp_path):
    safetensors_numpy.save_file(drawn(), tmp_path / "model.safetensors")
    assert_read(tmp_path / "model.safetensors", drawn())
    assert_read(tmp_path, drawn())  # the directory, too


def test_safetensors_that_we_write_are_read_by_their_library(tmp_path):
    tensor_writing.write_safetensors(
        str(tmp_path), lazy(drawn()), max_shard_bytes=10**9, done=lambda _: None
    )
    assert_read(tmp_path, drawn())
    for name, array in safetensors_numpy.load_file(
        tmp_path / "model.safetensors"
    ).items():
        assert array.tobytes() == drawn()[name].tobytes()


def test_shards_are_written_and_read_with_their_index(tmp_path):
    counted = []
    tensor_writing.write_safetensors(
        str(tmp_path), lazy(drawn()), max_shard_bytes=250, done=counted.append
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert sum(counted) == sum(array.nbytes for array in drawn().values())
    assert_read(tmp_path, drawn())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_member_by_member(tmp_path, save):
    arrays = {name: a for name, a in drawn().items() if a.dtype != BFLOAT16}
    arrays["params/in fortran order"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    save(tmp_path / "w.npz", **arrays, c=drawn()["c"])
    found = tensor_files.open_tensors(str(tmp_path / "w.npz"))
    fortran = found.pop("params/in fortran order")
    np.testing.assert_array_equal(
        fortran.read(), arrays["params/in fortran order"], strict=True
    )
    np.testing.assert_array_equal(fortran.read(1), [3.0, 4.0, 5.0])
    for name, array in drawn().items():
        assert found[name].dtype == array.dtype
        assert found[name].read().tobytes() == array.tobytes()


def test_npz_that_we_write_is_loaded_by_numpy_without_pickle(tmp_path):
    path = tmp_path / "w.npz"
    tensor_writing.write_npz(str(path), lazy(drawn()), done=lambda _: None)
    with np.load(path, allow_pickle=False) as loaded:
        for name, array in drawn().items():
            assert loaded[name].tobytes() == array.tobytes()
            assert loaded[name].shape == array.shape
    assert_read(path, drawn())


def test_our_checkpoints_are_read_by_name(tmp_path):
    tree = {"target": {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}}}
    tree["state"] = {"step": jnp.int32(3)}
    writer = writing.CheckpointWriter(str(tmp_path))
    writer.save(3, tree, {})
    writer.close()
    expected = {
        "target/a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "state/step": np.array(3, np.int32),
    }
    for source in (tmp_path, tmp_path / "checkpoint_3"):
        assert_read(source, expected)


# --- What is refused ---


def refusal(path):
    with pytest.raises(ValueError) as caught:
        tensor_files.open_tensors(str(path))
    return str(caught.value)


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "truncated data": (
        safetensors_bytes({"a": entry(0, 400, [100])}, b"\0" * 399),
        "a ends at byte .* truncated.*fetch the file again",
    ),
    "truncated header": (
        safetensors_bytes({"a": entry(0, 4, [1])})[:20],
        "no safetensors file, or truncated",
    ),
    "a header length beyond the file": (
        struct.pack("<Q", 2**62) + b"{}",
        "announces a header of 4611686018427387904 bytes and has 10",
    ),
    "bytes that are not the shape's": (
        safetensors_bytes({"a": entry(0, 4, [10**12])}, b"\0" * 4),
        r"gives a 4 bytes, but shape \(1000000000000,\) of float32 takes 4000000000000",
    ),
    "overlap": (
        safetensors_bytes({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12),
        "b overlaps a",
    ),
    "a hole": (
        safetensors_bytes({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"\0" * 12),
        "b leaves a hole after a",
    ),
    "bytes of no tensor": (
        safetensors_bytes({"a": entry(0, 4, [1])}, b"\0" * 6),
        "2 bytes after the last tensor belong to none",
    ),
    "a negative offset": (
        safetensors_bytes({"a": entry(-4, 0, [1])}, b"\0" * 4),
        "the header's line for a is broken",
    ),
    "no offsets": (safetensors_bytes({"a": {"dtype": "F32"}}), "line for a is broken"),
    "an unknown dtype": (
        safetensors_bytes({"a": entry(0, 4, [1], "Q4")}, b"\0" * 4),
        "a has the unknown dtype 'Q4'; known are BOOL",
    ),
    "a name twice": (
        safetensors_bytes(
            b'{"a":' + json.dumps(entry(0, 0, [0])).encode() + b',"a":1}'
        ),
        "a is there twice",
    ),
    "no JSON": (
        safetensors_bytes(b"{ no }"),
        "its header, line 1, column 3: malformed JSON",
    ),
    "no object": (safetensors_bytes(b"[1]"), "not a JSON object"),
    "nothing": (b"", "is empty. The download was gated or cut off"),
    "a git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "pointer of git-lfs, not the weights; run `git lfs pull`",
    ),
    "a web page": (
        b"<!DOCTYPE html><html>Access to this model is gated</html>",
        "is a text .* gated or cut off: accept the model's terms",
    ),
    "an error in JSON": (b'{"error": "Access is restricted"}', "gated or cut off"),
    "a pickle": (pickle.dumps([1, 2]), "is a pickle whatever its name says"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_safetensors_file_is_refused_before_memory_is_taken(case, tmp_path):
    content, message = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tensor_files.open_tensors(str(path))


def shards(folder):
    tensor_writing.write_safetensors(
        str(folder), lazy(drawn()), max_shard_bytes=250, done=lambda _: None
    )
    return folder / "model.safetensors.index.json", folder / (
        "model-00002-of-00002.safetensors"
    )


def test_a_missing_shard_is_a_partial_download(tmp_path):
    _, second = shards(tmp_path)
    second.unlink()
    message = refusal(tmp_path)
    assert "lacks 1 of 2 shards: model-00002-of-00002.safetensors" in message
    assert "gated or cut off" in message


def test_shards_without_their_index_are_a_partial_download(tmp_path):
    index, _ = shards(tmp_path)
    index.unlink()
    assert "shards but no *.safetensors.index.json" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    _, second = shards(tmp_path)
    again = {"b.kernel": drawn()["b.kernel"], "c": drawn()["c"]}
    safetensors_numpy.save_file(again, second)
    assert "b.kernel is in two shards" in refusal(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"c": "model-00001-of-00002.safetensors"}, "c lies in model-00002-of-00002"),
        ({"d": "model-00001-of-00002.safetensors"}, "d is not in model-00001-of-00002"),
        ({"c": "../model.safetensors"}, "no weight_map of tensors to files beside it"),
    ],
)
def test_an_index_that_contradicts_the_shards_is_refused(change, message, tmp_path):
    index, _ = shards(tmp_path)
    said = json.loads(index.read_text())
    said["weight_map"] |= change
    index.write_text(json.dumps(said))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pth", "a.pkl"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(name, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        message = refusal(source)
        assert "is a pickle: to load one runs whatever code it holds" in message
        assert "safetensors.torch.save_file" in message and name in message


def test_an_npz_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([{}], object), allow_pickle=True)
    assert "a holds pickled Python objects" in refusal(tmp_path / "w.npz")


def test_torchs_zip_of_pickles_is_no_npz(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.npz")
    assert "pickles are zip files too; they are not opened" in refusal(
        tmp_path / "w.npz"
    )


def test_a_truncated_npz_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(1000))
    content = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "w.npz").write_bytes(content[: len(content) // 2])
    assert "no npz file, or truncated" in refusal(tmp_path / "w.npz")


def npy(array, shape=None):
    file = io.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False}
    header["shape"] = shape or array.shape
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def test_an_npz_header_that_lies_about_the_shape_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", npy(np.zeros(4), shape=(10**12,)))
    assert "a has" in (message := refusal(tmp_path / "w.npz"))
    assert "takes 8000000000" in message


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_npz_with_a_name_twice_or_without_arrays_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", npy(np.zeros(1)))
        archive.writestr("a.npy", npy(np.zeros(1)))
    assert "a is there twice" in refusal(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("a.npy", b"no header")
    assert "a has no readable header" in refusal(tmp_path / "v.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_in_an_npz_is_noticed_when_the_tensor_is_read(tmp_path, save):
    noise = np.random.default_rng(0).standard_normal(1000)
    save(tmp_path / "w.npz", a=noise)
    content = bytearray((tmp_path / "w.npz").read_bytes())
    content[4000] ^= 1
    (tmp_path / "w.npz").write_bytes(bytes(content))
    tensor = tensor_files.open_tensors(str(tmp_path / "w.npz"))["a"]
    with pytest.raises(ValueError, match="a(.npy)?:? .*(checksum|CRC|invalid)"):
        tensor.read()


def test_a_folder_of_images_is_told_as_such_and_not_as_a_broken_download(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "one.JPG").write_bytes(b"")
    inner = refusal(tmp_path)
    assert "holds pictures (cats/one.JPG) and no weights" in inner
    (tmp_path / "two.png").write_bytes(b"")
    message = refusal(tmp_path)
    assert "holds pictures (two.png, cats/one.JPG) and no weights" in message
    assert "config.json and *.safetensors" in message and "gated" not in message
    (tmp_path / "config.json").write_text("{}")  # a repository with a picture
    assert "gated or cut off" in refusal(tmp_path)


def test_what_is_no_source_is_refused_with_what_would_be(tmp_path):
    assert "there is no file or directory" in refusal(tmp_path / "none")
    assert "holds no weights" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path)
    assert "it holds: config.json" in message and "gated or cut off" in message
    (tmp_path / "notes.txt").write_text("a")
    assert "not a file of weights" in refusal(tmp_path / "notes.txt")
    for name in ("a.safetensors", "b.safetensors"):
        safetensors_numpy.save_file(drawn(), tmp_path / name)
    assert "several files of weights: a.safetensors, b.safet" in refusal(tmp_path)


def test_the_root_of_a_downloaded_repository_names_its_revisions(tmp_path):
    root = tmp_path / "models--org--name"
    (root / "snapshots" / "0123abc").mkdir(parents=True)
    (root / "refs").mkdir()
    for folder in (root, root / "snapshots"):
        message = refusal(folder)
        assert "root of a downloaded repository" in message
        assert f"{root}/snapshots/0123abc" in message


def test_a_config_that_is_a_web_page_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match="config.json, line 1, .*JSON.*gated or"):
        config_values.read_json(str(tmp_path), "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no JSON object but"):
        config_values.read_json(str(tmp_path), "config.json")
    assert config_values.read_json(str(tmp_path), "other.json") == {}
