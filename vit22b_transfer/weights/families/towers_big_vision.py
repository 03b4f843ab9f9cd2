"""big_vision's image towers in npz: ViT, SigLIP, SigLIP 2, NaFlex.

There is no config: sizes are read from the tensors. Names may stand below `params/` and
`img/`. Blocks may be stacked (`encoderblock`). Files from before 2022 count submodules
otherwise, and give the class token a position. Without a position table the positions
are sines of 224 x 224 pixels' grid.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit22b_transfer.models import vit
from vit22b_transfer.weights.families import image_processors
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.families import towers_hugging_face as hf
from vit22b_transfer.weights.mapping import Family, Model, Row, per_layer
from vit22b_transfer.weights.transforms import (
    Transform,
    conv_kernel_hwio,
    join_heads,
    leading_ones,
    reshape,
)

Tensors = Mapping[str, Any]
_PREFIXES = ("", "params/", "img/", "params/img/")
# Of all published towers with fixed sine positions.
_SINE_IMAGE_SIZE = 224
_OTHER_PARTS = {
    r"(params/)?txt/.*": "the text tower",
    r"(params/)?[tb]": "the contrastive loss",
    r"opt/.*": "the optimizer's state",
}
_ANCHOR = "Transformer/encoder_norm/scale"


def _blocks(tensors: Tensors, encoder: str) -> tuple[str, int, bool]:
    """(name of a block with `{i}`, how many there are, whether they are stacked)."""
    name = f"{encoder}/encoderblock"
    stacked = tensors.get(f"{name}/LayerNorm_0/scale")
    if stacked is not None:
        depth, _ = tr.shape(tensors, f"{name}/LayerNorm_0/scale", 2)
        return f"{name}_{{i}}", depth, True
    pattern = re.compile(re.escape(name) + r"_(\d+)/LayerNorm_0/scale")
    depth = sum(pattern.fullmatch(x) is not None for x in tensors)
    return f"{name}_{{i}}", depth, False


def _part(tensors: Tensors, block: str, names: tuple[str, ...]) -> str:
    """The first of the names that the first block has."""
    for i in ("_0", ""):
        for name in names:
            if any(
                x.startswith(block.replace("_{i}", i) + f"/{name}/") for x in tensors
            ):
                return name
    return names[0]


def _positions(tensors: Tensors, prefix: str) -> str | None:
    for name in (
        "pos_embedding",
        "Transformer/pos_embedding",
        "Transformer/posembed_input/pos_embedding",
    ):
        if prefix + name in tensors:
            return prefix + name
    return None


def sine_positions(width: int, grid: tuple[int, int]) -> np.ndarray:
    """big_vision's `sincos2d` table [rows * columns, E], which no file holds."""
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    frequencies = 1.0 / 10_000.0 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = (at.reshape(-1, 1) * frequencies for at in (rows, columns))
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return table.astype(np.float32)


def encoder_part(
    tensors: Tensors, encoder: str, ours: str
) -> tuple[dict[str, int], list[Row]]:
    """Depth, MLP and heads of an encoder of blocks, and the rows of them and its norm.

    encoder: where it begins there, of images or of texts; ours: our scope of it.
    """
    block, depth, stacked = _blocks(tensors, encoder)
    attention = _part(
        tensors,
        block,
        ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
    )
    mlp = _part(tensors, block, ("MlpBlock_0", "MlpBlock_3"))
    second = _part(tensors, block, ("LayerNorm_1", "LayerNorm_2"))
    first = block.replace("_{i}", "" if stacked else "_0")

    def shape(name: str, axes: int) -> tuple[int, ...]:
        return tr.shape(tensors, f"{first}/{name}", axes + stacked)[int(stacked) :]

    heads = shape(f"{attention}/query/bias", 2)[0]
    layer = f"{ours}/layers_{{i}}"
    rows = [
        *_norm(f"{ours}/encoder_norm", f"{encoder}/encoder_norm"),
        *per_layer(
            depth,
            [
                *_norm(f"{layer}/norm", f"{block}/LayerNorm_0"),
                *_norm(f"{layer}/mlp_norm", f"{block}/{second}"),
                *_attention(heads, layer, f"{block}/{attention}"),
                *_mlp(layer, f"{block}/{mlp}"),
            ],
        ),
    ]
    mlp_dim = shape(f"{mlp}/Dense_0/bias", 1)[0]
    return dict(depth=depth, mlp_dim=mlp_dim, num_heads=heads), rows


def read(config: Mapping[str, Any], tensors: Tensors) -> Model:
    """The image tower of a file, sizes from its tensors."""
    del config
    tr.need_tensors(tensors, "big_vision's towers")
    prefix = tr.find_prefix(tensors, _ANCHOR, _PREFIXES)
    sizes, blocks = encoder_part(tensors, f"{prefix}Transformer", tr.TOWER)
    kernel = f"{prefix}embedding/kernel"
    naflex = kernel in tensors and len(tensors[kernel].shape) == 2
    kernel = tr.shape(tensors, kernel, 2 if naflex else 4)
    patch_size = tr.square(kernel[0] // 3, "embedding/kernel") if naflex else kernel[0]
    has_cls, positions = f"{prefix}cls" in tensors, _positions(tensors, prefix)
    if positions is None:
        count, class_position = (_SINE_IMAGE_SIZE // patch_size) ** 2, False
    else:
        table = tr.shape(tensors, positions, 3)
        count = table[0] * table[1] if naflex else table[1]
        class_position = has_cls and math.isqrt(count) ** 2 == count - 1
    side = tr.square(count - class_position, f"{positions}")
    head = next((x for x in ("MAPHead_0/", "") if f"{prefix}{x}probe" in tensors), None)
    resampling = "bilinear_antialiased" if naflex else "bilinear_corners"
    tower = vit.ViTConfig(
        width=kernel[-1],
        **sizes,
        patch_size=patch_size,
        image_size=(side * patch_size, side * patch_size),
        class_token=has_cls,
        class_position=class_position,
        pooling="cls" if has_cls else "gap" if head is None else "map",
        position_resampling=resampling,
        **tr.SEQUENTIAL,
        **image_processors.squashed(image_processors.HALF),
    )
    rows = [
        Row(
            f"{tr.TOWER}/patch_embedding/kernel",
            f"{prefix}embedding/kernel",
            reshape(kernel, kernel) if naflex else conv_kernel_hwio(patch_size),
        ),
        Row(f"{tr.TOWER}/patch_embedding/bias", f"{prefix}embedding/bias"),
        *_position_rows(tower, positions, naflex),
        *blocks,
    ]
    if has_cls:
        rows.append(Row(f"{tr.TOWER}/cls/embedding", f"{prefix}cls"))
    if head is not None:
        rows += _map(tower, prefix + head)
    classifier = rf"{prefix}(head|pre_logits)/.*"
    return Model(
        tuple(rows),
        tower,
        dropped=_OTHER_PARTS | {classifier: "the classifier"},
        carried=(classifier,),
        positions=(tr.POSITIONS,),
        resample=tr.resample(resampling),
        facts=("images are taken to be prepared as SigLIP's and PaliGemma's were",),
    )


def _position_rows(tower: vit.ViTConfig, theirs: str | None, naflex: bool) -> list[Row]:
    if theirs is None:
        table = sine_positions(tower.width, tower.grid_of(*tower.image_size))
        return [Row(tr.POSITIONS, (), Transform(lambda _: (table,), lambda _: ()))]
    if tower.class_position:
        return [hf.position_row(theirs, ones=1)]
    if naflex:
        side = tower.image_size[0] // tower.patch_size
        square = reshape((side * side, -1), (side, side, tower.width))
        return [Row(tr.POSITIONS, theirs, square)]
    return [Row(tr.POSITIONS, theirs, leading_ones(0, 1))]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/{x}", f"{theirs}/{x}") for x in ("scale", "bias")]


def _attention(num_heads: int, ours: str, theirs: str) -> list[Row]:
    inward, outward = (join_heads(num_heads, axis=axis) for axis in (1, 0))
    rows = []
    for name in ("query", "key", "value"):
        at = f"{ours}/attention/{name}"
        rows.append(Row(f"{at}/kernel", f"{theirs}/{name}/kernel", inward))
        rows.append(Row(f"{at}/bias", f"{theirs}/{name}/bias", outward))
    at = f"{ours}/attention/out"
    rows.append(Row(f"{at}/kernel", f"{theirs}/out/kernel", outward))
    return [*rows, Row(f"{at}/bias", f"{theirs}/out/bias")]


def _mlp(ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{ours}/mlp/{x}/{part}", f"{theirs}/{their}/{part}")
        for x, their in (("wi", "Dense_0"), ("wo", "Dense_1"))
        for part in ("kernel", "bias")
    ]


def _map(tower: vit.ViTConfig, theirs: str) -> list[Row]:
    ours = f"{tr.TOWER}/map"
    return [
        Row(f"{ours}/probe/embedding", f"{theirs}probe"),
        *_attention(tower.num_heads, ours, f"{theirs}MultiHeadDotProductAttention_0"),
        *_norm(f"{ours}/norm", f"{theirs}LayerNorm_0"),
        *_mlp(ours, f"{theirs}MlpBlock_0"),
    ]


FAMILIES = (
    Family(
        "big_vision-vit",
        lambda config, tensors: (
            any(f"{x}{_ANCHOR}" in tensors for x in _PREFIXES)
            and not any("llm/" in name for name in tensors)
        ),
        read,
        tr.tower_shapes,
        file_format="npz",
    ),
)
