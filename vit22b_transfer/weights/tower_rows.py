"""What the tables of image towers share: names, rows of usual layers, readings."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit22b_transfer.models import vit, vit_positions
from vit22b_transfer.weights.mapping import TRANSPOSE, Row, Shape

TOWER = "encoder/tower"
BLOCK = f"{TOWER}/layers_{{i}}"
POSITIONS = f"{TOWER}/position_embedding/embedding"

IMAGENET = dict(pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225))
CLIP_PIXELS = dict(
    pixel_mean=(0.48145466, 0.4578275, 0.40821073),
    pixel_std=(0.26862954, 0.26130258, 0.27577711),
)
HALF = dict(pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5))
# What every public tower but ViT-22B's relatives has.
SEQUENTIAL = dict(
    parallel=False, qk_norm=False, qkv_bias=True, norm_centering=True, norm_bias=True
)


def tower_shapes(tower: vit.ViTConfig, text: Any = None) -> dict[str, Shape]:
    """Names and shapes of a tower's parameters, unrolled; nothing is allocated."""
    del text
    module = vit.VisionTower(dataclasses.replace(tower, scan_layers=True))
    images = jax.ShapeDtypeStruct((1, *tower.image_size, 3), jnp.uint8)
    tree = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    shapes: dict[str, Shape] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        first, *rest = (part.key for part in path)
        if first != "layers":
            shapes["/".join([TOWER, first, *rest])] = leaf.shape
            continue
        for i in range(tower.depth):
            shapes["/".join([TOWER, f"layers_{i}", *rest])] = leaf.shape[1:]
    return shapes


def resample(resampling: vit_positions.Resampling):
    """`Model.resample` by that method."""
    return functools.partial(_resample, resampling)


def _resample(resampling, table, old_grid, new_grid) -> np.ndarray:
    new = vit_positions.resample_position_embeddings(
        jnp.asarray(table, jnp.float32), old_grid, new_grid, resampling
    )
    return np.asarray(new).astype(table.dtype)


def linear(ours: str, theirs: str, *, bias: bool = True) -> list[Row]:
    """Rows of a torch Linear."""
    rows = [Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE)]
    return rows + [Row(f"{ours}/bias", f"{theirs}.bias")] * bias


def norm(ours: str, theirs: str, *, bias: bool = True) -> list[Row]:
    """Rows of a torch LayerNorm, or RMSNorm without bias."""
    rows = [Row(f"{ours}/scale", f"{theirs}.weight")]
    return rows + [Row(f"{ours}/bias", f"{theirs}.bias")] * bias


def attention(ours: str, theirs: Sequence[str], tower: vit.ViTConfig) -> list[Row]:
    """Rows of query, key, value and out projections; `theirs` names them."""
    names = ("query", "key", "value", "out")
    biases = (
        tower.qkv_bias,
        tower.qkv_bias and tower.key_bias,
        tower.qkv_bias,
        tower.out_bias,
    )
    return [
        row
        for name, their, bias in zip(names, theirs, biases, strict=True)
        for row in linear(f"{ours}/attention/{name}", their, bias=bias)
    ]


def square(positions: int, source: str) -> int:
    """Side of a square grid with so many positions."""
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(
            f"{source} has {positions} positions, which make no square grid; towers "
            "with another grid cannot be imported."
        )
    return side


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be given as one number."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def refuse(config: Mapping[str, Any], **computed: Any) -> None:
    """Raises ValueError where the config sets what our tower computes otherwise.

    computed: field -> the only value that we have; an absent field is taken for it.
    """
    for name, value in computed.items():
        if (got := config.get(name, value)) != value:
            raise ValueError(
                f"config.json says {name} = {got!r}; this tower can only be computed "
                f"with {value!r}."
            )


def choose(config: Mapping[str, Any], name: str, values: Mapping[Any, Any]) -> Any:
    """What stands for `config[name]` in `values`."""
    got = config[name]
    if got not in values:
        raise ValueError(
            f"config.json says {name} = {got!r}; known are "
            f"{', '.join(map(repr, values))}."
        )
    return values[got]


def prefix_of(names: Mapping[str, Any], anchor: str, prefixes: Sequence[str]) -> str:
    """Which of the prefixes the tower's names have; `anchor` is one of these names."""
    for prefix in prefixes:
        if prefix + anchor in names:
            return prefix
    raise ValueError(
        f"no tensor is called {anchor}, nor that after one of "
        f"{', '.join(p for p in prefixes if p)}: this is not the tower that its "
        "config.json promises, or a part of the download is missing."
    )
