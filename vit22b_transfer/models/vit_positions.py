"""Positions of patches: resampled tables, and rotations by row and column."""

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Resampling = Literal[
    "bilinear_corners", "bilinear_antialiased", "bicubic", "bicubic_antialiased"
]
RESAMPLINGS = get_args(Resampling)
ROTARY_BASE = 100.0


def resample_position_embeddings(
    table: Float[Array, "positions embed"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    resampling: Resampling = "bilinear_corners",
) -> Float[Array, "resampled embed"]:
    """The position table of another grid, as the family that made it resamples.

    `bilinear_corners` keeps the corner points in place, as big_vision does (it equals
    `scipy.ndimage.zoom(order=1)`); the others keep the image's edges in place and equal
    torch's `interpolate` of that name. Rows and columns are independent, so any aspect
    ratio works.
    """
    if old_grid == new_grid:
        return table
    grid = table.reshape(*old_grid, -1)
    rows, columns = (
        jnp.asarray(interpolation(old, new, resampling), table.dtype)
        for old, new in zip(old_grid, new_grid, strict=True)
    )
    grid = jnp.einsum("hH,wW,HWE->hwE", rows, columns, grid)
    return grid.reshape(-1, table.shape[-1])


def interpolation(old: int, new: int, resampling: Resampling) -> np.ndarray:
    """The [new, old] matrix that resamples `old` points to `new` along one axis."""
    return _weights(np.arange(new) * 1.0, np.full(new, 1.0 * new), old, resampling, np)


def interpolation_at(
    places: Int[Array, "*tokens"],
    sizes: Int[Array, "*tokens"],
    old: int,
    resampling: Resampling,
) -> Float[Array, "*tokens old"]:
    """Rows `places` of `interpolation(old, sizes)`, in float32, sizes token by token.

    places: from 0 to the size - 1. sizes: the `new` points along the axis, from 1.
    """
    places, sizes = (jnp.asarray(x, jnp.float32) for x in (places, sizes))
    return _weights(places, sizes, old, resampling, jnp)


def positions_at(
    table: Float[Array, "positions embed"],
    old_grid: tuple[int, int],
    places: Int[Array, "*tokens 2"],
    grids: Int[Array, "*tokens 2"],
    resampling: Resampling,
) -> Float[Array, "*tokens embed"]:
    """`resample_position_embeddings` of tokens, each of an image with its own grid.

    places: row and column of each token. grids: rows and columns of its image.
    """
    rows, columns = (
        interpolation_at(places[..., i], grids[..., i], old_grid[i], resampling)
        for i in range(2)
    )
    weights = (rows[..., :, None] * columns[..., None, :]).astype(table.dtype)
    return weights.reshape(*weights.shape[:-2], -1) @ table


def _weights(places, sizes, old, resampling, xp):
    """The weights of `old` points at the places, by numpy (float64) or JAX."""
    places, sizes = places[..., None], sizes[..., None]
    along = (1,) * (places.ndim - 1) + (-1,)
    points = xp.arange(old, dtype=places.dtype).reshape(along)
    if resampling == "bilinear_corners":
        at = places * (old - 1) / xp.maximum(sizes - 1, 1)
        return _triangle(at - points, xp)
    # Where the centres of the new points lie among the old ones: (i + 1/2) old / new -
    # 1/2, rounded once.
    at = ((2 * places + 1) * old - sizes) / (2 * sizes)
    if resampling == "bicubic":
        # The outermost values are repeated beyond the border.
        wider = xp.arange(-2, old + 2, dtype=places.dtype).reshape(along)
        weights = _cubic(at - wider, -0.75, xp)
        before = weights[..., :2].sum(axis=-1, keepdims=True)
        behind = weights[..., -2:].sum(axis=-1, keepdims=True)
        before = xp.where(points == 0, before, 0.0)
        behind = xp.where(points == old - 1, behind, 0.0)
        return weights[..., 2:-2] + before + behind
    # A smaller grid needs a wider filter; beyond the border there is nothing.
    distance = (at - points) / xp.maximum(old / sizes, 1.0)
    bilinear = resampling == "bilinear_antialiased"
    weights = _triangle(distance, xp) if bilinear else _cubic(distance, -0.5, xp)
    return weights / weights.sum(axis=-1, keepdims=True)


def _triangle(distance, xp):
    return xp.maximum(0.0, 1.0 - xp.abs(distance))


def _cubic(distance, a, xp):
    """Keys' convolution kernel (1981); `a` is its slope at distance 1."""
    x = xp.abs(distance)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((x - 5.0) * x + 8.0) * x * a - 4.0 * a
    return xp.where(x <= 1.0, near, xp.where(x < 2.0, far, 0.0))


def rotary_angles(
    grid: tuple[int, int], head_dim: int, num_prefix_tokens: int
) -> np.ndarray:
    """Angles [length, head_dim / 2] that turn queries and keys by row and column.

    As in DINOv3: the centres of the patches, from -1 to 1 over the image whatever its
    size, times 2 pi and falling frequencies; first those of the row, then those of the
    column. Prefix tokens are not turned.
    """
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1)
    angles = _angles(places.reshape(-1, 2) * 1.0, np.asarray([grid]) * 1.0, head_dim)
    return np.pad(angles, ((num_prefix_tokens, 0), (0, 0))).astype(np.float32)


def rotary_angles_at(
    places: Int[Array, "*tokens 2"], grids: Int[Array, "*tokens 2"], head_dim: int
) -> Float[Array, "*tokens half"]:
    """`rotary_angles` of tokens, each of an image with its own grid, in float32."""
    places, grids = (jnp.asarray(x, jnp.float32) for x in (places, grids))
    return _angles(places, grids, head_dim)


def _angles(places, grids, head_dim):
    frequencies = ROTARY_BASE ** -(np.arange(head_dim // 4) * 4.0 / head_dim)
    at = 2.0 * (places + 0.5) / grids - 1.0
    along = (1,) * at.ndim + (-1,)
    angles = 2.0 * np.pi * at[..., None] * frequencies.reshape(along).astype(at.dtype)
    return angles.reshape(*angles.shape[:-2], -1)
