"""Low-rank updates at import and export: what is merged, and what is refused."""

import ast
import contextlib
import dataclasses
import json
import os
import re
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
from flax.traverse_util import unflatten_dict
from tiny_models import assert_within, image_text_model, jit

from vit22b_transfer import UserError, cli
from vit22b_transfer.checkpoints import identity, reading, writing
from vit22b_transfer.models import lora, vit
from vit22b_transfer.weights import sources
from vit22b_transfer.weights.families import t5, table
from vit22b_transfer.weights.files import tensor_files

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

SIZES = dict(d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
CONFIG = SIZES | dict(
    model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False
)
ATTENTION = "encoder.block.{}.layer.0.SelfAttention.{}"
RANK = 2
RNG = np.random.default_rng(0)


def random(*shape):
    return (0.3 * RNG.standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory with a T5 of Hugging Face."""
    folder = tmp_path_factory.mktemp("t5")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model = t5.HUGGING_FACE.read(CONFIG, {})
    shapes = t5.shapes(None, model.text)
    tensors = {}
    for row in model.rows:
        for i in range(row.depth or 1):
            shape = shapes[row.ours[0].format(i=i)]
            (tensor,) = row.transform.to_theirs((random(*shape),))
            tensors[row.theirs[0].format(i=i)] = np.ascontiguousarray(tensor)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return str(folder)


def pair(module, inputs=24, outputs=32, rank=RANK):
    """The two matrices of a module, by PEFT's names."""
    name = f"base_model.model.{module}.lora_"
    return {
        f"{name}A.weight": random(rank, inputs),
        f"{name}B.weight": random(outputs, rank),
    }


GOOD = {k: x for i in range(2) for k, x in pair(ATTENTION.format(i, "q")).items()}


def adapter(folder, tensors=GOOD, **settings):
    """A directory with an adapter in PEFT's format."""
    os.makedirs(folder)
    config = dict(peft_type="LORA", r=RANK, lora_alpha=4, bias="none")
    with open(folder / "adapter_config.json", "w") as file:
        json.dump(config | settings, file)
    safetensors.numpy.save_file(dict(tensors), folder / "adapter_model.safetensors")
    return str(folder)


def read(path):
    """Parameters of a checkpoint, by name."""
    return {
        name.removeprefix("target/"): tensor.read()
        for name, tensor in tensor_files.open_tensors(path).items()
        if name.startswith("target/")
    }


@pytest.mark.parametrize("scanned", [False, True], ids=["loop", "scan"])
def test_an_adapter_becomes_parameters_beside_the_kernels(source, tmp_path, scanned):
    path, out = adapter(tmp_path / "adapter"), str(tmp_path / "out")
    options = ["--scan_layers"] if scanned else []
    assert cli.main(["import", source, path, "--out", out, *options]) == 0
    params = read(out)
    layer = "encoder/text/layers" if scanned else "encoder/text/layers_1"
    a, b = (params[f"{layer}/attention/query/lora_{x}"] for x in "ab")
    a, b = (x[1] if scanned else x for x in (a, b))
    module = f"base_model.model.{ATTENTION.format(1, 'q')}.lora_"
    np.testing.assert_array_equal(a, GOOD[f"{module}A.weight"].T)
    np.testing.assert_array_equal(b, GOOD[f"{module}B.weight"].T)
    assert sum("lora_" in name for name in params) == (2 if scanned else 4)
    # What a run from it has of its own is trained too.
    with open(f"{out}/model.gin") as file:
        text = file.read()
    (trained,) = ast.literal_eval(re.search(r"trained = (.*)", text)[1])
    frozen = lora.LoraConfig(1, 1.0, ("x",), (trained,)).frozen
    kept = ["encoder/projection/bias", "encoder/tower/cls/embedding", f"{layer}/lora_a"]
    assert not any(re.fullmatch(frozen, name) for name in kept)
    assert re.fullmatch(frozen, f"{layer}/kernel")
    record = reading.read_record(f"{out}/checkpoint_0")
    assert record["lora"] == {"alpha": 4.0}
    back = str(tmp_path / "back")
    command = ["export", out, "--format", "hf-t5", "--adapter", "--out", back]
    assert cli.main(command) == 0
    again = safetensors.numpy.load_file(f"{back}/adapter_model.safetensors")
    assert again.keys() == GOOD.keys()
    for name, tensor in GOOD.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_updates_in_bfloat16_are_stored_in_float32(source, tmp_path):
    tensors = {name: x.astype(jnp.bfloat16) for name, x in GOOD.items()}
    path, out = adapter(tmp_path / "adapter", tensors), str(tmp_path / "out")
    assert cli.main(["import", source, path, "--out", out, "--dtype", "bfloat16"]) == 0
    types = {name: x.dtype for name, x in read(out).items()}
    updates = {types.pop(name) for name in list(types) if "lora_" in name}
    assert updates == {np.dtype(np.float32)}
    assert set(types.values()) == {np.dtype(jnp.bfloat16)}


# --- What is refused at import ---


def refusal(source, folder, capsys, tensors=GOOD, options=(), **settings):
    """What the import of an adapter says, which must leave nothing behind."""
    path, out = adapter(folder / "adapter", tensors, **settings), folder / "out"
    assert cli.main(["import", source, path, "--out", str(out), *options]) == 1
    assert not out.exists() or not os.listdir(out)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        dict(use_dora=True),
        dict(bias="lora_only"),
        dict(rank_pattern={"q": 4}),
        dict(alpha_pattern={"q": 4}),
        dict(use_rslora=True),
        dict(modules_to_save=["lm_head"]),
        dict(fan_in_fan_out=True),
        dict(init_lora_weights="pissa"),
        dict(a_setting_of_tomorrow=True),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_our_updates_do_not_compute_is_refused(source, tmp_path, capsys, settings):
    said = refusal(source, tmp_path, capsys, **settings)
    ((name, value),) = settings.items()
    assert f"{name} = {value!r}" in said and "merge_and_unload" in said


@pytest.mark.parametrize("kind", ["LOHA", "IA3"])
def test_an_adapter_of_another_type_names_it(source, tmp_path, capsys, kind):
    said = refusal(source, tmp_path, capsys, peft_type=kind, r=None)
    assert f"is of the type {kind}; only LORA" in said and "merge_and_unload" in said


# What an adapter holds, and what is said of it.
BAD = {
    "unknown": (
        pair("encoder.block.0.layer.0.SelfAttention.w"),
        r"SelfAttention.w: there is no update of such a module; nearest: encoder.block",
    ),
    "head": (pair("lm_head", 24, 64), "lm_head: there is no update of such a module"),
    "shape": (
        pair(ATTENTION.format(0, "q"), inputs=16),
        "from 16 inputs to 32 outputs, but the model has 24 and 32",
    ),
    "rank": (
        pair(ATTENTION.format(0, "q"), rank=3),
        "lora_A of shape (3, 24) and lora_B of shape (32, 3); by r = 2",
    ),
    "alone": (dict(list(GOOD.items())[:1]), "has lora_A alone"),
    "dora": (
        GOOD | {"base_model.model.shared.lora_magnitude_vector": random(4)},
        "shared.lora_magnitude_vector is not a matrix of a low-rank update",
    ),
    "empty": ({}, "holds no updates"),
    "not finite": (
        {name: x * np.float32("nan") for name, x in GOOD.items()},
        "SelfAttention.q.lora_A holds NaN",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_adapter_that_does_not_fit_is_refused(source, tmp_path, capsys, name):
    tensors, expected = BAD[name]
    assert expected in refusal(source, tmp_path, capsys, tensors)


def test_some_layers_alone_cannot_be_stacked(source, tmp_path, capsys):
    tensors = pair(ATTENTION.format(1, "q"))
    said = refusal(source, tmp_path, capsys, tensors, ["--scan_layers"])
    assert "updated in 1 of 2 layers; leave --scan_layers out" in said
    out = tmp_path / "again"
    path = str(tmp_path / "adapter")
    assert cli.main(["import", source, path, "--out", str(out)]) == 0
    chosen = r"encoder/text/layers_(1)/attention/query/kernel"
    assert repr((chosen,)) in (out / "model.gin").read_text()


def test_an_adapter_comes_with_the_weights_it_belongs_to(source, tmp_path, capsys):
    one, two = (adapter(tmp_path / name) for name in ("one", "two"))
    for given in ([one], [source, one, two]):
        out = str(tmp_path / "out")
        assert cli.main(["import", *given, "--out", out]) == 1
        assert "import one adapter, together with" in capsys.readouterr().err


def test_a_pickled_adapter_is_refused(source, tmp_path, capsys):
    path = adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    assert cli.main(["import", source, path, "--out", str(tmp_path / "out")]) == 1
    assert "is a pickle" in capsys.readouterr().err


# --- Export ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a T5 with a tower and updates in both, and a config of the T5."""
    config = lora.LoraConfig(RANK, 3.0, (".*(attention|mlp)/(query|wo)/kernel",))
    tower = tiny_models.tower_config(**tiny_models.TWO_BLOCKS)
    text = t5.HUGGING_FACE.read(CONFIG, {}).text
    model = image_text_model(tower, text, lora=config)
    params = tiny_models.model_params(model)
    folder = tmp_path_factory.mktemp("trained")
    save(folder, params, {"lora": identity.lora_record(model)})
    (folder / "t5").mkdir()
    (folder / "t5" / "config.json").write_text(json.dumps(CONFIG))
    return folder, params


def save(folder, params, record):
    os.makedirs(folder, exist_ok=True)
    writer = writing.CheckpointWriter(str(folder))
    tree = {"target": params, "state": {"step": jnp.int32(1)}}
    writer.save(1, tree, record)
    writer.close()


def export(folder, out, *options):
    config = ["--format", "hf-t5", "--config", str(folder / "t5")]
    return cli.main(["export", str(folder), *config, "--out", str(out), *options])


def test_a_merged_export_computes_what_the_updated_model_does(
    trained, tmp_path, capsys
):
    folder, params = trained
    assert export(folder, tmp_path / "merged") == 0
    said = capsys.readouterr().out
    assert "merged the updates of 14 kernels, alpha 3.0" in said
    assert "not exported: 28 arrays of encoder/tower" in said
    out = str(tmp_path / "again")
    assert cli.main(["import", str(tmp_path / "merged"), "--out", out]) == 0
    merged = unflatten_dict(
        {name: jnp.asarray(x) for name, x in read(out).items()}, sep="/"
    )
    text = t5.HUGGING_FACE.read(CONFIG, {}).text
    blind = image_text_model(text=text, blind=True)
    updated = image_text_model(
        text=text, blind=True, lora=lora.LoraConfig(RANK, 3.0, (".*",))
    )
    batch = tiny_models.batch(2)
    of_text = dict(params, encoder={"text": params["encoder"]["text"]})
    expected, actual = (
        jit(model.score_batch)(tree, batch)
        for model, tree in ((updated, of_text), (blind, merged))
    )
    assert_within(1e-4, actual, expected, "a merged T5")


def test_an_exported_adapter_has_the_updates_of_its_family_alone(
    trained, tmp_path, capsys
):
    folder, params = trained
    assert export(folder, tmp_path / "adapter", "--adapter") == 0
    assert "not exported: the updates of 4 kernels" in capsys.readouterr().out
    path = tmp_path / "adapter"
    config = json.loads((path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, 3.0)
    assert len(config["target_modules"]) == 10
    tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    name = "base_model.model.decoder.block.1.layer.1.EncDecAttention.q.lora_B.weight"
    layer = params["decoder"]["layers_1"]["encoder_decoder_attention"]
    np.testing.assert_array_equal(tensors[name], layer["query"]["lora_b"].T)


def test_alpha_comes_from_the_checkpoint_or_the_user(trained, tmp_path, capsys):
    folder, params = trained
    assert export(folder, tmp_path / "out", "--lora_alpha", "4") == 1
    assert "was trained with alpha 3.0, not 4.0" in capsys.readouterr().err
    text = {"decoder": params["decoder"], "token_embedder": params["token_embedder"]}
    text["encoder"] = {"text": params["encoder"]["text"]}
    save(tmp_path, text, {})
    (tmp_path / "t5").symlink_to(folder / "t5")
    assert export(tmp_path, tmp_path / "out") == 1
    assert "give --lora_alpha" in capsys.readouterr().err
    assert export(tmp_path, tmp_path / "out", "--lora_alpha", "4", "--adapter") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 4.0


@pytest.mark.parametrize(
    "family, said",
    [
        ("hf-siglip", "hf-siglip keeps these kernels fused .*map/attention/query/ker"),
        # The published files, which fuse queries, keys and values.
        ("hf-internvit", "for models of the families hf-t5.* leave --adapter out"),
    ],
)
def test_updates_without_a_place_in_an_adapter_are_refused(
    family, said, tmp_path, capsys
):
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(intermediate_size=64, patch_size=8, image_size=16)
    kind = {"hf-siglip": "siglip_vision_model", "hf-internvit": "intern_vit_6b"}[family]
    config = sizes | dict(model_type=kind)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = sources.by_name(table.FAMILIES, family)
    tower = found.read(config, {}).tower
    updated = lora.LoraConfig(RANK, 3.0, (".*attention/query/kernel",))
    module = vit.VisionTower(dataclasses.replace(tower, lora=updated))
    params = tiny_models.random_params(module, tiny_models.images(1, 16, 16, 3))
    save(tmp_path / "run", {"encoder": {"tower": params}}, {"lora": {"alpha": 3.0}})
    command = ["export", str(tmp_path / "run"), "--format", family, "--adapter"]
    command += ["--config", str(tmp_path), "--out", str(tmp_path / "adapter")]
    assert cli.main(command) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "adapter").exists()


def test_a_checkpoint_without_updates_has_no_adapter(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["import", source, "--out", out]) == 0
    command = ["export", out, "--format", "hf-t5", "--out", str(tmp_path / "adapter")]
    assert cli.main([*command, "--adapter"]) == 1
    assert "has no low-rank updates" in capsys.readouterr().err


def test_an_imported_checkpoint_is_not_removed_by_a_run_in_its_directory(
    source, tmp_path
):
    path, out = adapter(tmp_path / "adapter"), tmp_path / "out"
    assert cli.main(["import", source, path, "--out", str(out)]) == 0
    save(out, {"x": jnp.zeros(2)}, {})
    assert reading.complete_steps(str(out)) == [0, 1]


# --- Kills ---


class Killed(BaseException):
    """Stands for the death of the process: nothing of it runs any more."""


RENAMES = [(os, "rename"), (os, "replace"), (os, "remove")]
CHANGES = [*RENAMES, (os, "mkdir"), (os, "fsync"), (shutil, "rmtree")]


class Operations:
    """Counts operations on files, and dies at one of them; `None` never does.

    Those of Orbax's threads are not counted: with the real process they would die, but
    here they would wait for each other. `benchmarks/kill_storms.py` kills there too.
    """

    def __init__(self, monkeypatch, functions, dies_at=None):
        self.count = 0
        for module, name in functions:
            real = getattr(module, name)

            def counted(*args, real=real, **kwargs):
                if threading.current_thread() is not threading.main_thread():
                    return real(*args, **kwargs)
                self.count += 1
                if dies_at is not None and self.count > dies_at:
                    raise Killed
                return real(*args, **kwargs)

            monkeypatch.setattr(module, name, counted)


def files(folder):
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        # Arrays lie in files of random names.
        if path.is_file() and "/d/" not in path.as_posix() and path.name != ".lock"
    )


@pytest.mark.parametrize(
    ("functions", "last", "every"),
    [(RENAMES, 4, 1), pytest.param(CHANGES, 1000, 3, marks=pytest.mark.slow)],
    ids=["the last", "a third of all"],
)
def test_an_import_killed_anywhere_leaves_nothing_or_all(
    functions, last, every, source, tmp_path, monkeypatch
):
    path, out = adapter(tmp_path / "adapter"), tmp_path / "out"
    command = ["import", source, path, "--out", str(out)]
    with monkeypatch.context() as patched:
        operations = Operations(patched, functions)
        assert cli.main(command) == 0
        total = operations.count
    gin, expected, listed = (out / "model.gin").read_text(), read(str(out)), files(out)
    assert total >= 4
    moments, ended = range(max(0, total - last), total, every), []
    for dies_at in moments:
        shutil.rmtree(out)
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            Operations(patched, functions, dies_at)
            ended.append(cli.main(command))
        if (out / "checkpoint_0").exists():
            assert (out / "model.gin").read_text() == gin
            assert files(out) == listed, dies_at
            continue
        with pytest.raises(UserError):
            reading.resolve(str(out))
        assert cli.main(command) == 0
        assert (out / "model.gin").read_text() == gin
        assert files(out) == listed
        again = read(str(out))
        for name, array in expected.items():
            np.testing.assert_array_equal(again[name], array)
    # Orbax makes some operations more or fewer, so that the last moments may not come.
    assert len(ended) <= max(2, len(moments) // 8) and not any(ended)
