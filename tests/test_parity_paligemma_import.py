"""PaliGemma and PaliGemma 2 through `vit22b import` and `export`.

Random models of Hugging Face's classes: logits, bytes, greedy text. big_vision's npz of
the same weights. `pytest -rP` prints the largest absolute differences.
"""

import json
import os
import shutil

import gemma_peers as peers
import numpy as np
import pytest
import round_trips
import safetensors.numpy
from big_vision_peers import as_scanned, flax_part, siglip_as_npz
from tiny_models import Vocabulary, assert_within, images, jit
from torch_peers import torch

from vit22b_transfer import cli
from vit22b_transfer.inference import decoding, word_attention
from vit22b_transfer.models import multimodal

MEAN, DEVIATION = (0.4, 0.5, 0.55), (0.5, 0.45, 0.6)
PROMPTS, INPUTS, TARGETS = 20, 8, 10
LENGTHS = np.arange(PROMPTS) * 3 % INPUTS


def published_names(source):
    """The names that the published files have, and their config's old words."""
    path = os.path.join(source, "model.safetensors")
    tensors = safetensors.numpy.load_file(path)
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): x
        for name, x in tensors.items()
    }
    safetensors.numpy.save_file(renamed, path, {"format": "pt"})
    path = os.path.join(source, "config.json")
    with open(path) as file:
        config = json.load(file)
    config["text_config"]["hidden_act"] = "gelu"
    config["text_config"].pop("rope_parameters")
    with open(path, "w") as file:
        json.dump(config, file)


def with_processor(source):
    """An image processor's file, as published."""
    said = dict(image_mean=MEAN, image_std=DEVIATION, resample=3)
    said |= dict(size=dict(height=16, width=16))
    with open(os.path.join(source, "preprocessor_config.json"), "w") as file:
        json.dump(said, file)


@pytest.fixture(scope="module", params=["Gemma", "Gemma2"])
def whole(request, tmp_path_factory):
    kind = request.param
    change = published_names if kind == "Gemma" else with_processor
    folder = tmp_path_factory.mktemp(f"pali{kind}")
    return peers.imported(peers.paligemma_model(kind), folder, "hf-paligemma", change)


def prompts():
    """As tasks make them: EOS behind the prompt, then padding."""
    places, lengths = np.arange(INPUTS)[None], LENGTHS[:, None]
    ended = np.where(places == lengths, peers.EOS, 0)
    tokens = peers.tokens_of(PROMPTS, INPUTS, seed=1)
    return np.where(places < lengths, tokens, ended).astype(np.int32)


def their_inputs(tower, pixels, targets=None):
    """Inputs of their model, padded on the left as it wants it."""
    patches = pixels.shape[1] * pixels.shape[2] // 64
    rows = [
        [peers.IMAGE] * patches + [peers.BOS, *prompt[:length], peers.SEPARATOR]
        for prompt, length in zip(prompts(), LENGTHS, strict=True)
    ]
    widest = max(map(len, rows))
    ids = np.array([[0] * (widest - len(row)) + row for row in rows])
    kinds, mask = np.zeros_like(ids), (ids > 0).astype(int)
    if targets is not None:
        ids = np.concatenate([ids, targets], axis=1)
        kinds, mask = (
            np.concatenate([x, np.ones_like(targets)], axis=1) for x in (kinds, mask)
        )
    scaled = (pixels / 255.0 - tower.pixel_mean) / tower.pixel_std
    return dict(
        input_ids=torch.tensor(ids),
        token_type_ids=torch.tensor(kinds),
        attention_mask=torch.tensor(mask),
        pixel_values=torch.tensor(scaled).permute(0, 3, 1, 2).float(),
    )


def both_logits(module, params, models):
    """Logits of all targets: ours, and those of each of their models."""
    pixels = images(PROMPTS, *module.tower.image_size, 3)
    targets = peers.tokens_of(PROMPTS, TARGETS, seed=5)
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    logits = jit(lambda p, *x: module.apply({"params": p}, *x))
    ours = logits(params, pixels, prompts(), shifted)
    inputs = their_inputs(module.tower, pixels, targets[:, :-1])
    places = inputs["attention_mask"].cumsum(1)
    with torch.no_grad():
        theirs = [model(**inputs, position_ids=places).logits for model in models]
    assert np.std(ours) > 0.1
    return ours, [logits[:, -TARGETS:].numpy() for logits in theirs]


@pytest.mark.slow
def test_attention_of_each_token_over_the_patches_equals_hugging_faces(whole):
    module = peers.our_module(whole.out)
    model = multimodal.ImageTextModel(module, Vocabulary(), Vocabulary())
    params = peers.our_params(module, whole.out)
    pixels = images(PROMPTS, *module.tower.image_size, 3)
    targets = peers.tokens_of(PROMPTS, TARGETS, seed=5)
    ours = word_attention.WordAttention(model)(params, pixels, prompts(), targets)
    inputs = their_inputs(module.tower, pixels, targets[:, :-1])
    mask = inputs["attention_mask"]
    with torch.no_grad():
        said = whole.theirs(
            **inputs, position_ids=mask.cumsum(1), output_attentions=True
        )
    weights = torch.stack(said.attentions).mean(dim=(0, 2))[:, -TARGETS:].numpy()
    first = (mask == 0).sum(dim=1).numpy()  # images stand behind the padding
    theirs = np.stack(
        [row[:, n : n + 4] for row, n in zip(weights, first, strict=True)]
    )
    assert word_attention.grid_of(model, 16, 16) == (2, 2) and np.std(theirs) > 0.01
    assert_within(peers.TOLERANCE, ours, theirs, "attention over patches vs HF")


@pytest.mark.slow
def test_logits_of_an_imported_paligemma_equal_hugging_faces(whole):
    module = peers.our_module(whole.out)
    assert (module.bos_id, module.separator_id) == (peers.BOS, peers.SEPARATOR)
    kind = whole.theirs.config.text_config.model_type
    if kind == "gemma2":
        assert module.tower.pixel_mean == MEAN and module.tower.pixel_std == DEVIATION
    models = whole.theirs, peers.loaded(whole.exported, whole.theirs)
    params = peers.our_params(module, whole.out)
    actual, (expected, again) = both_logits(module, params, models)
    assert_within(peers.TOLERANCE, actual, expected, f"PaliGemma with {kind} vs HF")
    np.testing.assert_array_equal(again, expected)


def test_import_and_then_export_of_a_paligemma_gives_every_byte_back(whole):
    peers.assert_same_bytes(whole.source, whole.exported)


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["Gemma2"], indirect=True)
def test_what_was_trained_is_exported_by_the_sources_own_config(whole, tmp_path):
    module = peers.our_module(whole.out)
    params = round_trips.moved(peers.our_params(module, whole.out))
    out = round_trips.exported(params, tmp_path / "run", "hf-paligemma", whole.source)
    ours, (theirs,) = both_logits(module, params, [peers.loaded(out, whole.theirs)])
    assert_within(peers.TOLERANCE, ours, theirs, "a trained PaliGemma 2 vs HF")


@pytest.mark.slow
def test_greedy_text_of_an_imported_paligemma_is_hugging_faces_token_for_token(whole):
    module = peers.our_module(whole.out)
    model = multimodal.ImageTextModel(
        module,
        Vocabulary(peers.VOCAB),
        Vocabulary(peers.VOCAB),
        decode_fn=decoding.greedy,
    )
    pixels = images(PROMPTS, 16, 16, 3)
    batch = dict(
        encoder_input_images=pixels,
        encoder_input_tokens=prompts(),
        decoder_target_tokens=np.zeros((PROMPTS, TARGETS), np.int32),
    )
    ours = np.asarray(
        jit(model.predict_batch)(peers.our_params(module, whole.out), batch)
    )
    inputs = their_inputs(module.tower, pixels)
    with torch.no_grad():
        output = whole.theirs.generate(
            **inputs,
            max_new_tokens=TARGETS,
            do_sample=False,
            eos_token_id=peers.EOS,
            pad_token_id=0,
        ).numpy()
    theirs = output[:, inputs["input_ids"].shape[1] :]
    ended = (theirs == peers.EOS).any(axis=1)
    assert ended.any() and not ended.all() and len(np.unique(theirs)) > 15
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    assert not ours[:, theirs.shape[1] :].any()


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["Gemma2"], indirect=True)
def test_an_export_at_another_resolution_loads_and_gives_the_same_logits(
    whole, tmp_path
):
    out, exported = (str(tmp_path / n) for n in ("out", "exported"))
    command = ["import", whole.source, "--out", out, "--image_size", "32"]
    assert cli.main(command) == 0
    assert cli.main(["export", out, "--format", "hf-paligemma", "--out", exported]) == 0
    with open(f"{exported}/preprocessor_config.json") as file:
        assert json.load(file)["size"] == dict(height=32, width=32)
    module = peers.our_module(out)
    assert module.tower.image_size == (32, 32)
    model = peers.loaded(exported, whole.theirs)
    assert model.config.text_config.num_image_tokens == 16
    ours, (expected,) = both_logits(module, peers.our_params(module, out), [model])
    assert_within(peers.TOLERANCE, ours, expected, "PaliGemma at 32 x 32 vs HF")


@pytest.mark.parametrize("whole", ["Gemma"], indirect=True)
def test_a_head_that_does_not_repeat_the_token_table_is_refused(
    whole, tmp_path, capsys
):
    tensors = safetensors.numpy.load_file(f"{whole.source}/model.safetensors")
    table = tensors["language_model.model.embed_tokens.weight"].copy()
    tensors["language_model.lm_head.weight"] = table
    shutil.copytree(whole.source, tmp_path / "source")
    source, out, exported = (str(tmp_path / n) for n in ("source", "out", "exported"))
    safetensors.numpy.save_file(
        tensors, f"{source}/model.safetensors", {"format": "pt"}
    )
    assert cli.main(["import", source, "--out", out]) == 0
    assert cli.main(["export", out, "--format", "hf-paligemma", "--out", exported]) == 0
    peers.assert_same_bytes(source, exported)
    table[7, 3] += 1
    safetensors.numpy.save_file(
        tensors, f"{source}/model.safetensors", {"format": "pt"}
    )
    shutil.rmtree(out)
    assert cli.main(["import", source, "--out", out]) == 1
    error = capsys.readouterr().err
    assert "lm_head.weight differs from language_model.model.embed_tokens" in error
    assert not os.path.exists(f"{out}/checkpoint_0")


# --- PaliGemma of big_vision ---


def stacked(name, blocks):
    return {f"{name}/{k}": np.stack([b[k] for b in blocks]) for k in blocks[0]}


def npz_text(text):
    """big_vision's names for Gemma: a matrix for each head, layers stacked."""
    config, blocks = text.config, []
    for layer in text.layers:
        mha, mlp = layer.self_attn, layer.mlp
        q, k, v = (
            x.weight.detach().numpy().reshape(heads, 8, 24).transpose(0, 2, 1)
            for x, heads in (
                (mha.q_proj, config.num_attention_heads),
                (mha.k_proj, config.num_key_value_heads),
                (mha.v_proj, config.num_key_value_heads),
            )
        )
        out = mha.o_proj.weight.detach().numpy().T
        gates = [x.weight.detach().numpy().T for x in (mlp.gate_proj, mlp.up_proj)]
        block = {
            "attn/q_einsum/w": q,
            "attn/kv_einsum/w": np.stack([k, v]),
            "attn/attn_vec_einsum/w": out.reshape(config.num_attention_heads, 8, 24),
            "mlp/gating_einsum": np.stack(gates),
            "mlp/linear": mlp.down_proj.weight.detach().numpy().T,
        }
        names = {"pre_attention_norm": layer.input_layernorm}
        if config.model_type == "gemma2":
            names["post_attention_norm"] = layer.post_attention_layernorm
            names["pre_ffw_norm"] = layer.pre_feedforward_layernorm
            names["post_ffw_norm"] = layer.post_feedforward_layernorm
        else:
            names["pre_ffw_norm"] = layer.post_attention_layernorm
        for name, norm in names.items():
            block[f"{name}/scale"] = norm.weight.detach().numpy()
        blocks.append(block)
    return stacked("layers", blocks) | {
        "embedder/input_embedding": text.embed_tokens.weight.detach().numpy(),
        "final_norm/scale": text.norm.weight.detach().numpy(),
    }


def npz_of(model):
    inner = model.model
    projection = inner.multi_modal_projector.linear
    parts = {
        "img": as_scanned(siglip_as_npz(inner.vision_tower))
        | flax_part("head", projection),
        "llm": npz_text(inner.language_model),
    }
    return {
        f"params/{part}/{name}": np.ascontiguousarray(x)
        for part, tensors in parts.items()
        for name, x in tensors.items()
    }


# What big_vision's Gemma 2 computes: no windows, no bound of the tokens' logits.
NPZ = {
    "PaliGemma": ("Gemma", {}),
    "PaliGemma 2": (
        "Gemma2",
        dict(
            query_pre_attn_scalar=8,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=None,
            layer_types=["full_attention"] * 3,
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NPZ)
def test_an_npz_of_big_visions_layout_gives_the_same_logits_and_bytes(name, tmp_path):
    kind, options = NPZ[name]
    theirs = peers.paligemma_model(kind, **options)
    tensors = npz_of(theirs)
    source, out, exported = (str(tmp_path / n) for n in ("m.npz", "out", "exported"))
    np.savez(source, **tensors)
    family = "big_vision-paligemma"
    assert cli.main(["import", source, "--out", out]) == 0
    assert cli.main(["export", out, "--format", family, "--out", exported]) == 0
    after = np.load(f"{exported}/{family}.npz", allow_pickle=False)
    assert set(after) == set(tensors)
    assert all(after[n].tobytes() == x.tobytes() for n, x in tensors.items())
    assert all(after[n].shape == x.shape for n, x in tensors.items())
    module = peers.our_module(out)
    actual, (expected,) = both_logits(module, peers.our_params(module, out), [theirs])
    assert_within(peers.TOLERANCE, actual, expected, f"{name} npz vs HF")


def test_an_npz_whose_layers_are_not_stacked_is_refused(tmp_path, capsys):
    tensors = npz_of(peers.paligemma_model("Gemma"))
    tensors = {n.replace("layers/", "layers_0/"): x for n, x in tensors.items()}
    np.savez(tmp_path / "m.npz", **tensors)
    source, out = str(tmp_path / "m.npz"), tmp_path / "out"
    assert cli.main(["import", source, "--out", str(out)]) == 1
    assert "only files with stacked layers and fewer keys" in capsys.readouterr().err
    assert not out.exists()
