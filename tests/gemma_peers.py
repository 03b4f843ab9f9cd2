"""Tiny random Gemmas and PaliGemmas of Hugging Face, and their way to us and back.

The files are imported and exported by the command, and `model.gin` builds our network.
"""

import dataclasses

import gin
import jax
import jax.numpy as jnp
import numpy as np
from torch_peers import import_peer, torch

from vit22b_transfer import cli
from vit22b_transfer.checkpoints import restoring
from vit22b_transfer.models import prefix_lm
from vit22b_transfer.recipes import loading
from vit22b_transfer.weights.files import tensor_files

transformers = import_peer("transformers")

TOLERANCE = 1e-4
VOCAB, BOS, SEPARATOR, EOS = 128, 2, 108, 1
IMAGE = VOCAB - 1
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

    theirs: "torch.nn.Module"
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
    recipe = loading.read([f"{out}/model.gin"], tower, ("",))
    module = loading.install(recipe, prefix_lm.PrefixLMModule, ("",))()
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
    return restoring.restore_params(out, abstract, shardings)


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
