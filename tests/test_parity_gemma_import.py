"""Gemma 1, 2 and 3 through `vit22b import` and `export`: logits, bytes, starts.

`pytest -rP` prints the largest absolute differences.
"""

import ast
import copy
import os
import re

import gemma_peers as peers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import round_trips
import safetensors.numpy
from tiny_models import assert_within, jit, tower_config
from torch_peers import torch

from vit22b_transfer import cli
from vit22b_transfer.checkpoints import restoring
from vit22b_transfer.weights.files import tensor_files

BATCH, LENGTH = 2, 14


def older_names(source):
    """The files of a model without its head: names lack `model.`."""
    path = os.path.join(source, "model.safetensors")
    tensors = safetensors.numpy.load_file(path)
    renamed = {name.removeprefix("model."): x for name, x in tensors.items()}
    safetensors.numpy.save_file(renamed, path, {"format": "pt"})


@pytest.fixture(scope="module", params=peers.KINDS)
def text(request, tmp_path_factory):
    kind = request.param
    model = getattr(peers.transformers, f"{kind}ForCausalLM")(peers.text_config(kind))
    change = older_names if kind == "Gemma3" else None
    folder = tmp_path_factory.mktemp(kind)
    return peers.imported(peers.drawn(model), folder, "hf-gemma", change)


@pytest.mark.slow
def test_logits_of_an_imported_text_model_equal_hugging_faces(text):
    module = peers.our_module(text.out, blind=True)
    assert module.bos_id == peers.BOS
    tokens = peers.tokens_of(BATCH, LENGTH)
    shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    nothing = np.zeros((BATCH, 1), np.int32)  # the prompt is BOS alone
    params = peers.our_params(module, text.out)
    logits = jit(lambda p, *x: module.apply({"params": p}, None, *x))
    actual = logits(params, nothing, shifted)
    theirs = np.concatenate([nothing + peers.BOS, tokens[:, :-1]], axis=1)
    with torch.no_grad():
        expected = text.theirs(torch.tensor(theirs).long()).logits
        again = peers.loaded(text.exported, text.theirs)(
            torch.tensor(theirs).long()
        ).logits
    assert np.std(actual) > 0.1
    assert_within(
        peers.TOLERANCE, actual, expected, f"{type(text.theirs).__name__} vs HF"
    )
    np.testing.assert_array_equal(again, expected)


def test_import_and_then_export_of_a_text_gives_every_byte_back(text):
    peers.assert_same_bytes(text.source, text.exported)


@pytest.mark.slow
def test_what_was_trained_is_exported_by_the_sources_own_config(text, tmp_path):
    module = peers.our_module(text.out, blind=True)
    params = round_trips.moved(peers.our_params(module, text.out))
    out = round_trips.exported(params, tmp_path / "run", "hf-gemma", text.source)
    peers.loaded(out, text.theirs)
    written = tensor_files.open_tensors(out)
    (table,) = (n for n in written if n.endswith("embed_tokens.weight"))
    ours = params["token_embedder"]["embedding"]
    np.testing.assert_array_equal(written[table].read(), ours)
    assert written.keys() == tensor_files.open_tensors(text.source).keys()


def test_an_image_text_model_starts_from_it_by_the_rules_of_the_gin_file(text):
    """A fresh tower and projection before the imported text model."""
    blind = peers.our_module(text.out, blind=True)
    with open(f"{text.out}/model.gin", encoding="utf-8") as file:
        (rules,) = re.findall(r"train\.InitialCheckpoint\.rules = (.*)", file.read())
    whole = blind.clone(tower=tower_config())
    restored = restoring.restore_partial(
        text.out, peers.abstract_params(whole), ast.literal_eval(rules)
    )
    assert {name.split("/")[1] for name in restored.kept} == {"tower", "projection"}
    assert not restored.unused
    assert jax.tree.structure(restored.params) == jax.tree.structure(
        peers.abstract_params(blind)
    )


@pytest.mark.parametrize("text", ["Gemma2"], indirect=True)
def test_shards_in_bfloat16_keep_every_byte_and_scan_on_request(text, tmp_path):
    source, out, exported = (str(tmp_path / n) for n in ("source", "out", "exported"))
    half = copy.deepcopy(text.theirs).bfloat16()
    half.save_pretrained(source, max_shard_size="16KB")
    assert os.path.exists(f"{source}/model.safetensors.index.json")
    assert cli.main(["import", source, "--out", out, "--scan_layers"]) == 0
    assert cli.main(["export", out, "--format", "hf-gemma", "--out", exported]) == 0
    peers.assert_same_bytes(source, exported)
    assert all(
        tensor.dtype.name == "bfloat16"
        for tensor in tensor_files.open_tensors(exported).values()
    )
    module = peers.our_module(out, blind=True)
    assert module.text.scan_layers and module.text.param_dtype == "bfloat16"
    kernel = peers.our_params(module, out)["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.shape == (3, 24, 40) and kernel.dtype == jnp.bfloat16
    again = peers.loaded(exported, half)
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["Gemma"], indirect=True)
def test_another_vocabulary_on_request(text, tmp_path):
    out, exported = (str(tmp_path / n) for n in ("out", "exported"))
    assert cli.main(["import", text.source, "--out", out, "--vocab_size", "136"]) == 0
    params = peers.our_params(peers.our_module(out, blind=True), out)
    table = params["token_embedder"]["embedding"]
    assert table.shape == (136, 24)
    np.testing.assert_allclose(table[128:], np.tile(table[:128].mean(0), (8, 1)), 1e-4)
    assert cli.main(["export", out, "--format", "hf-gemma", "--out", exported]) == 0
    assert peers.loaded(exported, text.theirs).config.vocab_size == 136


# --- Gemma 3 with its image tower, of which the text is imported ---


def test_the_text_of_a_whole_gemma3_is_imported_and_the_rest_is_kept(tmp_path):
    vision = peers.transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    config = peers.transformers.Gemma3Config(
        vision_config=vision,
        text_config=peers.text_config("Gemma3"),
        mm_tokens_per_image=4,
        image_token_index=peers.IMAGE,
        boi_token_index=peers.VOCAB - 2,
        eoi_token_index=peers.VOCAB - 3,
        attn_implementation="eager",
    )
    model = peers.drawn(
        peers.transformers.Gemma3ForConditionalGeneration(config), seed=1
    )
    whole = peers.imported(model, tmp_path, "hf-gemma")
    peers.assert_same_bytes(whole.source, whole.exported)
    module = peers.our_module(whole.out, blind=True)
    tokens = peers.tokens_of(BATCH, LENGTH)
    nothing = np.zeros((BATCH, 1), np.int32)
    shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    params = peers.our_params(module, whole.out)
    actual = jit(lambda p, *x: module.apply({"params": p}, None, *x))(
        params, nothing, shifted
    )
    theirs = torch.tensor(
        np.concatenate([nothing + peers.BOS, tokens[:, :-1]], 1)
    ).long()
    with torch.no_grad():
        expected = model(input_ids=theirs).logits
        again = peers.loaded(whole.exported, model)(input_ids=theirs).logits
    assert_within(
        peers.TOLERANCE, actual, expected, "Gemma3ForConditionalGeneration vs HF"
    )
    np.testing.assert_array_equal(again, expected)
