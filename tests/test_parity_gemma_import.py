"""Gemma 1, 2, 3 and PaliGemma through `vit22b import` and `export`.

Random models of Hugging Face's classes: logits, bytes, greedy text. big_vision's npz of
the same weights. `pytest -rP` prints the largest absolute differences.
"""

import ast
import copy
import dataclasses
import json
import os
import re

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from tiny_models import Vocabulary, assert_within, images, jit, tower_config
from torch_peers import import_peer

from vit22b_transfer import cli, recipes
from vit22b_transfer.inference import decoding
from vit22b_transfer.models import multimodal, prefix_lm
from vit22b_transfer.training import checkpoints, partial_restore
from vit22b_transfer.weights import tensor_files

transformers = import_peer("transformers")
saved_names = import_peer("transformers.core_model_loading").revert_weight_conversion

TOLERANCE = 1e-4
VOCAB, BOS, SEPARATOR, EOS = 128, 2, 108, 1
IMAGE = VOCAB - 1
BATCH, LENGTH = 2, 14

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=3,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    attn_implementation="eager",
)
# Windows shorter than the sequences, soft caps that bite.
KINDS = {
    "Gemma": dict(num_key_value_heads=1),
    "Gemma2": dict(
        sliding_window=4,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "Gemma3": dict(
        sliding_window=3,
        query_pre_attn_scalar=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        ),
    ),
}


def text_config(kind, **options):
    """Hugging Face's configuration of a tiny text model."""
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    return getattr(transformers, name)(**(SIZES | KINDS[kind] | options))


def drawn(model, seed=0):
    """The model in evaluation mode, all parameters random, none left at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(("layer_norm" in name) + 0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(0.7 * noise / parameter[0].numel() ** 0.5)
    return model.eval()


def tokens_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(10, 100, shape, np.int32)


@dataclasses.dataclass(frozen=True)
class Imported:
    """Their model, its files, the directory of the import, and what was exported."""

    theirs: torch.nn.Module
    source: str
    out: str
    exported: str


def imported(model, folder, family, change=None):
    """Saves the model, changes the files, imports and exports them by the command."""
    source, out, exported = (str(folder / n) for n in ("source", "out", "exported"))
    model.save_pretrained(source)
    if change:
        change(source)
    assert cli.main(["import", source, "--out", out]) == 0
    assert cli.main(["export", out, "--format", family, "--out", exported]) == 0
    return Imported(model, source, out, exported)


def our_module(out, *, blind=False):
    """The network that `model.gin` describes."""
    value = "None" if blind else "%TOWER"
    tower = [f"prefix_lm.PrefixLMModule.tower={value}"]
    recipe = recipes.read([f"{out}/model.gin"], tower, ("",))
    module = recipes.install(recipe, prefix_lm.PrefixLMModule, ("",))()
    gin.clear_config()
    return module


def abstract_params(module):
    """Shapes, dtypes and the one device of the network's parameters."""
    pixels = None
    if module.tower is not None:
        pixels = jnp.zeros((1, *module.tower.image_size, 3), jnp.uint8)
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = module.init, jax.random.key(0), pixels, tokens, tokens
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(*init)["params"],
    )


def our_params(module, out):
    """The imported parameters, restored as training restores them."""
    abstract = abstract_params(module)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return checkpoints.restore_params(out, abstract, shardings)


def assert_same_bytes(before, after):
    before, after = map(tensor_files.open_tensors, (before, after))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        assert tensor.read().tobytes() == after[name].read().tobytes(), name


def loaded(models, like):
    """What Hugging Face's class loads of an export, which has to be everything."""
    model, info = type(like).from_pretrained(
        models, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


# --- Text models ---


def older_names(source):
    """The files of a model without its head: names lack `model.`."""
    path = os.path.join(source, "model.safetensors")
    tensors = safetensors.numpy.load_file(path)
    renamed = {name.removeprefix("model."): x for name, x in tensors.items()}
    safetensors.numpy.save_file(renamed, path, {"format": "pt"})


@pytest.fixture(scope="module", params=KINDS)
def text(request, tmp_path_factory):
    kind = request.param
    model = getattr(transformers, f"{kind}ForCausalLM")(text_config(kind))
    change = older_names if kind == "Gemma3" else None
    folder = tmp_path_factory.mktemp(kind)
    return imported(drawn(model), folder, "hf-gemma", change)


def test_logits_of_an_imported_text_model_equal_hugging_faces(text):
    module = our_module(text.out, blind=True)
    assert module.bos_id == BOS
    tokens = tokens_of(BATCH, LENGTH)
    shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    nothing = np.zeros((BATCH, 1), np.int32)  # the prompt is BOS alone
    params = our_params(module, text.out)
    logits = jit(lambda p, *x: module.apply({"params": p}, None, *x))
    actual = logits(params, nothing, shifted)
    theirs = np.concatenate([nothing + BOS, tokens[:, :-1]], axis=1)
    with torch.no_grad():
        expected = text.theirs(torch.tensor(theirs).long()).logits
        again = loaded(text.exported, text.theirs)(torch.tensor(theirs).long()).logits
    assert np.std(actual) > 0.1
    assert_within(TOLERANCE, actual, expected, f"{type(text.theirs).__name__} vs HF")
    np.testing.assert_array_equal(again, expected)


def test_import_and_then_export_of_a_text_gives_every_byte_back(text):
    assert_same_bytes(text.source, text.exported)


def test_an_image_text_model_starts_from_it_by_the_rules_of_the_gin_file(text):
    """A fresh tower and projection before the imported text model."""
    blind = our_module(text.out, blind=True)
    with open(f"{text.out}/model.gin", encoding="utf-8") as file:
        (rules,) = re.findall(r"train\.InitialCheckpoint\.rules = (.*)", file.read())
    whole = blind.clone(tower=tower_config())
    restored = partial_restore.restore_partial(
        text.out, abstract_params(whole), ast.literal_eval(rules)
    )
    assert {name.split("/")[1] for name in restored.kept} == {"tower", "projection"}
    assert not restored.unused
    assert jax.tree.structure(restored.params) == jax.tree.structure(
        abstract_params(blind)
    )


@pytest.mark.parametrize("text", ["Gemma2"], indirect=True)
def test_shards_in_bfloat16_keep_every_byte_and_scan_on_request(text, tmp_path):
    source, out, exported = (str(tmp_path / n) for n in ("source", "out", "exported"))
    half = copy.deepcopy(text.theirs).bfloat16()
    half.save_pretrained(source, max_shard_size="16KB")
    assert os.path.exists(f"{source}/model.safetensors.index.json")
    assert cli.main(["import", source, "--out", out, "--scan_layers"]) == 0
    assert cli.main(["export", out, "--format", "hf-gemma", "--out", exported]) == 0
    assert_same_bytes(source, exported)
    assert all(
        tensor.dtype.name == "bfloat16"
        for tensor in tensor_files.open_tensors(exported).values()
    )
    module = our_module(out, blind=True)
    assert module.text.scan_layers and module.text.param_dtype == "bfloat16"
    kernel = our_params(module, out)["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.shape == (3, 24, 40) and kernel.dtype == jnp.bfloat16
    again = loaded(exported, half)
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["Gemma"], indirect=True)
def test_another_vocabulary_on_request(text, tmp_path):
    out, exported = (str(tmp_path / n) for n in ("out", "exported"))
    assert cli.main(["import", text.source, "--out", out, "--vocab_size", "136"]) == 0
    table = our_params(our_module(out, blind=True), out)["token_embedder"]["embedding"]
    assert table.shape == (136, 24)
    np.testing.assert_allclose(table[128:], np.tile(table[:128].mean(0), (8, 1)), 1e-4)
    assert cli.main(["export", out, "--format", "hf-gemma", "--out", exported]) == 0
    assert loaded(exported, text.theirs).config.vocab_size == 136


# --- Gemma 3 with its image tower, of which the text is imported ---


def test_the_text_of_a_whole_gemma3_is_imported_and_the_rest_is_kept(tmp_path):
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    config = transformers.Gemma3Config(
        vision_config=vision,
        text_config=text_config("Gemma3"),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
        attn_implementation="eager",
    )
    model = drawn(transformers.Gemma3ForConditionalGeneration(config), seed=1)
    whole = imported(model, tmp_path, "hf-gemma")
    assert_same_bytes(whole.source, whole.exported)
    module = our_module(whole.out, blind=True)
    tokens = tokens_of(BATCH, LENGTH)
    nothing = np.zeros((BATCH, 1), np.int32)
    shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    params = our_params(module, whole.out)
    actual = jit(lambda p, *x: module.apply({"params": p}, None, *x))(
        params, nothing, shifted
    )
    theirs = torch.tensor(np.concatenate([nothing + BOS, tokens[:, :-1]], 1)).long()
    with torch.no_grad():
        expected = model(input_ids=theirs).logits
        again = loaded(whole.exported, model)(input_ids=theirs).logits
    assert_within(TOLERANCE, actual, expected, "Gemma3ForConditionalGeneration vs HF")
    np.testing.assert_array_equal(again, expected)


# --- PaliGemma ---

MEAN, DEVIATION = (0.4, 0.5, 0.55), (0.5, 0.45, 0.6)
PROMPTS, INPUTS, TARGETS = 20, 8, 10
LENGTHS = np.arange(PROMPTS) * 3 % INPUTS


def paligemma_model(kind, **options):
    """A random PaliGemma of Hugging Face; options are the text's."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    config = transformers.PaliGemmaConfig(
        vision_config=vision,
        text_config=text_config(kind, **options),
        image_token_index=IMAGE,
        projection_dim=24,
        hidden_size=24,
        attn_implementation="eager",
    )
    model = drawn(transformers.PaliGemmaForConditionalGeneration(config), seed=3)
    with torch.no_grad():  # texts shall be of many tokens, and some shall end
        for name, parameter in model.named_parameters():
            if "language_model" in name and "q_proj" in name:
                parameter *= 4
            if name.endswith("language_model.norm.weight"):
                parameter += 4
        table = model.lm_head.weight
        table *= 0.1
        table[EOS] = 1.1 * table[112]
    return model


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
    said = dict(image_mean=MEAN, image_std=DEVIATION, resample=3)
    said |= dict(size=dict(height=16, width=16))
    with open(os.path.join(source, "preprocessor_config.json"), "w") as file:
        json.dump(said, file)


@pytest.fixture(scope="module", params=["Gemma", "Gemma2"])
def whole(request, tmp_path_factory):
    kind = request.param
    change = published_names if kind == "Gemma" else with_processor
    folder = tmp_path_factory.mktemp(f"pali{kind}")
    return imported(paligemma_model(kind), folder, "hf-paligemma", change)


def prompts():
    """As tasks make them: EOS behind the prompt, then padding."""
    places, lengths = np.arange(INPUTS)[None], LENGTHS[:, None]
    ended = np.where(places == lengths, EOS, 0)
    tokens = tokens_of(PROMPTS, INPUTS, seed=1)
    return np.where(places < lengths, tokens, ended).astype(np.int32)


def their_inputs(tower, pixels, targets=None):
    """Inputs of their model, padded on the left as it wants it."""
    rows = [
        [IMAGE] * 4 + [BOS, *prompt[:length], SEPARATOR]
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


def both_logits(module, params, peers):
    """Logits of all targets: ours, and those of each of the peers."""
    pixels = images(PROMPTS, 16, 16, 3)
    targets = tokens_of(PROMPTS, TARGETS, seed=5)
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    logits = jit(lambda p, *x: module.apply({"params": p}, *x))
    ours = logits(params, pixels, prompts(), shifted)
    inputs = their_inputs(module.tower, pixels, targets[:, :-1])
    places = inputs["attention_mask"].cumsum(1)
    with torch.no_grad():
        theirs = [peer(**inputs, position_ids=places).logits for peer in peers]
    assert np.std(ours) > 0.1
    return ours, [logits[:, -TARGETS:].numpy() for logits in theirs]


def test_logits_of_an_imported_paligemma_equal_hugging_faces(whole):
    module = our_module(whole.out)
    assert (module.bos_id, module.separator_id) == (BOS, SEPARATOR)
    kind = whole.theirs.config.text_config.model_type
    if kind == "gemma2":
        assert module.tower.pixel_mean == MEAN and module.tower.pixel_std == DEVIATION
    peers = whole.theirs, loaded(whole.exported, whole.theirs)
    params = our_params(module, whole.out)
    actual, (expected, again) = both_logits(module, params, peers)
    assert_within(TOLERANCE, actual, expected, f"PaliGemma with {kind} vs HF")
    np.testing.assert_array_equal(again, expected)


def test_import_and_then_export_of_a_paligemma_gives_every_byte_back(whole):
    assert_same_bytes(whole.source, whole.exported)


def test_greedy_text_of_an_imported_paligemma_is_hugging_faces_token_for_token(whole):
    module = our_module(whole.out)
    model = multimodal.ImageTextModel(
        module, Vocabulary(VOCAB), Vocabulary(VOCAB), decode_fn=decoding.greedy
    )
    pixels = images(PROMPTS, 16, 16, 3)
    batch = dict(
        encoder_input_images=pixels,
        encoder_input_tokens=prompts(),
        decoder_target_tokens=np.zeros((PROMPTS, TARGETS), np.int32),
    )
    ours = np.asarray(jit(model.predict_batch)(our_params(module, whole.out), batch))
    inputs = their_inputs(module.tower, pixels)
    with torch.no_grad():
        output = whole.theirs.generate(
            **inputs,
            max_new_tokens=TARGETS,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        ).numpy()
    theirs = output[:, inputs["input_ids"].shape[1] :]
    ended = (theirs == EOS).any(axis=1)
    assert ended.any() and not ended.all() and len(np.unique(theirs)) > 15
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    assert not ours[:, theirs.shape[1] :].any()


# --- PaliGemma of big_vision ---


def flax_linear(name, module, heads=None):
    """torch's Linear as flax has it; heads: "in" or "out", of four."""
    kernel = module.weight.detach().numpy().T
    bias = module.bias.detach().numpy()
    if heads == "in":
        kernel, bias = kernel.reshape(len(kernel), 4, -1), bias.reshape(4, -1)
    elif heads == "out":
        kernel = kernel.reshape(4, -1, kernel.shape[-1])
    return {f"{name}/kernel": kernel, f"{name}/bias": bias}


def flax_norm(name, module):
    named = dict(scale=module.weight, bias=module.bias)
    return {f"{name}/{key}": x.detach().numpy() for key, x in named.items()}


def npz_tower(tower):
    """big_vision's names for SigLIP's tower, its blocks stacked."""
    patches = tower.embeddings.patch_embedding
    table = tower.embeddings.position_embedding.weight.detach().numpy()
    blocks = []
    for layer in tower.encoder.layers:
        mha, at = layer.self_attn, "MultiHeadDotProductAttention_0"
        block = flax_norm("LayerNorm_0", layer.layer_norm1)
        block |= flax_norm("LayerNorm_1", layer.layer_norm2)
        block |= flax_linear("MlpBlock_0/Dense_0", layer.mlp.fc1)
        block |= flax_linear("MlpBlock_0/Dense_1", layer.mlp.fc2)
        block |= flax_linear(f"{at}/out", mha.out_proj, "out")
        for part in ("query", "key", "value"):
            module = getattr(mha, f"{part[0]}_proj")
            block |= flax_linear(f"{at}/{part}", module, "in")
        blocks.append(block)
    return (
        {
            "pos_embedding": table[None],
            "embedding/kernel": patches.weight.detach().numpy().transpose(2, 3, 1, 0),
            "embedding/bias": patches.bias.detach().numpy(),
        }
        | stacked("Transformer/encoderblock", blocks)
        | flax_norm("Transformer/encoder_norm", tower.post_layernorm)
    )


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
        "img": npz_tower(inner.vision_tower) | flax_linear("head", projection),
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


@pytest.mark.parametrize("name", NPZ)
def test_an_npz_of_big_visions_layout_gives_the_same_logits_and_bytes(name, tmp_path):
    kind, options = NPZ[name]
    theirs = paligemma_model(kind, **options)
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
    module = our_module(out)
    actual, (expected,) = both_logits(module, our_params(module, out), [theirs])
    assert_within(TOLERANCE, actual, expected, f"{name} npz vs HF")


def test_an_npz_whose_layers_are_not_stacked_is_refused(tmp_path, capsys):
    tensors = npz_of(paligemma_model("Gemma"))
    tensors = {n.replace("layers/", "layers_0/"): x for n, x in tensors.items()}
    np.savez(tmp_path / "m.npz", **tensors)
    source, out = str(tmp_path / "m.npz"), tmp_path / "out"
    assert cli.main(["import", source, "--out", str(out)]) == 1
    assert "only files with stacked layers and fewer keys" in capsys.readouterr().err
    assert not out.exists()
