"""Imports refuse what is damaged, resume, resize, merge; exports and inspections."""

import dataclasses
import itertools
import json
import os
import shutil
import types

import full_disks
import ml_dtypes
import numpy as np
import pytest

from vit22b_transfer import UserError, cli
from vit22b_transfer.host import locks
from vit22b_transfer.models import vit
from vit22b_transfer.weights import convert, export, mapping, transforms
from vit22b_transfer.weights.families import t5
from vit22b_transfer.weights.files import tensor_files
from vit22b_transfer.weights.files.tensor_writing import (
    LazyTensor,
    write_npz,
    write_safetensors,
)
from vit22b_transfer.weights.import_plan import ImportOptions
from vit22b_transfer.weights.mapping import Family, Model, Row, per_layer

CONFIG = dict(
    model_type="t5",
    vocab_size=16,
    d_model=8,
    d_kv=4,
    d_ff=12,
    num_heads=2,
    num_layers=2,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
NAME = "decoder.block.1.layer.2.DenseReluDense.wi_1.weight"


def published():
    """Drawn tensors with the names and shapes of a T5 of these sizes."""
    model = t5.HUGGING_FACE.read(CONFIG, {})
    shapes = t5.HUGGING_FACE.shapes(model.tower, model.text)
    plan = mapping.steps(model.rows, (), shapes)
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in mapping.expected_shapes(plan, shapes).items()
    }


PUBLISHED = published()


def write(folder, arrays, config=CONFIG, shard=10**9):
    tensors = [
        LazyTensor(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()
    ]
    os.makedirs(folder)
    write_safetensors(str(folder), tensors, max_shard_bytes=shard, done=lambda _: None)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)


def refusal(folder, capsys, *options):
    """The message of a refused import, which leaves nothing at all."""
    out = folder / "out"
    arguments = ["import", str(folder / "source"), "--out", str(out), *options]
    assert cli.main(arguments) == 1
    assert not out.exists() or not os.listdir(out)
    return capsys.readouterr().err


def with_nan(array):
    array = array.copy()
    array[3, 2] = np.nan
    return array


FETCH = "Fetch the files again, all of one model, or name another --family."
# case -> (what is done to the arrays, the end of the message)
REFUSED = {
    "missing": (
        lambda arrays: arrays.pop(NAME),
        f"{NAME}: missing, expected shape (12, 8); nothing is called similarly\n"
        + FETCH,
    ),
    "extra": (
        lambda arrays: arrays.update({"adapter.weight": np.zeros((2, 3), "f4")}),
        "adapter.weight: not expected, shape (2, 3); nothing is called similarly\n"
        + FETCH,
    ),
    "renamed": (
        lambda arrays: arrays.update({"shared.weights": arrays.pop("shared.weight")}),
        "shared.weight: missing, expected shape (16, 8); nearest: shared.weights\n"
        "  shared.weights: not expected, shape (16, 8); nearest: shared.weight\n"
        + FETCH,
    ),
    "transposed": (
        lambda arrays: arrays.update({NAME: arrays[NAME].T.copy()}),
        f"{NAME}: shape (8, 12), expected (12, 8) (it is transposed)\n{FETCH}",
    ),
    "wrong shape": (
        lambda arrays: arrays.update({NAME: arrays[NAME][:5]}),
        f"{NAME}: shape (5, 8), expected (12, 8)\n{FETCH}",
    ),
    "quantised": (
        lambda arrays: arrays.update({NAME: arrays[NAME].astype(np.int8)}),
        f"{NAME}: dtype int8, expected one of float16, bfloat16, float32; quantised "
        f"weights are not supported, take the original ones\n{FETCH}",
    ),
    "double": (
        lambda arrays: arrays.update({NAME: arrays[NAME].astype(np.float64)}),
        f"{NAME}: dtype float64, expected one of float16, bfloat16, float32; convert "
        f"it with --dtype float32\n{FETCH}",
    ),
    "another dtype": (
        lambda arrays: arrays.update({NAME: arrays[NAME].astype(np.float16)}),
        f"{NAME}: dtype float16, but most tensors are float32; convert all with "
        f"--dtype\n{FETCH}",
    ),
    "NaN": (
        lambda arrays: arrays.update({NAME: with_nan(arrays[NAME])}),
        f"{NAME} holds NaN or infinite values; expected are finite weights. The file "
        "is damaged or its training diverged: fetch it again, or take another "
        "checkpoint.",
    ),
    "a copy that is none": (
        lambda arrays: arrays.update(
            {"encoder.embed_tokens.weight": arrays["shared.weight"] + 1}
        ),
        "encoder.embed_tokens.weight differs from shared.weight, which it must repeat "
        "in a hf-t5 with this config. Fetch the files again, all of one model.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_source_is_refused_and_leaves_nothing(case, tmp_path, capsys):
    change, message = REFUSED[case]
    arrays = dict(PUBLISHED)
    change(arrays)
    write(tmp_path / "source", arrays)
    said = refusal(tmp_path, capsys)
    assert said.endswith(f"{message} (--traceback shows where)\n"), said


def test_a_truncated_file_a_pickle_and_a_partial_download_leave_nothing(
    tmp_path, capsys
):
    write(tmp_path / "source", PUBLISHED, shard=4000)
    shards = sorted((tmp_path / "source").glob("*.safetensors"))
    content = shards[-1].read_bytes()
    shards[-1].write_bytes(content[:-1])
    assert "truncated" in refusal(tmp_path, capsys)
    shards[-1].unlink()
    assert f"lacks 1 of {len(shards)} shards" in refusal(tmp_path, capsys)
    for shard in (tmp_path / "source").glob("model*"):
        shard.unlink()
    assert "holds no weights" in refusal(tmp_path, capsys)
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert "is a pickle" in refusal(tmp_path, capsys)


def test_values_that_another_dtype_cannot_hold_are_refused(tmp_path, capsys):
    write(tmp_path / "source", PUBLISHED | {NAME: PUBLISHED[NAME] * 1e6})
    said = refusal(tmp_path, capsys, "--dtype", "float16")
    assert f"{NAME} holds values that float16 cannot; take --dtype bfloat16" in said


def test_a_source_of_no_known_family_or_of_an_unknown_one_is_refused(tmp_path, capsys):
    write(tmp_path / "source", PUBLISHED, {"model_type": "banana"})
    said = refusal(tmp_path, capsys)
    assert "its config.json says model_type 'banana'" in said and "hf-t5" in said
    said = refusal(tmp_path, capsys, "--family", "hf-t4")
    assert "there is no family 'hf-t4'; nearest: hf-t5" in said
    assert "no source has position tables" in _said_for(tmp_path, capsys)


def _said_for(tmp_path, capsys):
    (tmp_path / "source" / "config.json").write_text(json.dumps(CONFIG))
    return refusal(tmp_path, capsys, "--image_size", "32")


def test_a_checkpoint_is_never_overwritten(tmp_path, capsys):
    write(tmp_path / "source", PUBLISHED)
    arguments = ["import", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 1
    assert "has a checkpoint_0 already" in capsys.readouterr().err


# --- A family with everything: fused, stacked, resampled; of the tests alone ---

DEPTH, WIDTH = 3, 8


def shapes_of(tower, text):
    rows, columns = tower.grid_of(*tower.image_size)
    blocks = {
        f"encoder/tower/layers_{i}/{name}": shape
        for i in range(tower.depth)
        for name, shape in (
            ("norm/scale", (WIDTH,)),
            ("wi_0", (WIDTH, 6)),
            ("wi_1", (WIDTH, 6)),
        )
    }
    return blocks | {"encoder/tower/positions": (rows * columns, WIDTH)}


FUSED = transforms.unstack()


def tower_family(fused=FUSED, resample=None):
    layer = "encoder/tower/layers_{i}"
    rows = (
        Row("encoder/tower/positions", "pos"),
        *per_layer(
            DEPTH,
            [
                Row(f"{layer}/norm/scale", "block_{i}/norm"),
                Row((f"{layer}/wi_0", f"{layer}/wi_1"), "block_{i}/gating", fused),
            ],
        ),
    )

    def read(config, tensors):
        side = 4 * int(tensors["pos"].shape[0] ** 0.5)
        sizes = dict(width=WIDTH, depth=DEPTH, mlp_dim=6, num_heads=2, patch_size=4)
        tower = vit.ViTConfig(**sizes, image_size=(side, side))
        return Model(
            rows,
            tower=tower,
            positions=("encoder/tower/positions",),
            resample=resample,
            dropped={"text/.*": "the text half"},
            facts=("resized bilinear",),
        )

    return Family(
        "test-tower",
        lambda config, tensors: "pos" in tensors,
        read,
        shapes_of,
        file_format="npz",
    )


def tower_arrays(stacked):
    rng = np.random.default_rng(1)
    arrays = {"pos": rng.standard_normal((4, WIDTH)).astype(np.float32)}
    gating = rng.standard_normal((DEPTH, 2, WIDTH, 6)).astype(np.float32)
    norm = rng.standard_normal((DEPTH, WIDTH)).astype(np.float32)
    arrays["text/x"] = np.zeros(3, np.float32)
    if stacked:
        return arrays | {"block/gating": gating, "block/norm": norm}
    for i in range(DEPTH):
        arrays |= {f"block_{i}/gating": gating[i], f"block_{i}/norm": norm[i]}
    return arrays


def write_tower(path, stacked=True):
    arrays = tower_arrays(stacked)
    write_npz(
        str(path),
        [LazyTensor(k, a.shape, a.dtype, lambda a=a: a) for k, a in arrays.items()],
        done=lambda _: None,
    )
    return arrays


def values(source):
    found = tensor_files.open_tensors(str(source))
    return {name: tensor.read() for name, tensor in found.items()}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_stacked_and_fused_layers_go_in_and_come_out_whole(
    stacked, scan_layers, tmp_path
):
    arrays = write_tower(tmp_path / "tower.npz", stacked)
    families = (tower_family(),)
    out = str(tmp_path / "out")
    lines = convert.import_weights(
        [str(tmp_path / "tower.npz")],
        out,
        families,
        options=ImportOptions(scan_layers=scan_layers),
    )
    assert "  not imported: 1 tensors, the text half" in lines
    found = values(out)
    one = found[
        "target/encoder/tower/" + ("layers" if scan_layers else "layers_2") + "/wi_1"
    ]
    gating = tower_arrays(True)["block/gating"]
    np.testing.assert_array_equal(one[2] if scan_layers else one, gating[2, 1])
    export.export_weights(out, str(tmp_path / "back"), families, family="test-tower")
    back = values(tmp_path / "back" / "test-tower.npz")
    assert back.keys() == arrays.keys() - {"text/x"}
    for name, array in back.items():
        assert array.tobytes() == arrays[name].tobytes()


def test_the_resolution_changes_on_request_by_the_familys_own_function(tmp_path):
    def resample(table, old, new):
        assert (old, new) == ((2, 2), (3, 4))
        return np.full((12, WIDTH), table.mean())

    arrays = write_tower(tmp_path / "tower.npz")
    out = str(tmp_path / "out")
    lines = convert.import_weights(
        [str(tmp_path / "tower.npz")],
        out,
        (tower_family(resample=resample),),
        options=ImportOptions(image_size=(12, 16)),
    )
    assert any("images 12x16, pixel mean (0.5, 0.5, 0.5)" in line for line in lines)
    table = values(out)["target/encoder/tower/positions"]
    np.testing.assert_allclose(table, arrays["pos"].mean(), rtol=1e-6)
    assert table.dtype == np.float32 and table.shape == (12, WIDTH)
    gin_file = (tmp_path / "out" / "model.gin").read_text()
    assert "IMAGE_SIZE = (12, 16)" in gin_file and "resized bilinear" in gin_file


def test_a_tower_and_a_text_model_make_one_checkpoint(tmp_path):
    write_tower(tmp_path / "tower.npz")
    write(tmp_path / "t5", PUBLISHED)
    (tmp_path / "t5" / "spiece.model").write_bytes(b"\x0a\x00pieces")
    out = tmp_path / "out"
    sources = [str(tmp_path / "tower.npz"), str(tmp_path / "t5")]
    families = (tower_family(), t5.HUGGING_FACE)
    lines = convert.import_weights(sources, str(out), families)
    assert "  tokenizer spiece.model" in lines
    names = tensor_files.open_tensors(str(out)).keys()
    assert {
        "target/encoder/tower/positions",
        "target/encoder/text/encoder_norm/scale",
    } <= names
    gin_file = (out / "model.gin").read_text()
    assert "TOWER = @vit.ViTConfig()" in gin_file
    assert "ImageTextModule.text = @t5.T5Config()" in gin_file
    assert f"VIT22B_VOCABULARY={out}/hf-t5/spiece.model" in gin_file
    assert (out / "hf-t5" / "spiece.model").read_bytes() == b"\x0a\x00pieces"
    assert "rules = (('encoder/projection/.*', None),)" in gin_file
    with pytest.raises(ValueError, match="2 sources, but 1 families"):
        convert.import_weights(
            sources, str(tmp_path / "no"), families, family_names=["hf-t5"]
        )
    (tmp_path / "t5" / "spiece.model").write_text("version https://git-lfs.github.com")
    with pytest.raises(ValueError, match="spiece.model is a pointer of git-lfs"):
        convert.import_weights(sources, str(tmp_path / "no"), families)
    (tmp_path / "t5" / "spiece.model").unlink()
    with pytest.raises(ValueError, match="two sources have decoder/decoder_norm/scale"):
        convert.import_weights([sources[1]] * 2, str(tmp_path / "no"), families)


# --- Interrupted imports ---


def interrupting(after):
    """A family whose import is interrupted after so many tensors, and their count."""
    state, calls = types.SimpleNamespace(converted=0), itertools.count()
    plain = transforms.unstack()

    def to_ours(arrays):
        if arrays[0].any():  # not when shapes alone are run through
            if (call := next(calls)) >= after:
                raise KeyboardInterrupt
            state.converted = max(state.converted, call + 1)
        return plain.to_ours(arrays)

    return tower_family(transforms.Transform(to_ours, plain.to_theirs)), state


def interrupt(tmp_path):
    write_tower(tmp_path / "tower.npz")
    source, out = [str(tmp_path / "tower.npz")], tmp_path / "out"
    family, _ = interrupting(2)
    with pytest.raises(KeyboardInterrupt):
        convert.import_weights(source, str(out), (family,))
    assert os.listdir(out) == ["checkpoint_0.importing"]
    return source, out


def test_an_interrupted_import_goes_on_where_it_was(tmp_path):
    source, out = interrupt(tmp_path)
    family, state = interrupting(99)
    convert.import_weights(source, str(out), (family,))
    assert state.converted == DEPTH - 2
    assert sorted(os.listdir(out)) == ["checkpoint_0", "model.gin", "test-tower"]
    whole = tmp_path / "whole"
    convert.import_weights(source, str(whole), (family,))
    expected = values(whole)
    for name, array in values(out).items():
        np.testing.assert_array_equal(array, expected[name])


def test_what_an_interrupted_import_wrote_is_verified(tmp_path):
    source, out = interrupt(tmp_path)
    record = out / "checkpoint_0.importing" / "import_progress.jsonl"
    lines = record.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if "/wi_1" in line)
    name, layer, checksum = json.loads(lines[place])
    lines[place] = json.dumps([name, layer, checksum ^ 1])
    record.write_text("\n".join(lines) + "\n")
    family, state = interrupting(99)
    convert.import_weights(source, str(out), (family,))
    assert state.converted == DEPTH - 1


def test_a_second_import_is_refused_and_deletes_nothing(tmp_path):
    source, out = interrupt(tmp_path)
    left = out / "checkpoint_0.importing.orbax-checkpoint-tmp-1"
    left.mkdir()
    before = sorted(out.rglob("*"))
    family, state = interrupting(99)
    with locks.held(str(out)):
        with pytest.raises(UserError, match=f"{out} is in use: process"):
            convert.import_weights(source, str(out), (family,))
        assert sorted(out.rglob("*")) == [out / ".lock", *before]
    convert.import_weights(source, str(out), (family,))
    assert state.converted == DEPTH - 2 and not left.exists()


@pytest.mark.parametrize("damage", ["a cut line", "NULs", "cut arrays"])
def test_what_a_power_cut_left_of_an_import_is_made_again(damage, tmp_path):
    source, out = interrupt(tmp_path)
    folder = out / "checkpoint_0.importing"
    record = folder / "import_progress.jsonl"
    if damage == "cut arrays":
        for file in (folder / "state").rglob("d/*"):
            os.truncate(file, file.stat().st_size // 2)
    else:
        lines = record.read_bytes().splitlines()
        lines[-1] = b"\0" * 40 if damage == "NULs" else lines[-1][:9]
        record.write_bytes(b"\n".join(lines) + b"\n")
    family, _ = interrupting(99)
    convert.import_weights(source, str(out), (family,))
    whole = tmp_path / "whole"
    convert.import_weights(source, str(whole), (family,))
    expected = values(whole)
    for name, array in values(out).items():
        np.testing.assert_array_equal(array, expected[name])


def test_a_full_disk_keeps_the_arrays_and_the_same_command_goes_on(tmp_path, capfd):
    source, out = interrupt(tmp_path)
    family, state = interrupting(99)
    with full_disks.full_disk() as fill:
        fill(1200)
        with full_disks.refused(capfd, str(out), full_disks.FULL, "arrays in"):
            convert.import_weights(source, str(out), (family,))
    assert os.listdir(out) == ["checkpoint_0.importing"]
    first = state.converted
    convert.import_weights(source, str(out), (family,))
    assert sorted(os.listdir(out)) == ["checkpoint_0", "model.gin", "test-tower"]
    whole = tmp_path / "whole"
    convert.import_weights(source, str(whole), (family,))
    expected = values(whole)
    for name, array in values(out).items():
        np.testing.assert_array_equal(array, expected[name])
    assert first < DEPTH


def test_an_import_whose_directory_is_removed_ends_in_a_line(tmp_path, capfd):
    write_tower(tmp_path / "tower.npz")
    plain, out = transforms.unstack(), tmp_path / "out"

    def to_ours(arrays):
        if arrays[0].any() and out.exists():
            shutil.rmtree(out, ignore_errors=True)
        return plain.to_ours(arrays)

    family = tower_family(transforms.Transform(to_ours, plain.to_theirs))
    # Some arrays are still written, others are already read back.
    with pytest.raises(UserError) as error:
        convert.import_weights([str(tmp_path / "tower.npz")], str(out), (family,))
    assert str(out) in str(error.value) and "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not (out / "checkpoint_0").exists()


@pytest.mark.parametrize("change", ["options", "file"])
def test_another_import_into_the_same_place_starts_anew(change, tmp_path):
    source, out = interrupt(tmp_path)
    options = ImportOptions()
    if change == "file":
        write_tower(tmp_path / "tower.npz")
        os.utime(tmp_path / "tower.npz", ns=(1, 1))
    else:
        options = dataclasses.replace(options, dtype="bfloat16")
    family, state = interrupting(99)
    convert.import_weights(source, str(out), (family,), options=options)
    assert state.converted == DEPTH


# --- Export and inspect ---


def test_an_export_of_another_model_is_refused_and_writes_nothing(tmp_path, capsys):
    write(tmp_path / "source", PUBLISHED)
    out = str(tmp_path / "out")
    assert cli.main(["import", str(tmp_path / "source"), "--out", out]) == 0
    write(tmp_path / "other", {}, CONFIG | {"d_ff": 20, "num_layers": 3})
    to = str(tmp_path / "exported")

    def said(*options):
        arguments = ["export", out, "--format", "hf-t5", "--out", to, *options]
        assert cli.main(arguments) == 1
        assert not os.path.exists(to)
        return capsys.readouterr().err

    message = said("--config", str(tmp_path / "other"))
    assert (
        "decoder/layers_0/mlp/wi_0/kernel: shape (8, 12) in the checkpoint" in message
    )
    assert "decoder/layers_2/mlp/wi_0/kernel: not in the checkpoint" in message
    assert "there is no config.json in" in said("--config", str(tmp_path))
    assert "is no checkpoint of ours" in _export_error(tmp_path / "source", to, capsys)
    os.makedirs(f"{to}/full")
    assert cli.main(["export", out, "--format", "hf-t5", "--out", to]) == 1
    assert "is not an empty directory" in capsys.readouterr().err


def _export_error(source, to, capsys):
    assert cli.main(["export", str(source), "--format", "hf-t5", "--out", to]) == 1
    return capsys.readouterr().err


def test_large_exports_are_sharded_and_read_back(tmp_path):
    write(tmp_path / "source", PUBLISHED)
    out, to = str(tmp_path / "out"), str(tmp_path / "exported")
    convert.import_weights([str(tmp_path / "source")], out, (t5.HUGGING_FACE,))
    export.export_weights(
        out, to, (t5.HUGGING_FACE,), family="hf-t5", max_shard_bytes=3000
    )
    assert os.path.isfile(f"{to}/model.safetensors.index.json")
    for name, array in values(to).items():
        assert array.tobytes() == PUBLISHED[name].tobytes()


def test_inspect_shows_a_tree_with_sizes_and_statistics(tmp_path, capsys):
    arrays = {
        "encoder.block.10.weight": np.array([[1.0, 3.0]], np.float32),
        "encoder.block.9.weight": np.array([np.nan, 2.0, np.inf], np.float32),
        "norm": np.zeros((2, 1024), ml_dtypes.bfloat16),
    }
    write(tmp_path / "source", arrays)
    assert cli.main(["inspect", str(tmp_path / "source"), "--stats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "encoder",
        "  block",
        "    9",
        "      weight  float32 [3]  12 B  mean 2  std 0  min 2  max 2  NOT FINITE: 2",
        "    10",
        "      weight  float32 [1, 2]  8 B  mean 2  std 1  min 1  max 3",
        "norm          bfloat16 [2, 1024]  4.0 KiB  mean 0  std 0  min 0  max 0",
        "3 tensors, 2,053 elements, 4.0 KiB",
        "2 elements are not finite",
    ]


def test_inspect_shows_how_two_sources_differ(tmp_path, capsys):
    one = {name: np.zeros((2, 3), np.float32) for name in "abcde"}
    one["e"][0, 1] = np.nan
    two = {name: array.copy() for name, array in one.items() if name != "a"}
    two["b"][1, 1] = 0.5
    two["c"] = np.zeros((3, 2), np.float32)
    two["d"] = two["d"].astype(np.float16)
    write(tmp_path / "one", one)
    write(tmp_path / "two", two | {"f": np.zeros(1, np.float32)})
    sources = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert cli.main(["inspect", *sources]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"only in {sources[0]}: 1",
        "  a  float32 [2, 3]",
        f"only in {sources[1]}: 1",
        "  f  float32 [1]",
        "different: 3",
        "  b  max abs difference 0.5, 1 of 6 elements",
        "  c  float32 [2, 3] and float32 [3, 2]",
        "  d  float32 and float16  max abs difference 0, 0 of 6 elements",
        "equal: 1",
    ]
