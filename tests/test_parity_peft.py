"""Adapters of PEFT through `vit22b import` and `export`: outputs, bytes, names.

Random adapters on tiny models of Hugging Face's classes. Of four models that differ in
kind the outputs are compared, of all the names and bytes: what a kernel of the others
computes is compared without adapters, in the files of their families. `pytest -rP`
prints the largest absolute differences.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable

import gin
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from tiny_models import Vocabulary, assert_within, image_text_model, images, jit
from torch_peers import drawn, import_peer, torch

from vit22b_transfer import cli
from vit22b_transfer.models import encoder_decoder, lora, multimodal, prefix_lm, vit
from vit22b_transfer.recipes import loading
from vit22b_transfer.weights.adapters import peft_adapters, peft_modules
from vit22b_transfer.weights.families.image_processors import CLIP, HALF, IMAGENET
from vit22b_transfer.weights.files import tensor_files

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


def scaled(mean, deviation):
    values = (PIXELS / 255.0 - np.array(mean)) / np.array(deviation)
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
        pixel_values=scaled(*HALF),
    ).logits
    return logits[:, -TARGETS.shape[1] :]


def pooled(colours=HALF):
    return lambda model: model(pixel_values=scaled(*colours)).pooler_output


def class_token(colours=HALF):
    """Of the classes that pool in no way of ours."""
    return lambda model: model(pixel_values=scaled(*colours)).last_hidden_state[:, 0]


def naflex_pooled(model):
    patches = scaled(*HALF).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
    return model(
        patches.reshape(BATCH, 4, -1),
        torch.ones(BATCH, 4, dtype=torch.int64),
        torch.tensor([[2, 2]] * BATCH),
    ).pooler_output


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


def t5(name="T5", **options):
    sizes = dict(vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=48, num_layers=2)
    config = getattr(transformers, f"{name}Config")(
        **sizes, num_heads=3, tie_word_embeddings=False, **options
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def gemma(name, config_name, **options):
    config = getattr(transformers, config_name)(
        **GEMMA, attn_implementation="eager", **options
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def tower_of(name, **options):
    config = getattr(transformers, f"{name}Config")(**TOWER, **options)
    return getattr(transformers, f"{name}Model")(config)


@dataclasses.dataclass(frozen=True)
class Case:
    """A class of theirs, what PEFT updates in it, and how both compute.

    modules: names, as PEFT takes them. root, tower: what of ours the gin file of an
    import configures. older: what the names were in transformers 4, or are in a model
    that holds this one.
    """

    family: str
    build: Callable
    modules: list[str]
    theirs: Callable
    root: Callable = vit.ViTConfig
    tower: str | None = None
    older: tuple[tuple[str, str], ...] = ()


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OLDER_ATTENTION = (
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
)
CASES = {
    "T5": Case(
        "hf-t5",
        lambda: t5(feed_forward_proj="gated-gelu"),
        ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        t5_logits,
        encoder_decoder.ImageTextModule,
        "None",
    ),
    "Gemma 2": Case(
        "hf-gemma",
        lambda: gemma("Gemma2", "Gemma2Config", sliding_window=64),
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
        pooled(),
        older=(("encoder.", "vision_model.encoder."),),
    ),
    "CLIP": Case(
        "hf-clip", lambda: tower_of("CLIPVision"), ["k_proj", "fc2"], pooled(CLIP)
    ),
    "ViT": Case(
        "hf-vit",
        lambda: tower_of("ViT"),
        [*ATTENTION, "fc1", "fc2"],
        class_token(),
        older=(
            ("layers.", "vit.encoder.layer."),
            *OLDER_ATTENTION,
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ),
    ),
    "SigLIP 2 NaFlex": Case(
        "hf-siglip2-naflex",
        lambda: tower_of("Siglip2Vision", num_patches=4),
        ["q_proj", "v_proj", "self_attn.out_proj", "mlp.fc1"],
        naflex_pooled,
    ),
    # The files fuse what are two modules of the gated MLP.
    "DINOv2 g": Case(
        "hf-dinov2",
        lambda: tower_of("Dinov2", use_swiglu_ffn=True),
        ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        pooled(IMAGENET),
    ),
    "DINOv2 registers": Case(
        "hf-dinov2",
        lambda: tower_of("Dinov2WithRegisters", mlp_ratio=2),
        [*ATTENTION, "fc1", "fc2"],
        pooled(IMAGENET),
        older=(("encoder.", "dinov2_with_registers.encoder."), *OLDER_ATTENTION),
    ),
    "DINOv3": Case(
        "hf-dinov3",
        lambda: tower_of("DINOv3ViT", num_register_tokens=2),
        [*ATTENTION, "up_proj", "down_proj"],
        pooled(IMAGENET),
        older=(("model.layer.", "layer."),),
    ),
    "InternViT": Case(
        "hf-internvl-vision",
        lambda: tower_of("InternVLVision", use_qk_norm=True, norm_type="rms_norm"),
        ["q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"],
        class_token(IMAGENET),
        older=(("encoder.", "model.vision_tower.encoder."),),
    ),
}
# A text model, a tower, both, and a tower whose files fuse what an adapter does not.
COMPUTED = ["T5", "PaliGemma", "SigLIP", "DINOv2 g"]
# Of families that are above, other layouts.
VARIANTS = {
    # With ByT5's unequal depths and the first T5's MLP.
    "mT5": dataclasses.replace(
        CASES["T5"],
        build=lambda: t5("MT5", num_decoder_layers=1, feed_forward_proj="relu"),
        modules=["q", "v", "o", "wi", "wo"],
    ),
    "Gemma 1": dataclasses.replace(
        CASES["Gemma 2"], build=lambda: gemma("Gemma", "GemmaConfig")
    ),
    "Gemma 3": dataclasses.replace(
        CASES["Gemma 2"],
        build=lambda: gemma("Gemma3", "Gemma3TextConfig", sliding_window=64),
    ),
}


def outputs_of(case, model):
    with torch.no_grad():
        return case.theirs(model).numpy()


@dataclasses.dataclass(frozen=True)
class Imported:
    """A case, its directories, and the outputs of PEFT's model if it is COMPUTED."""

    case: Case
    source: str
    adapter: str
    out: str
    expected: np.ndarray | None

    def path(self, name):
        """Another directory beside these."""
        return os.path.join(os.path.dirname(self.out), name)


@pytest.fixture(scope="module")
def imported(request, tmp_path_factory):
    case = (CASES | VARIANTS)[request.param]
    folder = tmp_path_factory.mktemp(case.family)
    source, adapter, out = (str(folder / n) for n in ("source", "adapter", "out"))
    model = drawn(case.build())
    model.save_pretrained(source)
    computed = request.param in COMPUTED
    plain = outputs_of(case, model) if computed else None
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
    expected = outputs_of(case, updated) if computed else None
    if computed:
        assert np.max(np.abs(expected - plain)) > 0.03, "the adapter does something"
    assert cli.main(["import", source, adapter, "--out", out]) == 0
    return Imported(case, source, adapter, out, expected)


def arrays_of(out):
    """Those that were imported, by name."""
    tensors = tensor_files.open_tensors(f"{out}/checkpoint_0")
    return {
        name.removeprefix("target/"): tensor.read()
        for name, tensor in tensors.items()
        if name.startswith("target/")
    }


def our_model(case, out):
    """The model that the import's gin file describes, and its parameters.

    The patterns of the gin file choose the kernels that the adapter updates.
    """
    whole = case.root if case.tower else encoder_decoder.ImageTextModule
    module = whole.__module__.rpartition(".")[2]
    with open(f"{out}/tower.gin", "w") as file:
        file.write(
            "from __gin__ import dynamic_registration\n"
            f"from vit22b_transfer.models import {module}\n"
            f"{module}.{whole.__name__}.tower = {case.tower or '%TOWER'}\n"
        )
    recipe = loading.read([f"{out}/model.gin", f"{out}/tower.gin"], [], (ROOT, ""))
    config, module = (
        loading.install(recipe, root, (ROOT, ""))()
        for root in (lora.LoraConfig, case.root)
    )
    gin.clear_config()
    if not case.tower:
        module = image_text_model(module).module
    vocabulary = Vocabulary(2)
    model = multimodal.ImageTextModel(module, vocabulary, vocabulary, lora=config)
    params = {name: jnp.asarray(x) for name, x in arrays_of(out).items()}
    kernels = {name for name in params if name.endswith("/kernel")}
    updated = {name for name in kernels if f"{name[:-6]}lora_a" in params}
    # An image-text model does without SigLIP's pooling.
    assert {name for name in kernels if config.chooses(name)} == {
        name for name in updated if "/map/" not in name
    }
    return model, unflatten_dict(params, sep="/")


@pytest.mark.slow
@pytest.mark.parametrize("imported", COMPUTED, indirect=True)
def test_an_imported_adapter_computes_what_pefts_model_does(imported):
    model, params = our_model(imported.case, imported.out)
    assert model.lora.rank == 3 and model.lora.alpha == 5.0
    ours = whole_logits if imported.case.tower else tower_output
    actual = ours(model, params)
    name = f"{imported.case.family} with an adapter vs PEFT"
    assert_within(TOLERANCE, actual, imported.expected, name)


def exported_again(imported):
    """The directory of the adapter's export, with every name and byte of PEFT's."""
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
    return exported


OTHERS = [name for name in CASES | VARIANTS if name not in COMPUTED]


@pytest.mark.slow
@pytest.mark.parametrize("imported", OTHERS, indirect=True)
def test_an_adapter_is_imported_and_exported_with_its_names_and_bytes(imported):
    # The gin file of the import chooses just the kernels that the adapter updates.
    our_model(imported.case, imported.out)
    exported_again(imported)


@pytest.mark.slow
@pytest.mark.parametrize("imported", COMPUTED, indirect=True)
def test_peft_loads_an_exported_adapter_and_computes_the_same(imported):
    exported = exported_again(imported)
    model = peft.PeftModel.from_pretrained(drawn(imported.case.build()), exported)
    actual = outputs_of(imported.case, model.eval())
    np.testing.assert_array_equal(actual, imported.expected)


@pytest.mark.slow
@pytest.mark.parametrize("imported", COMPUTED, indirect=True)
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


PREFIX = "base_model.model."


def with_modules(imported, renamed):
    """The directory of the same adapter, its modules called otherwise."""
    folder = imported.path("renamed")
    os.mkdir(folder)
    shutil.copy(f"{imported.adapter}/adapter_config.json", folder)
    tensors = safetensors.numpy.load_file(
        f"{imported.adapter}/adapter_model.safetensors"
    )
    tensors = {
        f"{PREFIX}{renamed(name.removeprefix(PREFIX))}": tensor
        for name, tensor in tensors.items()
    }
    safetensors.numpy.save_file(tensors, f"{folder}/adapter_model.safetensors")
    return folder


def older(case):
    """A function from a module's name to the one that the case calls older."""

    def renamed(name):
        for new, old in case.older:
            name = name.replace(new, old)
        return name

    return renamed


@pytest.mark.parametrize("imported", ["ViT"], indirect=True)
def test_an_adapter_by_the_names_of_transformers_4_is_imported_alike(imported):
    out = imported.path("older_out")
    adapter = with_modules(imported, older(imported.case))
    assert cli.main(["import", imported.source, adapter, "--out", out]) == 0
    expected, actual = arrays_of(imported.out), arrays_of(out)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, name)


@pytest.mark.parametrize(
    "imported", [name for name in CASES if CASES[name].older], indirect=True
)
def test_names_of_transformers_4_and_of_models_around_a_tower_are_known(imported):
    family, renamed = imported.case.family, older(imported.case)
    modules = peft_adapters.open_adapter(imported.adapter).pairs
    assert not set(map(renamed, modules)) >= set(modules)
    for name in modules:
        plain = peft_modules.plain(renamed(name), family)
        assert plain == peft_modules.plain(name, family)


@pytest.mark.parametrize("imported", ["DINOv2 g"], indirect=True)
def test_an_update_of_what_transformers_4_fused_is_refused(imported, capsys):
    adapter = with_modules(imported, lambda n: n.replace("gate_proj", "weights_in"))
    out = imported.path("fused_out")
    assert cli.main(["import", imported.source, adapter, "--out", out]) == 1
    said = capsys.readouterr().err
    assert "encoder.layer.0.mlp.weights_in: there is no update of such a mod" in said
    assert "mlp.gate_proj" in said and "merge_and_unload" in said
