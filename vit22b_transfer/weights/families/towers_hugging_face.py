"""Image towers in Hugging Face's safetensors: ViT, SigLIP, SigLIP 2 (NaFlex), CLIP.

The fixed-resolution SigLIP 2 has SigLIP's layout and class there. Names may have the
prefix of a whole model, whose other parts are left out. What a config.json leaves
unsaid is the default of its class.
"""

from collections.abc import Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.models import vit, vit_blocks
from vit22b_transfer.weights.families import config_fields, image_processors
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.files import config_values
from vit22b_transfer.weights.mapping import Family, Model, Row, per_layer
from vit22b_transfer.weights.transforms import (
    TRANSPOSE,
    conv_kernel_oihw,
    leading_ones,
    split,
    then,
)

Config = Mapping[str, Any]

ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
_SIZES = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    image_size=224,
    patch_size=16,
    num_channels=3,
)
VIT_DEFAULTS = _SIZES | dict(hidden_act="gelu", layer_norm_eps=1e-12, qkv_bias=True)
SIGLIP_DEFAULTS = _SIZES | dict(
    hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=True
)
NAFLEX_DEFAULTS = {
    name: value for name, value in SIGLIP_DEFAULTS.items() if name != "image_size"
} | dict(num_patches=256)
CLIP_DEFAULTS = _SIZES | dict(
    patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5
)

CLASSIFIER = r"classifier\..*"
_PROJECTION = r"visual_projection\.weight"
_OTHER_PARTS = {
    CLASSIFIER: "the classifier",
    _PROJECTION: "the projection to the contrastive space",
    r"text_model\..*": "the text tower",
    r"text_projection\..*": "the text tower",
    r"logit_(scale|bias)": "the contrastive loss",
    r".*\bposition_ids": "a buffer: 0, 1, 2, ...",
}


def completed(config: Config, kind: str, defaults: Config) -> dict[str, Any]:
    """The image tower's part of a config, what it leaves unsaid from the defaults.

    What has a default is of its type; `image_size` and `patch_size` are pairs.

    Raises:
      UserError: for a field that the class `kind` of `config_fields.TOWERS` has not.
    """
    part = config
    if "vision_config" in config:
        part = config_values.part(config, "vision_config")
        config_fields.check_whole(config)
    config_fields.check_tower(part, kind, defaults)
    said = {name: value for name, value in part.items() if value is not None}
    processor = config_values.part(config, "preprocessor")
    return said | config_values.like(said, defaults) | {"preprocessor": processor}


def tower_config(config: Config, **fields: Any) -> vit.ViTConfig:
    """The tower that a completed config describes; `fields` are the family's own."""
    tr.refuse(config, num_channels=3)
    patch_size = side_of_patches(config)
    usual: dict[str, Any] = tr.SEQUENTIAL | dict(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config.get("intermediate_size"),
        patch_size=patch_size,
        image_size=tr.whole_patches(config["image_size"], patch_size),
        norm_epsilon=config["layer_norm_eps"],
    )
    if "activation" not in fields:
        usual["activation"] = tr.choose(config, "hidden_act", ACTIVATIONS)
    return vit.ViTConfig(**(usual | fields))


def side_of_patches(config: Config) -> int:
    """The side of the square patches of a completed config."""
    height, width = config["patch_size"]
    if height != width:
        raise UserError(f"patches of {height}x{width}; they must be square.")
    return height


def images_of(
    config: Config, usual: str, pixels: tuple, enlarged: tuple[int, int] = (1, 1)
) -> image_processors.Images:
    """`image_processors.of_hugging_face` of a completed config."""
    size, patch = config["image_size"], side_of_patches(config)
    return image_processors.of_hugging_face(
        config, usual, pixels, size, patch, enlarged
    )


def patch_rows(tower: vit.ViTConfig, theirs: str) -> list[Row]:
    """Rows of a patch embedding that is a convolution there."""
    ours = f"{tr.TOWER}/patch_embedding"
    kernel = conv_kernel_oihw(tower.patch_size)
    rows = [Row(f"{ours}/kernel", f"{theirs}.weight", kernel)]
    return rows + [Row(f"{ours}/bias", f"{theirs}.bias")] * tower.patch_bias


def position_row(theirs: str, *, ones: int) -> Row:
    """Row of one table of positions, the class token's first.

    ones: how many leading axes of size one it has there.
    """
    both = (f"{tr.TOWER}/cls_position/embedding", tr.POSITIONS)
    return Row(both, theirs, then(leading_ones(0, ones), split((1, -1), axis=0)))


def mlp_rows(block: str, first: str, second: str) -> list[Row]:
    """Rows of an MLP without gate."""
    return tr.linear(f"{block}/mlp/wi", first) + tr.linear(f"{block}/mlp/wo", second)


def has_model_type(*model_types: str):
    """`Family.recognises` by the config's `model_type`."""
    return lambda config, tensors: config.get("model_type") in model_types


# --- ViT ---


def _read_vit(config: Config, tensors: Config) -> Model:
    config = completed(config, "vit", VIT_DEFAULTS)
    images = images_of(config, "ViTImageProcessor", image_processors.HALF)
    anchor = "embeddings.patch_embeddings.projection.weight"
    prefix = tr.find_prefix(tensors, anchor, ("", "vit."))
    tower = tower_config(
        config,
        qkv_bias=config["qkv_bias"],
        class_token=True,
        class_position=True,
        pooling="cls",
        position_resampling="bicubic",
        **images.fields,
    )
    layer = f"{prefix}encoder.layer.{{i}}"
    attention = [f"{layer}.attention.attention.{x}" for x in ("query", "key", "value")]
    rows = [
        Row(f"{tr.TOWER}/cls/embedding", f"{prefix}embeddings.cls_token"),
        position_row(f"{prefix}embeddings.position_embeddings", ones=1),
        *patch_rows(tower, prefix + anchor.removesuffix(".weight")),
        *tr.norm(f"{tr.TOWER}/encoder_norm", f"{prefix}layernorm"),
        *per_layer(
            tower.depth,
            [
                *tr.norm(f"{tr.BLOCK}/norm", f"{layer}.layernorm_before"),
                *tr.norm(f"{tr.BLOCK}/mlp_norm", f"{layer}.layernorm_after"),
                *tr.attention(
                    tr.BLOCK, [*attention, f"{layer}.attention.output.dense"], tower
                ),
                *mlp_rows(
                    tr.BLOCK, f"{layer}.intermediate.dense", f"{layer}.output.dense"
                ),
            ],
        ),
    ]
    head, mask_token = rf"{prefix}pooler\..*", rf"{prefix}embeddings\.mask_token"
    return Model(
        tuple(rows),
        tower,
        dropped={
            CLASSIFIER: "the classifier",
            head: "a classifier's layer after the class token",
            mask_token: "used in pretraining only",
        },
        carried=(CLASSIFIER, head, mask_token),
        positions=(tr.POSITIONS,),
        resample=tr.resample("bicubic"),
        images=images.size,
        facts=images.facts,
    )


# --- SigLIP, SigLIP 2, CLIP: one layout of blocks ---


def encoder_rows(
    tower: vit_blocks.BlockConfig, prefix: str, block: str = tr.BLOCK
) -> list[Row]:
    """Rows of the blocks of SigLIP's and CLIP's towers, of images and of texts."""
    layer = f"{prefix}encoder.layers.{{i}}"
    names = [f"{layer}.self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
    return per_layer(
        tower.depth,
        [
            *tr.norm(f"{block}/norm", f"{layer}.layer_norm1"),
            *tr.norm(f"{block}/mlp_norm", f"{layer}.layer_norm2"),
            *tr.attention(block, names, tower),
            *mlp_rows(block, f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
        ],
    )


def map_rows(theirs: str) -> list[Row]:
    """Rows of SigLIP's pooling; its attention is torch's own, with q, k, v fused."""
    ours = f"{tr.TOWER}/map"
    projections = [f"{ours}/attention/{x}" for x in ("query", "key", "value")]
    return [
        Row(f"{ours}/probe/embedding", f"{theirs}.probe"),
        Row(
            [f"{x}/kernel" for x in projections],
            f"{theirs}.attention.in_proj_weight",
            then(split(3, axis=0), TRANSPOSE),
        ),
        Row(
            [f"{x}/bias" for x in projections],
            f"{theirs}.attention.in_proj_bias",
            split(3, axis=0),
        ),
        *tr.linear(f"{ours}/attention/out", f"{theirs}.attention.out_proj"),
        *tr.norm(f"{ours}/norm", f"{theirs}.layernorm"),
        *mlp_rows(ours, f"{theirs}.mlp.fc1", f"{theirs}.mlp.fc2"),
    ]


def siglip_rows(tower: vit.ViTConfig, prefix: str) -> list[Row]:
    """Rows of SigLIP's tower; PaliGemma's has the same."""
    return [
        Row(tr.POSITIONS, f"{prefix}embeddings.position_embedding.weight"),
        *patch_rows(tower, f"{prefix}embeddings.patch_embedding"),
        *encoder_rows(tower, prefix),
        *tr.norm(f"{tr.TOWER}/encoder_norm", f"{prefix}post_layernorm"),
        *(map_rows(f"{prefix}head") if tower.pooling == "map" else []),
    ]


def siglip_tower(config: Config) -> tuple[vit.ViTConfig, image_processors.Images]:
    """The tower of a SigLIP vision config, or of a config that holds one."""
    config = completed(config, "siglip_vision_model", SIGLIP_DEFAULTS)
    images = images_of(config, "SiglipImageProcessor", image_processors.HALF)
    tower = tower_config(
        config,
        pooling="map" if config["vision_use_head"] else "none",
        position_resampling="bicubic",
        **images.fields,
    )
    return tower, images


def read_siglip(config: Config, tensors: Config) -> Model:
    """The image tower of a SigLIP, or of a SigLIP 2 of one resolution."""
    tower, images = siglip_tower(config)
    anchor = "embeddings.patch_embedding.weight"
    prefix = tr.find_prefix(tensors, anchor, ("", "vision_model."))
    return Model(
        tuple(siglip_rows(tower, prefix)),
        tower,
        dropped=_OTHER_PARTS,
        carried=(CLASSIFIER,),
        positions=(tr.POSITIONS,),
        resample=tr.resample("bicubic"),
        images=images.size,
        facts=images.facts,
    )


def read_naflex(config: Config, tensors: Config) -> Model:
    """The image tower of a SigLIP 2 of any resolution (NaFlex)."""
    config = completed(config, "siglip2_vision_model", NAFLEX_DEFAULTS)
    side = tr.square(config["num_patches"], "config.json") * side_of_patches(config)
    config |= {"image_size": (side, side)}
    images = _naflex_images(config)
    tower = tower_config(
        config,
        pooling="map" if config["vision_use_head"] else "none",
        position_resampling="bilinear_antialiased",
        **images.fields,
    )
    anchor = "embeddings.patch_embedding.weight"
    prefix = tr.find_prefix(tensors, anchor, ("", "vision_model."))
    patches = f"{tr.TOWER}/patch_embedding"
    rows = [
        Row(tr.POSITIONS, f"{prefix}embeddings.position_embedding.weight"),
        *tr.linear(patches, f"{prefix}embeddings.patch_embedding"),
        *encoder_rows(tower, prefix),
        *tr.norm(f"{tr.TOWER}/encoder_norm", f"{prefix}post_layernorm"),
        *(map_rows(f"{prefix}head") if tower.pooling == "map" else []),
    ]
    return Model(
        tuple(rows),
        tower,
        dropped=_OTHER_PARTS,
        carried=(CLASSIFIER,),
        positions=(tr.POSITIONS,),
        resample=tr.resample("bilinear_antialiased"),
        images=images.size,
        facts=(
            "its images keep their shape, in multiples of the patch size within a "
            "number of patches; here probes take them so, with "
            "gin_configs/runs/probe_own_shapes.gin; else all images of a run have one "
            "size, any that patches tile, and are squashed to it",
            *images.facts,
        ),
    )


def _naflex_images(config: Config) -> image_processors.Images:
    """Images of the tower's own size; its processor counts patches."""
    said = dict(config_values.part(config, "preprocessor"))
    patch = config_values.size(said, "patch_size", side_of_patches(config))
    tr.refuse({"patch_size": patch}, patch_size=side_of_patches(config))
    config_values.size(said, "max_num_patches", 1)
    counted = ("patch_size", "max_num_patches")
    said = {name: value for name, value in said.items() if name not in counted}
    if said:
        said["size"] = list(config["image_size"])
    whole = {**config, "preprocessor": said}
    return images_of(whole, "Siglip2ImageProcessor", image_processors.HALF)


def read_clip(config: Config, tensors: Config) -> Model:
    """The image tower of a CLIP."""
    config = completed(config, "clip_vision_model", CLIP_DEFAULTS)
    images = images_of(config, "CLIPImageProcessor", image_processors.CLIP)
    anchor = "embeddings.patch_embedding.weight"
    prefix = tr.find_prefix(tensors, anchor, ("", "vision_model."))
    tower = tower_config(
        config,
        patch_bias=False,
        class_token=True,
        class_position=True,
        stem_norm=True,
        final_norm="pooled",
        pooling="cls",
        position_resampling="bicubic",
        **images.fields,
    )
    rows = [
        Row(
            f"{tr.TOWER}/cls/embedding",
            f"{prefix}embeddings.class_embedding",
            leading_ones(2, 0),
        ),
        position_row(f"{prefix}embeddings.position_embedding.weight", ones=0),
        *patch_rows(tower, f"{prefix}embeddings.patch_embedding"),
        *tr.norm(f"{tr.TOWER}/stem_norm", f"{prefix}pre_layrnorm"),
        *encoder_rows(tower, prefix),
        *tr.norm(f"{tr.TOWER}/encoder_norm", f"{prefix}post_layernorm"),
    ]
    return Model(
        tuple(rows),
        tower,
        dropped=_OTHER_PARTS,
        carried=(CLASSIFIER, _PROJECTION),
        positions=(tr.POSITIONS,),
        resample=tr.resample("bicubic"),
        images=images.size,
        facts=images.facts,
    )


FAMILIES = (
    Family("hf-vit", has_model_type("vit"), _read_vit, tr.tower_shapes),
    Family(
        "hf-siglip",
        has_model_type("siglip", "siglip_vision_model"),
        read_siglip,
        tr.tower_shapes,
    ),
    Family(
        "hf-siglip2-naflex",
        has_model_type("siglip2", "siglip2_vision_model"),
        read_naflex,
        tr.tower_shapes,
    ),
    Family(
        "hf-clip",
        has_model_type("clip", "clip_vision_model"),
        read_clip,
        tr.tower_shapes,
    ),
)
