"""InternViT, the public tower nearest to ViT-22B, in both of its layouts.

Hugging Face's own class (`internvl_vision`) keeps query, key and value apart; the
published InternViT-6B (`intern_vit_6b`, code beside the weights) fuses them.
"""

from collections.abc import Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.models import vit
from vit22b_transfer.weights.families import image_processors
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.families import towers_hugging_face as hf
from vit22b_transfer.weights.mapping import Family, Model, Row, per_layer
from vit22b_transfer.weights.transforms import TRANSPOSE, split, then

Config = Mapping[str, Any]

HF_DEFAULTS = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    attention_bias=False,
    use_qk_norm=False,
    intermediate_size=4096,
    hidden_act="gelu",
    norm_type="layer_norm",
    layer_norm_eps=1e-6,
    image_size=(448, 448),
    patch_size=(14, 14),
    num_channels=3,
    use_absolute_position_embeddings=True,
    use_mean_pooling=True,
)
PUBLISHED_DEFAULTS = dict(
    hidden_size=3200,
    num_hidden_layers=48,
    num_attention_heads=25,
    qkv_bias=False,
    qk_normalization=True,
    intermediate_size=12800,
    hidden_act="gelu",
    norm_type="rms_norm",
    layer_norm_eps=1e-6,
    image_size=224,
    patch_size=14,
    num_channels=3,
)
_MASK_TOKEN = r".*embeddings\.mask_token"
_OTHER_PARTS = {
    r"(model\.)?language_model\..*": "the text model",
    r"(model\.)?multi_modal_projector\..*": "the projection to the text model",
    r"mlp1\..*": "the projection to the text model",
    r"lm_head\.weight": "the text model",
    _MASK_TOKEN: "used in pretraining only",
}
_NORMS = {
    "rms_norm": dict(norm_centering=False, norm_bias=False),
    "layer_norm": dict(norm_centering=True, norm_bias=True),
}


def _tower(config: Config, *, qk_norm: bool, **fields: Any) -> vit.ViTConfig:
    form = tr.choose(config, "norm_type", _NORMS)
    if qk_norm and form["norm_centering"]:
        raise UserError(
            "config.json asks for RMS-normalised queries and keys in a tower of "
            "LayerNorms; here both are of one kind."
        )
    return hf.tower_config(
        config,
        qk_norm=qk_norm,
        qk_norm_per_head=False,
        layer_scale=True,
        class_token=True,
        class_position=True,
        pooling="cls",
        position_resampling="bicubic",
        **fields,
        **form,
        **_images(config).fields,
    )


def _images(config: Config) -> image_processors.Images:
    """Of one tile; the whole models also show a large image as several tiles."""
    return hf.images_of(config, "GotOcr2ImageProcessor", image_processors.IMAGENET)


def _model(config: Config, tower: vit.ViTConfig, rows: list[Row]) -> Model:
    return Model(
        tuple(rows),
        tower,
        dropped=_OTHER_PARTS,
        carried=(_MASK_TOKEN,),
        positions=(tr.POSITIONS,),
        resample=tr.resample("bicubic"),
        images=_images(config).size,
        facts=_images(config).facts,
    )


def _qk_norms(tower: vit.ViTConfig, attention: str) -> list[Row]:
    if not tower.qk_norm:
        return []
    ours = f"{tr.BLOCK}/attention"
    return [
        Row(f"{ours}/query_norm/scale", f"{attention}.q_norm.weight"),
        Row(f"{ours}/key_norm/scale", f"{attention}.k_norm.weight"),
    ]


def _read_hugging_face(config: Config, tensors: Config) -> Model:
    config = hf.completed(config, "internvl_vision", HF_DEFAULTS)
    tr.refuse(config, use_absolute_position_embeddings=True)
    if config["use_qk_norm"]:
        tr.refuse(config, layer_norm_eps=1e-6)
    if not config["use_mean_pooling"]:
        tr.refuse(config, norm_type="layer_norm")
    tower = _tower(
        config,
        qk_norm=config["use_qk_norm"],
        qkv_bias=config["attention_bias"],
        final_norm="none" if config["use_mean_pooling"] else "all",
    )
    anchor = "embeddings.patch_embeddings.projection.weight"
    prefix = tr.find_prefix(
        tensors, anchor, ("", "vision_tower.", "model.vision_tower.")
    )
    layer, bias = f"{prefix}encoder.layer.{{i}}", tower.norm_bias
    names = [f"{layer}.attention.{x}_proj" for x in ("q", "k", "v")]
    rows = [
        Row(f"{tr.TOWER}/cls/embedding", f"{prefix}embeddings.cls_token"),
        hf.position_row(f"{prefix}embeddings.position_embeddings", ones=1),
        *hf.patch_rows(tower, prefix + anchor.removesuffix(".weight")),
        *per_layer(
            tower.depth,
            [
                *tr.norm(f"{tr.BLOCK}/norm", f"{layer}.layernorm_before", bias=bias),
                *tr.norm(f"{tr.BLOCK}/mlp_norm", f"{layer}.layernorm_after", bias=bias),
                *tr.layer_scales(f"{layer}.lambda_1", f"{layer}.lambda_2"),
                *tr.attention(
                    tr.BLOCK, [*names, f"{layer}.attention.projection_layer"], tower
                ),
                *_qk_norms(tower, f"{layer}.attention"),
                *hf.mlp_rows(tr.BLOCK, f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
            ],
        ),
    ]
    if tower.final_norm == "all":
        rows += tr.norm(f"{tr.TOWER}/encoder_norm", f"{prefix}layernorm")
    return _model(config, tower, rows)


def _read_published(config: Config, tensors: Config) -> Model:
    config = hf.completed(config, "intern_vit_6b", PUBLISHED_DEFAULTS)
    tower = _tower(
        config,
        qk_norm=config["qk_normalization"],
        qkv_bias=config["qkv_bias"],
        final_norm="none",
    )
    anchor = "embeddings.patch_embedding.weight"
    prefix = tr.find_prefix(tensors, anchor, ("", "vision_model."))
    layer, bias = f"{prefix}encoder.layers.{{i}}", tower.norm_bias
    fused = [f"{tr.BLOCK}/attention/{x}" for x in ("query", "key", "value")]
    qkv, cut = f"{layer}.attn.qkv", split(3, axis=0)
    rows = [
        Row(f"{tr.TOWER}/cls/embedding", f"{prefix}embeddings.class_embedding"),
        hf.position_row(f"{prefix}embeddings.position_embedding", ones=1),
        *hf.patch_rows(tower, prefix + anchor.removesuffix(".weight")),
        *per_layer(
            tower.depth,
            [
                *tr.norm(f"{tr.BLOCK}/norm", f"{layer}.norm1", bias=bias),
                *tr.norm(f"{tr.BLOCK}/mlp_norm", f"{layer}.norm2", bias=bias),
                *tr.layer_scales(f"{layer}.ls1", f"{layer}.ls2"),
                Row(
                    [f"{x}/kernel" for x in fused],
                    f"{qkv}.weight",
                    then(cut, TRANSPOSE),
                ),
                *[Row([f"{x}/bias" for x in fused], f"{qkv}.bias", cut)]
                * tower.qkv_bias,
                *tr.linear(f"{tr.BLOCK}/attention/out", f"{layer}.attn.proj"),
                *_qk_norms(tower, f"{layer}.attn"),
                *hf.mlp_rows(tr.BLOCK, f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
            ],
        ),
    ]
    return _model(config, tower, rows)


FAMILIES = (
    Family(
        "hf-internvl-vision",
        hf.has_model_type("internvl", "internvl_vision"),
        _read_hugging_face,
        tr.tower_shapes,
    ),
    Family(
        "hf-internvit",
        hf.has_model_type("intern_vit_6b", "internvl_chat"),
        _read_published,
        tr.tower_shapes,
    ),
)
