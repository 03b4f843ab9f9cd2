"""DINOv2, without and with registers, and DINOv3 in Hugging Face's safetensors."""

from collections.abc import Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.models import vit, vit_positions
from vit22b_transfer.weights.families import image_processors
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.families import towers_hugging_face as hf
from vit22b_transfer.weights.files import config_values
from vit22b_transfer.weights.mapping import Family, Model, Row, per_layer
from vit22b_transfer.weights.transforms import TRANSPOSE, split, then

Config = Mapping[str, Any]

_SIZES = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    num_channels=3,
    hidden_act="gelu",
)
DINOV2_DEFAULTS = _SIZES | dict(
    patch_size=14,
    mlp_ratio=4.0,
    layer_norm_eps=1e-6,
    qkv_bias=True,
    use_swiglu_ffn=False,
)
REGISTERS_DEFAULTS = DINOV2_DEFAULTS | dict(patch_size=16, num_register_tokens=4)
DINOV3_DEFAULTS = _SIZES | dict(
    hidden_size=384,
    num_attention_heads=6,
    intermediate_size=1536,
    patch_size=16,
    layer_norm_eps=1e-5,
    query_bias=True,
    key_bias=False,
    value_bias=True,
    proj_bias=True,
    mlp_bias=True,
    rope_theta=vit_positions.ROTARY_BASE,
    use_gated_mlp=False,
    num_register_tokens=0,
)


def _no_registers(tower: vit.ViTConfig, prefix: str) -> dict[str, str]:
    """What to leave out: without registers the class writes an empty tensor."""
    if tower.num_registers:
        return {}
    return {rf"{prefix}embeddings\.register_tokens": "empty: there are no registers"}


def _prefix_rows(tower: vit.ViTConfig, prefix: str) -> list[Row]:
    rows = [Row(f"{tr.TOWER}/cls/embedding", f"{prefix}embeddings.cls_token")]
    if tower.num_registers:
        registers = f"{tr.TOWER}/registers/embedding"
        rows.append(Row(registers, f"{prefix}embeddings.register_tokens"))
    return rows


def _block_norms(layer: str) -> list[Row]:
    return [
        *tr.norm(f"{tr.BLOCK}/norm", f"{layer}.norm1"),
        *tr.norm(f"{tr.BLOCK}/mlp_norm", f"{layer}.norm2"),
        *tr.layer_scales(
            f"{layer}.layer_scale1.lambda1", f"{layer}.layer_scale2.lambda1"
        ),
    ]


# --- DINOv2 ---


def _read_dinov2(config: Config, tensors: Config) -> Model:
    registers = config["model_type"] == "dinov2_with_registers"
    defaults = REGISTERS_DEFAULTS if registers else DINOV2_DEFAULTS
    config = hf.completed(config, config["model_type"], defaults)
    images = hf.images_of(
        config, "BitImageProcessor", image_processors.IMAGENET, enlarged=(256, 224)
    )
    hidden = int(config["hidden_size"] * config["mlp_ratio"])
    if not 1 <= hidden <= config_values.MOST:
        raise UserError(
            f"config.json says mlp_ratio = {config['mlp_ratio']}: that makes an MLP "
            f"of {hidden}; expected are 1 to {config_values.MOST}."
        )
    gated = config["use_swiglu_ffn"]
    if gated:  # two thirds of it, in whole groups of 8
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    # What the two classes' own code does.
    resampling = "bicubic_antialiased" if registers else "bicubic"
    # The gate is SwiGLU's, whatever hidden_act says.
    form = dict(activation="silu") if gated else {}
    tower = hf.tower_config(
        config,
        mlp_dim=hidden,
        gated_mlp=gated,
        qkv_bias=config["qkv_bias"],
        layer_scale=True,
        class_token=True,
        class_position=True,
        num_registers=config["num_register_tokens"] if registers else 0,
        pooling="cls",
        position_resampling=resampling,
        **form,
        **images.fields,
    )
    anchor = "embeddings.patch_embeddings.projection.weight"
    prefixes = ("", "dinov2_with_registers." if registers else "dinov2.")
    prefix = tr.find_prefix(tensors, anchor, prefixes)
    layer = f"{prefix}encoder.layer.{{i}}"
    attention = [f"{layer}.attention.attention.{x}" for x in ("query", "key", "value")]
    rows = [
        *_prefix_rows(tower, prefix),
        hf.position_row(f"{prefix}embeddings.position_embeddings", ones=1),
        *hf.patch_rows(tower, prefix + anchor.removesuffix(".weight")),
        *tr.norm(f"{tr.TOWER}/encoder_norm", f"{prefix}layernorm"),
        *per_layer(
            tower.depth,
            [
                *_block_norms(layer),
                *tr.attention(
                    tr.BLOCK, [*attention, f"{layer}.attention.output.dense"], tower
                ),
                *(
                    _swiglu_rows(layer)
                    if gated
                    else hf.mlp_rows(tr.BLOCK, f"{layer}.mlp.fc1", f"{layer}.mlp.fc2")
                ),
            ],
        ),
    ]
    mask_token = rf"{prefix}embeddings\.mask_token"
    return Model(
        tuple(rows),
        tower,
        dropped={
            mask_token: "used in pretraining only",
            hf.CLASSIFIER: "the classifier",
        }
        | _no_registers(tower, prefix),
        carried=(hf.CLASSIFIER, mask_token, *_no_registers(tower, prefix)),
        positions=(tr.POSITIONS,),
        resample=tr.resample(resampling),
        images=images.size,
        facts=images.facts,
    )


def _swiglu_rows(layer: str) -> list[Row]:
    """Rows of a gated MLP whose first matmul is one, the gate's part first."""
    mlp = f"{tr.BLOCK}/mlp"
    both, into = ("wi_0", "wi_1"), f"{layer}.mlp.weights_in"
    cut = split(2, axis=0)
    return [
        Row(
            [f"{mlp}/{x}/kernel" for x in both], f"{into}.weight", then(cut, TRANSPOSE)
        ),
        Row([f"{mlp}/{x}/bias" for x in both], f"{into}.bias", cut),
        *tr.linear(f"{mlp}/wo", f"{layer}.mlp.weights_out"),
    ]


# --- DINOv3 ---


def _read_dinov3(config: Config, tensors: Config) -> Model:
    config = hf.completed(config, "dinov3_vit", DINOV3_DEFAULTS)
    images = hf.images_of(config, "DINOv3ViTImageProcessor", image_processors.IMAGENET)
    tr.refuse(
        config,
        proj_bias=True,
        mlp_bias=True,
        rope_theta=vit_positions.ROTARY_BASE,
        value_bias=config["query_bias"],
    )
    tower = hf.tower_config(
        config,
        gated_mlp=config["use_gated_mlp"],
        qkv_bias=config["query_bias"],
        key_bias=config["key_bias"],
        layer_scale=True,
        positions="rotary",
        class_token=True,
        num_registers=config["num_register_tokens"],
        pooling="cls",
        **images.fields,
    )
    anchor = "embeddings.patch_embeddings.weight"
    prefix = tr.find_prefix(tensors, anchor, ("", "model."))
    # Where newer releases of the library keep the blocks when they write no old names.
    inner = (
        f"{prefix}model."
        if f"{prefix}model.layer.0.norm1.weight" in tensors
        else prefix
    )
    layer = f"{inner}layer.{{i}}"
    names = [f"{layer}.attention.{x}_proj" for x in ("q", "k", "v", "o")]
    mlp = f"{tr.BLOCK}/mlp"
    rows = [
        *_prefix_rows(tower, prefix),
        *hf.patch_rows(tower, prefix + anchor.removesuffix(".weight")),
        *tr.norm(f"{tr.TOWER}/encoder_norm", f"{prefix}norm"),
        *per_layer(
            tower.depth,
            [
                *_block_norms(layer),
                *tr.attention(tr.BLOCK, names, tower),
                *(
                    tr.linear(f"{mlp}/wi_0", f"{layer}.mlp.gate_proj")
                    + tr.linear(f"{mlp}/wi_1", f"{layer}.mlp.up_proj")
                    if tower.gated_mlp
                    else tr.linear(f"{mlp}/wi", f"{layer}.mlp.up_proj")
                ),
                *tr.linear(f"{mlp}/wo", f"{layer}.mlp.down_proj"),
            ],
        ),
    ]
    mask_token = rf"{prefix}embeddings\.mask_token"
    return Model(
        tuple(rows),
        tower,
        dropped={
            mask_token: "used in pretraining only",
            r".*rope_embeddings\.inv_freq": "computed, not learned",
        }
        | _no_registers(tower, prefix),
        carried=(mask_token, *_no_registers(tower, prefix)),
        images=images.size,
        facts=images.facts,
    )


FAMILIES = (
    Family(
        "hf-dinov2",
        hf.has_model_type("dinov2", "dinov2_with_registers"),
        _read_dinov2,
        tr.tower_shapes,
    ),
    Family("hf-dinov3", hf.has_model_type("dinov3_vit"), _read_dinov3, tr.tower_shapes),
)
