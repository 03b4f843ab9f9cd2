"""Weights of strangers: small files that would take the memory or never end.

Sizes are compared with the files before any work; each refusal here comes at once and
in little memory, which a test of its own measures.
"""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hostile_files import measured
from test_weights_convert import CONFIG, PUBLISHED, write

from vit22b_transfer import UserError
from vit22b_transfer.weights import import_plan, mapping, sources
from vit22b_transfer.weights.adapters import peft_adapters
from vit22b_transfer.weights.families.table import FAMILIES
from vit22b_transfer.weights.files import config_values, tensor_files

frugal = pytest.fixture(measured)


def refused(path, match):
    with pytest.raises(UserError, match=match) as error:
        for tensor in tensor_files.open_tensors(str(path)).values():
            tensor.read()
    assert str(path) in str(error.value)


# --- safetensors ---


def write_header(path, header, data=0):
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + data)


def test_a_header_of_90_mb_is_not_read(frugal, tmp_path):
    path = tmp_path / "a.safetensors"
    write_header(path, b"", 90_000_000 + 2**30)
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 90_000_000))
    refused(path, "announces a header of 90000000 bytes .* at most 8388608")


def test_a_header_of_more_than_its_tensors_is_not_read(frugal, tmp_path):
    path = tmp_path / "a.safetensors"
    write_header(path, b"{}" + b" " * (3 << 20), 100)
    refused(path, "more than the 100 bytes of all its tensors")
    # Small ones may: of an adapter the names are longer than the numbers.
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    write_header(path, json.dumps({"a": entry}).encode() + b" " * (1 << 19), 1)
    assert tensor_files.open_tensors(str(path))["a"].read() == [0]


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header, match",
    [
        (b'{"a":' * 30000, "header: malformed JSON: .* nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "header: malformed JSON: .*4300 digits"),
        (b'{"a": \xff}', "header is not UTF-8"),
        ({"\ud83d": ENTRY}, "half of a character"),
        ({"a\x1b[2J": ENTRY}, r"called .*x1b\[2J.*, 5 characters"),
        ({"a" * 5000: ENTRY}, "5000 characters; expected are at most 1000"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, r"unknown dtype .*\['F32'\]"),
        ({"a": ENTRY | {"shape": [True]}}, "line for a is broken"),
        ({"a": ENTRY | {"shape": [1.0]}}, "line for a is broken"),
        ({"a": ENTRY | {"shape": [0, 2**62, 2**62]}}, "line for a is broken"),
        ({"a": ENTRY | {"shape": [1] * 40}}, "line for a is broken"),
        ({"a": ENTRY | {"data_offsets": [0, None]}}, "line for a is broken"),
    ],
)
def test_a_header_that_no_writer_makes_is_named(header, match, tmp_path):
    path = tmp_path / "a.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_header(path, text, 4)
    refused(path, match)


def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("a.npz", "b.safetensors"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "is no plain file")


# --- npz ---


def npy(shape, dtype="<f4", data=b""):
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def write_zip(path, members, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_an_array_that_inflates_250_fold_is_not_inflated(frugal, tmp_path):
    path, count = tmp_path / "a.npz", 20 << 20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("a.npy", "w", force_zip64=True) as file:
            file.write(npy((4 * count,)))
            for _ in range(count >> 18):
                file.write(bytes(1 << 22))
    assert os.path.getsize(path) < 16 * count / 200
    refused(path, "arrays would take 335544.* in memory, more than 16 times")


def test_many_arrays_that_inflate_are_counted_together(frugal, tmp_path):
    content = npy((1 << 20,), data=bytes(4 << 20))
    write_zip(tmp_path / "a.npz", {f"{i}.npy": content for i in range(20)})
    refused(tmp_path / "a.npz", "arrays would take 838.* more than 16 times")


def test_sizes_that_deflate_cannot_reach_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    write_zip(path, {"a.npy": npy((1 << 23,))})
    content = bytearray(path.read_bytes())
    # The size in the directory, where it is read.
    at = content.rindex(b"PK\1\2") + 24
    content[at : at + 4] = struct.pack("<I", len(npy((1 << 23,))) + (4 << 23))
    path.write_bytes(bytes(content))
    refused(path, "a has [0-9]+ bytes, which cannot become the 33554")


def test_a_directory_of_a_million_members_is_not_read(frugal, tmp_path):
    path = tmp_path / "a.npz"
    write_zip(path, {"a.npy": npy((1,), data=bytes(4))})
    content = path.read_bytes()
    at = content.rindex(b"PK\5\6")
    end = bytearray(content[at:])
    end[12:16] = struct.pack("<I", 500 << 20)
    with open(path, "r+b") as file:
        file.seek(at + (500 << 20))
        file.write(end)
    refused(path, "a directory of 524288000 bytes")


def test_a_header_of_gigabytes_inside_an_array_is_not_read(frugal, tmp_path):
    header = b"\x93NUMPY\2\0" + struct.pack("<I", 20 << 20)
    write_zip(tmp_path / "a.npz", {"a.npy": header + b" " * (20 << 20)})
    refused(tmp_path / "a.npz", "a has no readable header: .*20971520 bytes of header")


def encrypted(content):
    content = bytearray(content)
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(mark) + place] |= 1
    return bytes(content)


def cut_stream(content):
    """The compressed bytes end early, and the archive agrees."""
    content = bytearray(content)
    start = 30 + len("a.npy")
    content[start + 40 : start + 60] = bytes(20)
    return bytes(content)


@pytest.mark.parametrize(
    "member, change, match",
    [
        (b"\x93NUMPY\1\0\x10\0{'descr': '<f4',\n", None, "a has no readable header"),
        (b"\x93NUMPY\1\0\x04\0(((\n", None, "a has no readable header"),
        (b"\x93NUMPY\7\0\x04\0(((\n", None, "version .7, 0. is unknown"),
        (b"\x93NUMPY\1\0", None, "a has no readable header"),
        (npy((2**60, 0)), None, "a has no readable header: .*its shape"),
        (npy((1,), "<c8", bytes(8)), None, "dtype complex64, which is no number"),
        (npy((1,), "|S4", bytes(4)), None, "which is no number"),
        (npy((1,), "V4", bytes(4)), None, "which is no number"),
        (npy((1,), data=bytes(4)), encrypted, "a.* cannot be read: .*encrypted"),
        (npy((99,), data=os.urandom(396)), cut_stream, "a.* cannot be read: "),
    ],
)
def test_whatever_numpy_and_zip_raise_names_the_array(member, change, match, tmp_path):
    path = tmp_path / "a.npz"
    write_zip(path, {"a.npy": member})
    if change is not None:
        path.write_bytes(change(path.read_bytes()))
    refused(path, match)


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_numpy_does_not_compress_with_is_refused(kind, tmp_path):
    write_zip(tmp_path / "a.npz", {"a.npy": npy((1,), data=bytes(4))}, kind)
    refused(tmp_path / "a.npz", f"a is compressed by method {kind}")


def test_compressed_weights_are_read_as_ever(tmp_path):
    """float32 of bfloat16 numbers, biases of zeros: what is honest stays readable."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((300, 400)).astype(np.float32)
    arrays = {
        "kernel": (noise.view(np.uint32) & 0xFFFF0000).view(np.float32),
        "bias": np.zeros(4_000_000, np.float32),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    for name, tensor in tensor_files.open_tensors(str(tmp_path / "a.npz")).items():
        np.testing.assert_array_equal(tensor.read(), arrays[name])


def test_a_crc_that_is_right_is_no_proof_of_size(tmp_path):
    """The archive's numbers are the stranger's too: what is read is what was said."""
    path = tmp_path / "a.npz"
    content = npy((4,), data=bytes(64))
    write_zip(path, {"a.npy": content})
    assert zlib.crc32(content)
    refused(path, "a has 192 bytes, but shape .4,. of float32 takes 144")


# --- JSON beside weights ---


def test_json_beside_weights_has_a_bound(frugal, tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.write(b"[")
        file.truncate(2**30)
    with pytest.raises(UserError, match="config.json has more than 16777216 bytes"):
        config_values.read_json(str(tmp_path), "config.json")


VALUES = [None, True, 1.5, float("nan"), -1, 10**31, "16", "", [16], [], {"a": 1}, 3e8]


@pytest.mark.parametrize(
    "read, good",
    [
        (config_values.size, [1, 4096]),
        (config_values.number, [-1, 1.5, 10**29]),
        (config_values.flag, [True, False]),
        (config_values.text, ["16", ""]),
        (config_values.part, [{"a": 1}, {}]),
        (config_values.pair, [16, [16, 32]]),
    ],
)
def test_a_value_of_another_type_is_named_with_what_was_found(read, good):
    for value in good:
        read({"x": value}, "x")
    for value in VALUES:
        if any(type(value) is type(x) and value == x for x in good):
            continue
        if read is config_values.number and value in (3e8, -1, 1.5):
            continue
        if read is config_values.part and value is None:
            continue
        with pytest.raises(UserError, match=r"the config (says x = |lacks x)"):
            read({"x": value}, "x")
    if read is not config_values.part:
        with pytest.raises(UserError, match="lacks x"):
            read({}, "x")


def test_a_message_stays_short_and_printable():
    for value in (
        "\x1b[2J" * 5000,
        list(range(10**6)),
        {"a" * 10**6: "\n"},
        [[[[[1]]]]],
    ):
        with pytest.raises(UserError) as error:
            config_values.size({"x": value}, "x")
        assert len(str(error.value)) < 500 and str(error.value).isprintable()


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A directory with a whole T5."""
    folder = tmp_path_factory.mktemp("source") / "t5"
    write(folder, PUBLISHED)
    return folder


def planned(folder, changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    opened = sources.open_source(str(folder), FAMILIES)
    return import_plan.plan_part(opened, import_plan.ImportOptions())


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(num_layers=300_000_000), "num_layers = 300000000, .* from 1 to 1000"),
        (dict(num_layers=3e8), "num_layers = 300000000.0, which is a number"),
        (dict(num_layers=999, d_model=2048), "a depth of 1998 with a width of 2048"),
        (dict(num_decoder_layers=999, d_model=2048), "a depth of 1001 with a"),
        (dict(d_model=4_000_000), "a depth of 4 with a width of 4000000 take"),
        (dict(d_ff=4_000_000), "an MLP of 4000000 with a width of 8"),
        (dict(num_heads=2**20, d_kv=2**20), "1048576 heads of 1048576 with a width"),
        (dict(vocab_size=4_000_000), "a vocabulary of 4000000 with a width of 8"),
        (dict(d_model=10**9), "d_model = 1000000000"),
        (dict(num_heads=True), "num_heads = True, which is a flag"),
        (dict(tie_word_embeddings="no"), "tie_word_embeddings = 'no'"),
        (dict(feed_forward_proj=["relu"]), r"feed_forward_proj = \['relu'\]"),
    ],
)
def test_sizes_that_the_file_cannot_hold_are_refused_at_once(
    changes, match, t5, frugal
):
    with pytest.raises(UserError, match=match) as error:
        planned(t5, changes)
    assert str(t5) in str(error.value)


def test_an_image_that_no_tensor_bounds_is_refused_at_once(frugal, tmp_path):
    """DINOv3 computes its positions: the more, the larger the image is said to be."""
    vision = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = dict(model_type="dinov3_vit", patch_size=4, **vision)
    name = "embeddings.patch_embeddings.weight"
    write(tmp_path / "dino", {name: np.zeros((8, 3, 4, 4), np.float32)}, config)
    text = json.dumps(config | dict(image_size=4 << 20, intermediate_size=16))
    (tmp_path / "dino" / "config.json").write_text(text)
    with pytest.raises(UserError, match="dino: images of .* are 1099511627776 patches"):
        sources.open_source(str(tmp_path / "dino"), FAMILIES)


def test_the_nearest_of_very_many_names_is_found_soon(frugal):
    names = [f"model.layers.{i}.mlp.weight" for i in range(100_000)]
    assert "nearest: " in mapping.nearest("model.layers.7.mlp.weight", names)
    assert mapping.nearest("a" * 10**6, ["a" * 10**6] * 3)


# --- Adapters ---


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(r=2.0), "r = 2.0, which is a number; expected is a whole number"),
        (dict(r=True), "r = True"),
        (dict(r=0), "r = 0"),
        (dict(r=10**9), "r = 1000000000"),
        (dict(lora_alpha=None), "lacks lora_alpha"),
        (dict(lora_alpha=float("nan")), "lora_alpha = nan, which is not finite"),
        (dict(lora_dropout="x"), "lora_dropout = 'x'"),
        (dict(bias=["none"]), r"bias = \['none'\]"),
        ({"\ud83d": 1}, "half of a character"),
        (dict(rank_pattern={"a": {"b": [1] * 10**5}}), "says rank_pattern = "),
    ],
)
def test_an_adapters_config_is_read_by_type(changes, match, tmp_path):
    config = dict(peft_type="LORA", r=2, lora_alpha=4, bias="none") | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=match) as error:
        peft_adapters.open_adapter(str(tmp_path))
    assert "adapter_config.json" in str(error.value) and len(str(error.value)) < 900


def test_a_matrix_that_is_there_twice_is_refused(tmp_path):
    config = dict(peft_type="LORA", r=2, lora_alpha=4, bias="none")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    zero = np.zeros((2, 2), np.float32)
    names = [f"base_model.model.q.lora_A{x}.weight" for x in ("", ".default")]
    write(tmp_path / "weights", dict.fromkeys(names, zero), {})
    (tmp_path / "weights" / "model.safetensors").rename(
        tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="q has lora_A twice"):
        peft_adapters.open_adapter(str(tmp_path))
