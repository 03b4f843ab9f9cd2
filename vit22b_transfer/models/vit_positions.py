"""Positions of patches: resampled tables, and rotations by row and column."""

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
    points = np.arange(old)[None]
    if resampling == "bilinear_corners":
        return _triangle(np.linspace(0.0, old - 1, new)[:, None] - points)
    # Where the centres of the new points lie among the old ones.
    at = ((np.arange(new) + 0.5) * old / new - 0.5)[:, None]
    if resampling == "bicubic":
        # The outermost values are repeated beyond the border.
        weights = _cubic(at - np.arange(-2, old + 2)[None], -0.75)
        matrix = weights[:, 2:-2]
        matrix[:, 0] += weights[:, :2].sum(axis=1)
        matrix[:, -1] += weights[:, -2:].sum(axis=1)
        return matrix
    # A smaller grid needs a wider filter; beyond the border there is nothing.
    distance = (at - points) / max(old / new, 1.0)
    bilinear = resampling == "bilinear_antialiased"
    weights = _triangle(distance) if bilinear else _cubic(distance, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(distance))


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' convolution kernel (1981); `a` is its slope at distance 1."""
    x = np.abs(distance)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((x - 5.0) * x + 8.0) * x * a - 4.0 * a
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


def rotary_angles(
    grid: tuple[int, int], head_dim: int, num_prefix_tokens: int
) -> np.ndarray:
    """Angles [length, head_dim / 2] that turn queries and keys by row and column.

    As in DINOv3: the centres of the patches, from -1 to 1 over the image whatever its
    size, times 2 pi and falling frequencies; first those of the row, then those of the
    column. Prefix tokens are not turned.
    """
    frequencies = ROTARY_BASE ** -(np.arange(head_dim // 4) * 4.0 / head_dim)
    centres = [2.0 * (np.arange(n) + 0.5) / n - 1.0 for n in grid]
    at = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = (2.0 * np.pi * at * frequencies).reshape(-1, head_dim // 2)
    return np.pad(angles, ((num_prefix_tokens, 0), (0, 0))).astype(np.float32)
