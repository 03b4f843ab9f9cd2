"""The smallest files of weights, in every format and of every family.

Of a family with a config, names and shapes are what its own table says for it: that
they are those of the published models is tested elsewhere.
"""

import functools
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import legacy_files
import numpy as np
from hostile_files import PROCESSOR

from vit22b_transfer.models import t5 as t5_models
from vit22b_transfer.weights import mapping
from vit22b_transfer.weights.families import t5, table
from vit22b_transfer.weights.files import tensor_writing
from vit22b_transfer.weights.files.tensor_writing import LazyTensor

_ROW = np.ones(3, np.float32)
VISION = dict(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
GEMMA = dict(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
WINDOWED = GEMMA | dict(
    query_pre_attn_scalar=4,
    sliding_window=4,
    final_logit_softcapping=3.0,
    layer_types=["sliding_attention", "full_attention"],
)
GEMMA_2 = dict(model_type="gemma2", attn_logit_softcapping=2.0)
T5 = dict(
    vocab_size=32,
    d_model=8,
    d_kv=4,
    d_ff=16,
    num_layers=2,
    num_heads=2,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
# Name of a reader -> (family, config).
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-vit": ("hf-vit", VISION | dict(model_type="vit")),
    "hf-siglip": (
        "hf-siglip",
        dict(model_type="siglip", vision_config=VISION, text_config={}),
    ),
    "hf-siglip2-naflex": (
        "hf-siglip2-naflex",
        VISION | dict(model_type="siglip2_vision_model", num_patches=4),
    ),
    "hf-clip": ("hf-clip", VISION | dict(model_type="clip_vision_model")),
    "hf-dinov2": ("hf-dinov2", VISION | dict(model_type="dinov2", mlp_ratio=2)),
    "hf-dinov2 gated": (
        "hf-dinov2",
        VISION
        | dict(model_type="dinov2_with_registers", mlp_ratio=2, use_swiglu_ffn=True)
        | dict(num_register_tokens=2),
    ),
    "hf-dinov3": (
        "hf-dinov3",
        VISION | dict(model_type="dinov3_vit", num_register_tokens=2),
    ),
    "hf-internvl-vision": (
        "hf-internvl-vision",
        VISION
        | dict(model_type="internvl_vision", image_size=[16, 16], patch_size=[8, 8]),
    ),
    "hf-internvit": (
        "hf-internvit",
        VISION | dict(model_type="intern_vit_6b", qkv_bias=True),
    ),
    "hf-t5": ("hf-t5", T5 | dict(model_type="t5")),
    "hf-mt5": (
        "hf-t5",
        T5
        | dict(model_type="mt5", num_decoder_layers=1, tokenizer_class="T5Tokenizer"),
    ),
    "hf-gemma": ("hf-gemma", GEMMA | dict(model_type="gemma", rope_theta=10_000.0)),
    "hf-gemma2": ("hf-gemma", WINDOWED | GEMMA_2 | dict(bos_token_id=2)),
    "hf-gemma3": (
        "hf-gemma",
        dict(
            model_type="gemma3",
            text_config=WINDOWED
            | dict(
                model_type="gemma3_text",
                rope_scaling=dict(rope_type="linear", factor=8.0),
                rope_local_base_freq=10_000.0,
            ),
        ),
    ),
    "hf-paligemma": (
        "hf-paligemma",
        dict(
            model_type="paligemma",
            text_config=WINDOWED | GEMMA_2,
            vision_config=VISION,
            image_token_index=31,
            projection_dim=8,
        ),
    ),
}


def arrays_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Drawn tensors."""
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def lazy(arrays: dict[str, np.ndarray]) -> list[LazyTensor]:
    return [
        LazyTensor(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()
    ]


def write_safetensors(folder: str, arrays, limit: int = 2**40) -> None:
    tensor_writing.write_safetensors(
        folder, lazy(arrays), max_shard_bytes=limit, done=lambda count: None
    )


def write_json(folder: str, name: str, value: Any) -> None:
    Path(folder, name).write_text(json.dumps(value))


# --- Formats ---

SOME = {
    "layers.0.kernel": (4, 3),
    "layers.1.kernel": (4, 3),
    "norm.scale": (3,),
    "step": (),
}


def safetensors(folder: str) -> None:
    write_safetensors(folder, arrays_of(SOME))


def shards(folder: str) -> None:
    write_safetensors(folder, arrays_of(SOME), 64)


def npz(folder: str) -> None:
    """Members that are stored, compressed, transposed, and of bfloat16."""
    arrays = arrays_of(SOME) | {
        "turned": np.asfortranarray(np.ones((3, 4), np.float32))
    }
    arrays["large"] = np.arange(6000, dtype=np.float32).reshape(60, 100)
    path = Path(folder, "x.npz")
    np.savez(path, **{n: x for n, x in arrays.items() if n != "large"})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("large.npy", "w") as file:
            np.lib.format.write_array(file, arrays["large"])


def legacy(folder: str) -> None:
    """As T5X wrote them before Orbax: a msgpack index, and zarr."""
    arrays = arrays_of({"a/kernel": (4, 3), "b/scale": (3,)})
    legacy_files.write(folder, arrays, row=_ROW)


def t5x(folder: str) -> None:
    """A T5 of T5X."""
    text = t5_models.T5Config(
        vocab_size=16,
        width=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        head_dim=4,
        mlp_dim=12,
        tied_logits=False,
    )
    shapes = t5.shapes(None, text)
    arrays = arrays_of(
        {n.replace("encoder/text/", "encoder/"): x for n, x in shapes.items()}
    )
    legacy_files.write(folder, arrays, row=_ROW)


def adapter(folder: str) -> None:
    """PEFT's, of the queries of a ViT."""
    shapes = {}
    for layer in range(2):
        module = f"base_model.model.vit.encoder.layer.{layer}.attention.attention.query"
        shapes[f"{module}.lora_A.weight"] = (2, 8)
        shapes[f"{module}.lora_B.weight"] = (8, 2)
    write_safetensors(folder, arrays_of(shapes))
    os.rename(
        os.path.join(folder, "model.safetensors"),
        os.path.join(folder, "adapter_model.safetensors"),
    )
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "x",
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "target_modules": ["query"],
    }
    write_json(folder, "adapter_config.json", config)


# --- Families ---


def of_config(family_name: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors of the model that a config describes."""
    (family,) = (each for each in table.FAMILIES if each.name == family_name)
    model = family.read(config, {})
    ours = family.shapes(model.tower, model.text)
    plan = mapping.steps(model.rows, (), ours)
    return arrays_of(mapping.expected_shapes(plan, ours))


def source(name: str, folder: str) -> None:
    """A source of the reader `name`."""
    family, config = CONFIGS[name]
    write_json(folder, "config.json", config)
    if "vision_config" in config or "patch_size" in config:
        write_json(folder, "preprocessor_config.json", PROCESSOR)
    write_safetensors(folder, of_config(family, config | {"preprocessor": PROCESSOR}))


# --- Families that are read from their tensors ---


def flax_blocks(block: str, stack: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Blocks of big_vision's encoder of width 8, or one of them, by shape."""
    mha = f"{block}/MultiHeadDotProductAttention_0"
    shapes: dict[str, tuple[int, ...]] = {
        f"{block}/MlpBlock_0/Dense_0/kernel": (8, 16),
        f"{block}/MlpBlock_0/Dense_0/bias": (16,),
        f"{block}/MlpBlock_0/Dense_1/kernel": (16, 8),
        f"{block}/MlpBlock_0/Dense_1/bias": (8,),
        f"{mha}/out/kernel": (2, 4, 8),
        f"{mha}/out/bias": (8,),
    }
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        shapes |= {f"{block}/{norm}/{x}": (8,) for x in ("scale", "bias")}
    for name in ("query", "key", "value"):
        shapes[f"{mha}/{name}/kernel"] = (8, 2, 4)
        shapes[f"{mha}/{name}/bias"] = (2, 4)
    return {name: (*stack, *shape) for name, shape in shapes.items()}


def big_vision(prefix: str = "", *, stacked: bool) -> dict[str, tuple[int, ...]]:
    """A ViT of big_vision without a head."""
    block = f"{prefix}Transformer/encoderblock"
    shapes = {
        f"{prefix}embedding/kernel": (8, 8, 3, 8),
        f"{prefix}embedding/bias": (8,),
        f"{prefix}pos_embedding": (1, 4, 8),
        f"{prefix}Transformer/encoder_norm/scale": (8,),
        f"{prefix}Transformer/encoder_norm/bias": (8,),
    }
    if stacked:
        return shapes | flax_blocks(block, (2,))
    return shapes | flax_blocks(f"{block}_0", ()) | flax_blocks(f"{block}_1", ())


def big_vision_paligemma() -> dict[str, tuple[int, ...]]:
    llm, layers = "llm", "llm/layers"
    return big_vision("img/", stacked=True) | {
        "img/head/kernel": (8, 12),
        "img/head/bias": (12,),
        f"{llm}/embedder/input_embedding": (32, 12),
        f"{llm}/final_norm/scale": (12,),
        f"{layers}/attn/q_einsum/w": (2, 2, 12, 4),
        f"{layers}/attn/kv_einsum/w": (2, 2, 1, 12, 4),
        f"{layers}/attn/attn_vec_einsum/w": (2, 2, 4, 12),
        f"{layers}/mlp/gating_einsum": (2, 2, 12, 16),
        f"{layers}/mlp/linear": (2, 16, 12),
        f"{layers}/pre_attention_norm/scale": (2, 12),
        f"{layers}/pre_ffw_norm/scale": (2, 12),
    }


def timm() -> dict[str, tuple[int, ...]]:
    shapes = {
        "cls_token": (1, 1, 8),
        "pos_embed": (1, 4, 8),
        "patch_embed.proj.weight": (8, 3, 8, 8),
        "patch_embed.proj.bias": (8,),
        "norm.weight": (8,),
    }
    for i in range(2):
        shapes |= {
            f"blocks.{i}.in_norm.weight": (8,),
            f"blocks.{i}.in_proj.weight": (16 + 24, 8),
            f"blocks.{i}.mlp_bias": (16,),
            f"blocks.{i}.q_norm.weight": (4,),
            f"blocks.{i}.k_norm.weight": (4,),
            f"blocks.{i}.attn_out_proj.weight": (8, 8),
            f"blocks.{i}.attn_out_proj.bias": (8,),
            f"blocks.{i}.mlp_out_proj.weight": (8, 16),
            f"blocks.{i}.mlp_out_proj.bias": (8,),
        }
    return shapes


def write_npz(shapes: dict[str, tuple[int, ...]], folder: str) -> None:
    np.savez(os.path.join(folder, "x.npz"), **arrays_of(shapes))


def write_timm(folder: str) -> None:
    config = dict(
        architecture="vit_base_patch16_xp_224",
        global_pool="token",
        pretrained_cfg=dict(
            mean=[0.5, 0.5, 0.5],
            std=[0.5, 0.5, 0.5],
            interpolation="bicubic",
            crop_pct=0.9,
        ),
    )
    write_json(folder, "config.json", config)
    write_safetensors(folder, arrays_of(timm()))


# Name of a reader -> what writes its files.
SOURCES: dict[str, Callable[[str], None]] = {
    name: functools.partial(source, name) for name in CONFIGS
} | {
    "big_vision-vit": functools.partial(write_npz, big_vision(stacked=False)),
    "big_vision-vit stacked": functools.partial(
        write_npz, big_vision("params/img/", stacked=True)
    ),
    "big_vision-paligemma": functools.partial(write_npz, big_vision_paligemma()),
    "timm-parallel-vit": write_timm,
}
