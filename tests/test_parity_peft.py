"""Adapters of PEFT through `vit22b import` and `export`: outputs, bytes, names.

Random adapters on tiny models of Hugging Face's classes. `pytest -rP` prints the
largest absolute differences.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import Vocabulary, assert_within, image_text_model, images, jit
from torch_peers import import_peer

from vit22b_transfer import cli, recipes
from vit22b_transfer.models import lora, multimodal, prefix_lm, vit
from vit22b_transfer.weights import tensor_files
from vit22b_transfer.weights.tower_rows import CLIP

transformers = import_peer("transformers")
peft = import_peer("peft")

TOLERANCE = 1e-4
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VOCAB, IMAGE, BOS, SEPARATOR = 384, 383, 2, 108
BATCH = 2
SIDES = dict(image_size=16, patch_size=8, num_hidden_layers=2, num_attention_heads=4)
TOWER = dict(hidden_size=32, intermediate_size=64, **SIDES)
GEMMA = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def tokens_of(length, seed=0):
    drawn = np.random.default_rng(seed).integers(110, 380, (BATCH, length))
    return drawn.astype(np.int32)


PIXELS = images(BATCH, 16, 16, 3)
PROMPT, TARGETS = tokens_of(5), tokens_of(7, seed=1)
SHIFTED = np.pad(TARGETS, ((0, 0), (1, 0)))[:, :-1]


def scaled(mean=0.5, deviation=0.5):
    values = (PIXELS / 255.0 - mean) / deviation
    return torch.tensor(values).permute(0, 3, 1, 2).float()


def whole_logits(model, params):
    """Of a model with a text: as the training loop computes them."""
    pixels = None if model.module.tower is None else PIXELS
    apply = jit(lambda p, *x: model.module.apply({"params": p}, *x))
    return apply(params, pixels, PROMPT, SHIFTED)


def tower_output(model, params):
    """Pooled output: SigLIP's by attention, ViT's class token."""
    tower = vit.VisionTower(model.module.tower)
    apply = jit(lambda p, pixels: tower.apply({"params": p}, pixels).pooled)
    return apply(params["encoder"]["tower"], PIXELS)


def t5_logits(model):
    prompt, shifted = (torch.tensor(x).long() for x in (PROMPT, SHIFTED))
    return model(input_ids=prompt, decoder_input_ids=shifted).logits


def gemma_logits(model):
    bos = np.full((BATCH, 1), BOS)
    ids = torch.tensor(np.concatenate([bos, PROMPT, TARGETS[:, :-1]], axis=1)).long()
    # The prompt is a prefix here, which sees itself whole.
    seen = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    seen[: 1 + PROMPT.shape[1], : 1 + PROMPT.shape[1]] = True
    mask = torch.where(seen, 0.0, -1e9)[None, None].expand(BATCH, 1, -1, -1)
    return model(ids, attention_mask=mask).logits[:, -TARGETS.shape[1] :]


def paligemma_logits(model):
    image = np.full((BATCH, 4), IMAGE)
    bos, separator = np.full((BATCH, 1), BOS), np.full((BATCH, 1), SEPARATOR)
    prefix = np.concatenate([image, bos, PROMPT, separator], axis=1)
    ids = np.concatenate([prefix, TARGETS[:, :-1]], axis=1)
    kinds = np.arange(ids.shape[1])[None] >= np.full((BATCH, 1), prefix.shape[1])
    logits = model(
        input_ids=torch.tensor(ids),
        token_type_ids=torch.tensor(kinds.astype(int)),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        pixel_values=scaled(),
    ).logits
    return logits[:, -TARGETS.shape[1] :]


def their_output(model):
    kind = model.config.model_type
    output = model(pixel_values=scaled(*CLIP) if kind.startswith("clip") else scaled())
    return output.last_hidden_state[:, 0] if kind == "vit" else output.pooler_output


def paligemma():
    vision = transformers.SiglipVisionConfig(**TOWER, vision_use_head=False)
    config = transformers.PaliGemmaConfig(
        vision_config=vision,
        text_config=transformers.GemmaConfig(**GEMMA),
        image_token_index=IMAGE,
        projection_dim=24,
        hidden_size=24,
        attn_implementation="eager",
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def t5():
    sizes = dict(vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=48, num_layers=2)
    config = transformers.T5Config(
        **sizes, num_heads=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    )
    return transformers.T5ForConditionalGeneration(config)


def gemma():
    config = transformers.Gemma2Config(
        **GEMMA, sliding_window=64, attn_implementation="eager"
    )
    return transformers.Gemma2ForCausalLM(config)


def tower_of(name):
    config = getattr(transformers, f"{name}Config")(**TOWER)
    return getattr(transformers, f"{name}Model")(config)


@dataclasses.dataclass(frozen=True)
class Case:
    """A class of theirs, what PEFT updates in it, and how both compute.

    modules: names, as PEFT takes them. root, tower: what of ours the gin file of an
    import configures. older: what the names were in transformers 4.
    """

    family: str
    build: Callable
    modules: list[str]
    theirs: Callable
    root: Callable = vit.ViTConfig
    tower: str | None = None
    older: tuple[tuple[str, str], ...] = ()


CASES = {
    "T5": Case(
        "hf-t5",
        t5,
        ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        t5_logits,
        multimodal.ImageTextModule,
        "None",
    ),
    "Gemma 2": Case(
        "hf-gemma",
        gemma,
        ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"],
        gemma_logits,
        prefix_lm.PrefixLMModule,
        "None",
    ),
    "PaliGemma": Case(
        "hf-paligemma",
        paligemma,
        ["q_proj", "v_proj", "fc1"],
        paligemma_logits,
        prefix_lm.PrefixLMModule,
        "%TOWER",
        (
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower.vision_model."),
        ),
    ),
    "SigLIP": Case(
        "hf-siglip",
        lambda: tower_of("SiglipVision"),
        ["q_proj", "v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"],
        their_output,
        older=(("encoder.", "vision_model.encoder."),),
    ),
    "CLIP": Case(
        "hf-clip", lambda: tower_of("CLIPVision"), ["k_proj", "fc2"], their_output
    ),
    "ViT": Case(
        "hf-vit",
        lambda: tower_of("ViT"),
        ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        their_output,
        older=(
            ("layers.", "vit.encoder.layer."),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ),
    ),
}


def drawn(model):
    """The model in evaluation mode, its parameters random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(0.7 * noise / parameter[0].numel() ** 0.5)
    return model.eval()


def outputs_of(case, model):
    with torch.no_grad():
        return case.theirs(model).numpy()


@dataclasses.dataclass(frozen=True)
class Imported:
    """A case, its directories, and the outputs of PEFT's model."""

    case: Case
    source: str
    adapter: str
    out: str
    expected: np.ndarray

    def path(self, name):
        """Another directory beside these."""
        return os.path.join(os.path.dirname(self.out), name)


@pytest.fixture(scope="module", params=CASES)
def imported(request, tmp_path_factory):
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(case.family)
    source, adapter, out = (str(folder / n) for n in ("source", "adapter", "out"))
    model = drawn(case.build())
    model.save_pretrained(source)
    plain = outputs_of(case, model)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=case.modules,
        lora_dropout=0.1,
        init_lora_weights=False,
    )
    updated = peft.get_peft_model(model, config).eval()
    updated.save_pretrained(adapter)
    expected = outputs_of(case, updated)
    assert np.max(np.abs(expected - plain)) > 0.03, "the adapter does something"
    assert cli.main(["import", source, adapter, "--out", out]) == 0
    return Imported(case, source, adapter, out, expected)


def our_model(case, out):
    """The model that the import's gin file describes, and its parameters.

    The patterns of the gin file choose the kernels that the adapter updates.
    """
    whole = case.root if case.tower else multimodal.ImageTextModule
    module = whole.__module__.rpartition(".")[2]
    with open(f"{out}/tower.gin", "w") as file:
        file.write(
            "from __gin__ import dynamic_registration\n"
            f"from vit22b_transfer.models import {module}\n"
            f"{module}.{whole.__name__}.tower = {case.tower or '%TOWER'}\n"
        )
    recipe = recipes.read([f"{out}/model.gin", f"{out}/tower.gin"], [], (ROOT, ""))
    config, module = (
        recipes.install(recipe, root, (ROOT, ""))()
        for root in (lora.LoraConfig, case.root)
    )
    gin.clear_config()
    if not case.tower:
        module = image_text_model(module).module
    vocabulary = Vocabulary(2)
    model = multimodal.ImageTextModel(module, vocabulary, vocabulary, lora=config)
    tensors = tensor_files.open_tensors(f"{out}/checkpoint_0")
    params = {
        name.removeprefix("target/"): jnp.asarray(tensor.read())
        for name, tensor in tensors.items()
        if name.startswith("target/")
    }
    shapes = {
        "encoder_input_images": (1, 16, 16, 3),
        "encoder_input_tokens": (1, 2),
        "decoder_input_tokens": (1, 2),
    }
    variables = jax.eval_shape(
        lambda: model.get_initial_variables(jax.random.key(0), shapes)
    )
    chosen = {
        name: leaf.shape
        for name, leaf in flatten_dict(variables["params"], sep="/").items()
        if "lora_" in name
    }
    # The image-text model does without SigLIP's pooling.
    updates = {n: x.shape for n, x in params.items() if "lora_" in n}
    assert chosen == {n: shape for n, shape in updates.items() if "/map/" not in n}
    return model, unflatten_dict(params, sep="/")


def test_an_imported_adapter_computes_what_pefts_model_does(imported):
    model, params = our_model(imported.case, imported.out)
    assert model.lora.rank == 3 and model.lora.alpha == 5.0
    ours = whole_logits if imported.case.tower else tower_output
    actual = ours(model, params)
    name = f"{imported.case.family} with an adapter vs PEFT"
    assert_within(TOLERANCE, actual, imported.expected, name)


def test_peft_loads_an_exported_adapter_and_computes_the_same(imported):
    exported = imported.path("exported")
    format = ["--format", imported.case.family]
    command = ["export", imported.out, *format, "--adapter", "--out", exported]
    assert cli.main(command) == 0
    before, after = (
        safetensors.numpy.load_file(f"{folder}/adapter_model.safetensors")
        for folder in (imported.adapter, exported)
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes(), name
    model = peft.PeftModel.from_pretrained(drawn(imported.case.build()), exported)
    actual = outputs_of(imported.case, model.eval())
    np.testing.assert_array_equal(actual, imported.expected)


def test_hugging_face_loads_a_merged_export_and_computes_the_same(imported, capsys):
    merged = imported.path("merged")
    command = ["export", imported.out, "--format", imported.case.family]
    assert cli.main([*command, "--out", merged]) == 0
    assert "merged the updates of" in capsys.readouterr().out
    kind = type(imported.case.build())
    model, info = kind.from_pretrained(
        merged, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    actual = outputs_of(imported.case, model.eval())
    name = f"{imported.case.family}, merged, vs PEFT"
    assert_within(TOLERANCE, actual, imported.expected, name)


@pytest.mark.parametrize(
    "imported", [name for name in CASES if CASES[name].older], indirect=True
)
def test_names_that_transformers_4_gave_its_modules_are_read_too(imported):
    adapter, out = imported.path("older"), imported.path("older_out")
    os.mkdir(adapter)
    shutil.copy(f"{imported.adapter}/adapter_config.json", adapter)
    tensors = safetensors.numpy.load_file(
        f"{imported.adapter}/adapter_model.safetensors"
    )
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("base_model.model.")
        for new, old in imported.case.older:
            name = name.replace(new, old)
        renamed[f"base_model.model.{name}"] = tensor
    safetensors.numpy.save_file(renamed, f"{adapter}/adapter_model.safetensors")
    assert cli.main(["import", imported.source, adapter, "--out", out]) == 0
    _, expected = our_model(imported.case, imported.out)
    _, actual = our_model(imported.case, out)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
