"""`vit22b export --format jax`: a process with JAX alone gets what our models say."""

import contextlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import photographs
import pytest
import tiny_imports
import tiny_models
from flax.traverse_util import flatten_dict
from jax import export
from shell_commands import no_tasks, use_one_device

from vit22b_transfer import UserError, cli
from vit22b_transfer.commands import serving
from vit22b_transfer.data import converters
from vit22b_transfer.inference import decoding
from vit22b_transfer.serving import artifacts

# All that another project needs: no line of ours, and no flax.
ALONE = """
import json, sys
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file

folder, given, out = sys.argv[1:]
with open(f"{folder}/manifest.json") as file:
    manifest = json.load(file)
weights = load_file(f"{folder}/{manifest['weights']}")
made = {}
for name, program in manifest["programs"].items():
    with open(f"{folder}/{program['file']}", "rb") as file:
        run = export.deserialize(bytearray(file.read())).call
    arrays = np.load(given)
    for size in (1, 5):
        inputs = [arrays[x][:size] for x in program["inputs"][1:]]
        for key, value in jax.jit(run)(weights, *inputs).items():
            said = program["outputs"][key]
            assert list(value.shape) == [size, *said["shape"][1:]]
            assert said["shape"][0] == "batch" and str(value.dtype) == said["dtype"]
            made[f"{name}-{key}-{size}"] = np.asarray(value)
np.savez(out, **made)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"flax", "vit22b_transfer", "tensorflow", "seqio", "torch"}, loaded
"""


@pytest.mark.slow
def test_a_process_with_jax_alone_runs_what_the_command_exports(tmp_path):
    (tmp_path / "photos").mkdir()
    photos = list(photographs.write(tmp_path / "photos").values())[:5]
    use_one_device(tmp_path)
    tiny_imports.paligemma(tmp_path)
    vocabulary = ["--vocabulary", "bytes"]
    # jaxtyping, which checks annotations here, takes no symbols for some sizes.
    command = [sys.executable, "-m", "vit22b_transfer.cli", "export", "imported"]
    command += ["--format", "jax", "--out", "artifact", *vocabulary]
    subprocess.run(command, cwd=tmp_path, check=True)
    with contextlib.chdir(tmp_path), no_tasks():
        served = serving.load(
            cli.parsed(["serve", "imported", *vocabulary, "--batch_size", "5"])
        )
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    (known, question) = manifest["prompts"]["known"]
    asked = []
    for path in photos:
        with open(path, "rb") as file:
            asked.append(served.prepare(file.read(), known["text"]))
    (length,) = manifest["prompts"]["shape"][1:]
    prompts = np.zeros((5, length), np.int32)
    prompts[:, : len(known["ids"])] = known["ids"]
    np.testing.assert_array_equal(prompts, [one.tokens for one in asked])
    assert question == {"text": "answer en {question}"}
    assert manifest["images"]["shape"] == ["batch", 16, 16, 3]
    assert manifest["images"]["preparation"]["filter"] == "bicubic"
    images = np.stack([one.pixels for one in asked])
    np.savez(tmp_path / "given.npz", images=images, prompts=prompts)
    (tmp_path / "alone.py").write_text(ALONE)
    subprocess.run(
        [sys.executable, "-P", "alone.py", "artifact", "given.npz", "made.npz"],
        cwd=tmp_path,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    made = np.load(tmp_path / "made.npz")
    for size in (1, 5):
        lines = served.predict(asked[:size])
        texts = [
            served.model.output_vocabulary.decode(row.tolist())
            for row in made[f"predict-tokens-{size}"]
        ]
        assert texts == [line["prediction"] for line in lines]
        scores = [line["score"] for line in lines]
        np.testing.assert_allclose(made[f"predict-scores-{size}"], scores, rtol=1e-6)
        tower = served.model.module.tower.without_pooling().build()
        params = {"params": served.restored.params["encoder"]["tower"]}
        tokens = jax.jit(tower.apply)(params, images[:size]).tokens
        tiny_models.assert_within(1e-6, made[f"features-tokens-{size}"], tokens)


LENGTHS = {"images": (16, 16, 3), "inputs": (5,), "targets": (6,)}


@pytest.mark.parametrize(
    "decode_fn",
    [decoding.greedy, pytest.param(decoding.beam_search, marks=pytest.mark.slow)],
)
def test_programs_of_any_batch_equal_a_model_with_a_t5(decode_fn):
    text = tiny_models.text_config(scan_layers=True)
    model = tiny_models.image_text_model(text=text, decode_fn=decode_fn)
    params = tiny_models.model_params(model)
    weights = {"/".join(k): v for k, v in flatten_dict(params).items()}
    made = artifacts.programs(model, weights, LENGTHS)
    assert all(program.platforms == artifacts.PLATFORMS for program in made.values())
    batch = tiny_models.batch(5)
    tokens, aux = tiny_models.jit(model.predict_batch_with_aux)(params, batch)
    run = export.deserialize(made["predict"].serialize()).call
    images, prompts = batch["encoder_input_images"], batch["encoder_input_tokens"]
    for size in (5, 1):
        got = tiny_models.jit(run)(weights, images[:size], prompts[:size])
        np.testing.assert_array_equal(got["tokens"], tokens[:size])
        np.testing.assert_allclose(got["scores"], aux["scores"][:size], rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "x"], "--config would have no effect with --format jax"),
        (["--adapter"], "--adapter would have no effect with --format jax"),
        (["--lora_alpha", "2"], "--lora_alpha would have no effect with"),
        ([], "neither what `vit22b import` or"),
    ],
)
def test_what_has_no_effect_or_cannot_be_exported_is_an_error(
    arguments, message, tmp_path, capfd
):
    command = ["export", str(tmp_path), "--format", "jax", "--out", "x", *arguments]
    assert cli.main(command) == 1 and message in capfd.readouterr().err
    command[3] = "hf-t5"
    assert cli.main([*command, "--vocabulary", "bytes"]) == 1
    assert "--vocabulary is of --format jax" in capfd.readouterr().err


def test_a_taken_directory_is_refused_before_anything_is_restored(tmp_path):
    (tmp_path / "mine").write_text("")
    converter = converters.ImageTextFeatureConverter
    with pytest.raises(UserError, match="is not an empty directory"):
        artifacts.write(
            tiny_models.image_text_model(feature_converter_cls=converter),
            checkpoint="nowhere",
            feature_lengths={"images": (8, 8), "inputs": 4, "targets": 4},
            prompts=(),
            output=str(tmp_path),
        )


def test_a_blind_model_is_no_artifact(tmp_path):
    blind = tiny_models.image_text_model(blind=True)
    with pytest.raises(UserError, match="no image tower before a text model"):
        artifacts.write(
            blind, checkpoint="", feature_lengths={}, prompts=(), output=str(tmp_path)
        )
