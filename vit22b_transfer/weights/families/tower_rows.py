"""What the tables of image towers share: names, rows of usual layers, readings."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import quoted
from vit22b_transfer.models import vit, vit_blocks, vit_positions
from vit22b_transfer.weights.files import config_values
from vit22b_transfer.weights.mapping import Row, Shape, unrolled_shapes
from vit22b_transfer.weights.transforms import TRANSPOSE

TOWER = "encoder/tower"
BLOCK = f"{TOWER}/layers_{{i}}"
POSITIONS = f"{TOWER}/position_embedding/embedding"

# What every public tower but ViT-22B's relatives has.
SEQUENTIAL: dict[str, Any] = dict(
    parallel=False, qk_norm=False, qkv_bias=True, norm_centering=True, norm_bias=True
)


def tower_shapes(tower: vit.ViTConfig, text: Any = None) -> dict[str, Shape]:
    """Names and shapes of a tower's parameters, unrolled; nothing is allocated."""
    del text
    module = dataclasses.replace(tower, scan_layers=True).build()
    images = jax.ShapeDtypeStruct((1, *tower.image_size, 3), jnp.uint8)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    shapes = unrolled_shapes(params)
    return {f"{TOWER}/{name}": shape for name, shape in shapes.items()}


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


def layer_scales(attention: str, mlp: str) -> list[Row]:
    """Rows of a sequential block's two LayerScales."""
    return [
        Row(f"{BLOCK}/layer_scale/scale", attention),
        Row(f"{BLOCK}/mlp_layer_scale/scale", mlp),
    ]


def attention(
    ours: str, theirs: Sequence[str], tower: vit_blocks.BlockConfig
) -> list[Row]:
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
    """Side of a square grid of that many positions."""
    side = math.isqrt(positions)
    if side * side != positions:
        raise UserError(
            f"{source} has {positions} positions, which make no square grid; towers "
            "with another grid cannot be imported."
        )
    return side


def whole_patches(size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """The part of an image that whole patches cover: a convolution drops the rest."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < patch_size:
        raise UserError(
            f"the images are {height}x{width}, smaller than a patch of {patch_size}."
        )
    return height // patch_size * patch_size, width // patch_size * patch_size


def refuse(config: Mapping[str, Any], **computed: Any) -> None:
    """Raises UserError where the config sets what our tower computes otherwise.

    computed: field -> the only value that we have; an absent field is taken for it.
    """
    for name, value in computed.items():
        if (got := config.get(name, value)) != value:
            raise UserError(
                f"config.json says {name} = {quoted(got)}; this tower can "
                f"only be computed with {value!r}."
            )


def need_tensors(tensors: Mapping[str, Any], what: str) -> None:
    """Raises UserError if there are no tensors to read the sizes from."""
    if not tensors:
        raise UserError(
            f"the sizes of {what} are read from its tensors; name with --config the "
            "directory that `vit22b import` wrote."
        )


def choose(config: Mapping[str, Any], name: str, values: Mapping[Any, Any]) -> Any:
    """What stands for the text `config[name]` in `values`."""
    got = config_values.text(config, name)
    if got not in values:
        raise UserError(
            f"config.json says {name} = {got!r}; known are "
            f"{', '.join(map(repr, values))}."
        )
    return values[got]


def shape(tensors: Mapping[str, Any], name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with that many axes, none empty."""
    if name not in tensors:
        raise UserError(f"{name} is missing. Fetch the files again.")
    found = tuple(tensors[name].shape)
    if len(found) != axes or 0 in found:
        raise UserError(
            f"{name} has the shape {found}; expected are {axes} axes, none of size 0."
        )
    return found


def find_prefix(names: Mapping[str, Any], anchor: str, prefixes: Sequence[str]) -> str:
    """Which of the prefixes the tower's names have; `anchor` is one of these names.

    Without any names (an export by a config alone) it is the first prefix.
    """
    if not names:
        return prefixes[0]
    for prefix in prefixes:
        if prefix + anchor in names:
            return prefix
    raise UserError(
        f"no tensor is called {anchor}, nor that after one of "
        f"{', '.join(p for p in prefixes if p)}: this is not the tower that its "
        "config.json promises, or a part of the download is missing."
    )
