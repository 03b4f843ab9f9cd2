"""timm's towers of parallel blocks (`vit_base_patch16_xp_224` and the like).

Their block is ViT-22B's with one input matmul, in the order MLP, query, key, value. A
config.json of timm names an architecture; sizes are read from the tensors.
"""

from collections.abc import Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.models import vit
from vit22b_transfer.weights.families import config_fields, image_processors
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.families import towers_hugging_face as hf
from vit22b_transfer.weights.files import config_values
from vit22b_transfer.weights.mapping import Family, Model, Row, per_layer
from vit22b_transfer.weights.transforms import TRANSPOSE, leading_ones, split, then

Config = Mapping[str, Any]


def _tower(
    config: Config, tensors: Config
) -> tuple[vit.ViTConfig, image_processors.Images]:
    tr.need_tensors(tensors, "timm's towers")
    width, _, patch_size, _ = tr.shape(tensors, "patch_embed.proj.weight", 4)
    if "blocks.0.q_norm.weight" not in tensors:
        raise UserError(
            "blocks.0.q_norm.weight is missing; without it the tensors do not say how "
            "many heads there are, so only towers with QK-norm can be imported."
        )
    (head_dim,) = tr.shape(tensors, "blocks.0.q_norm.weight", 1)
    side = tr.square(tr.shape(tensors, "pos_embed", 3)[1], "pos_embed")
    pooled = config.get("global_pool", "token")
    config_fields.check_timm(config)
    processor = config_values.part(config, "pretrained_cfg")
    images = image_processors.of_timm(processor, side * patch_size, patch_size)
    tower = vit.ViTConfig(
        width=width,
        depth=sum(name.endswith(".in_proj.weight") for name in tensors),
        mlp_dim=_mlp_dim(tensors, width),
        num_heads=width // head_dim,
        patch_size=patch_size,
        image_size=(side * patch_size, side * patch_size),
        activation="gelu_erf",
        patch_bias="patch_embed.proj.bias" in tensors,
        class_token="cls_token" in tensors,
        stem_norm="norm_pre.weight" in tensors,
        final_norm="pooled" if "fc_norm.weight" in tensors else "all",
        pooling=tr.choose(
            {"global_pool": pooled},
            "global_pool",
            {"token": "cls", "avg": "gap", "": "none"},
        ),
        position_resampling="bicubic_antialiased",
        **images.fields,
    )
    return tower, images


def _mlp_dim(tensors: Config, width: int) -> int:
    rows = tr.shape(tensors, "blocks.0.in_proj.weight", 2)[0]
    if rows <= 3 * width:
        raise UserError(
            f"blocks.0.in_proj.weight has {rows} rows; expected are more than 3 times "
            f"the width of {width}: query, key, value and the MLP."
        )
    return rows - 3 * width


def _read(config: Config, tensors: Config) -> Model:
    tower, images = _tower(config, tensors)
    width, layer = tower.width, "blocks.{i}"
    parts = [f"{tr.BLOCK}/mlp/wi/kernel"]
    parts += [f"{tr.BLOCK}/attention/{x}/kernel" for x in ("query", "key", "value")]
    cut = split((tower.mlp_dim, width, width, -1), axis=0)
    rows = [
        Row(tr.POSITIONS, "pos_embed", leading_ones(0, 1)),
        *hf.patch_rows(tower, "patch_embed.proj"),
        *per_layer(
            tower.depth,
            [
                *tr.norm(f"{tr.BLOCK}/norm", f"{layer}.in_norm", bias=False),
                Row(parts, f"{layer}.in_proj.weight", then(cut, TRANSPOSE)),
                Row(f"{tr.BLOCK}/mlp/wi/bias", f"{layer}.mlp_bias"),
                Row(f"{tr.BLOCK}/attention/query_norm/scale", f"{layer}.q_norm.weight"),
                Row(f"{tr.BLOCK}/attention/key_norm/scale", f"{layer}.k_norm.weight"),
                *tr.linear(f"{tr.BLOCK}/attention/out", f"{layer}.attn_out_proj"),
                *tr.linear(f"{tr.BLOCK}/mlp/wo", f"{layer}.mlp_out_proj"),
            ],
        ),
    ]
    final = "norm" if tower.final_norm == "all" else "fc_norm"
    rows += tr.norm(f"{tr.TOWER}/encoder_norm", final, bias=False)
    if tower.has_class_token:
        rows.append(Row(f"{tr.TOWER}/cls/embedding", "cls_token"))
    if tower.stem_norm:
        rows += tr.norm(f"{tr.TOWER}/stem_norm", "norm_pre", bias=False)
    return Model(
        tuple(rows),
        tower,
        dropped={r"head\..*": "the classifier"},
        carried=(r"head\..*",),
        positions=(tr.POSITIONS,),
        resample=tr.resample("bicubic_antialiased"),
        images=images.size,
    )


FAMILIES = (
    Family(
        "timm-parallel-vit",
        lambda config, tensors: "blocks.0.in_proj.weight" in tensors,
        _read,
        tr.tower_shapes,
    ),
)
