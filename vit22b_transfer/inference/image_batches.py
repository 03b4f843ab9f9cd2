"""Images gathered into the arrays that a frozen tower is run on, one by one.

Those of one size are stacked, one to a row; those of their own shapes are packed, as
many to a row as have room (`data.image_packing`).
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import UInt8

from vit22b_transfer import UserError
from vit22b_transfer.data.image_packing import RowFormat
from vit22b_transfer.models.preparation import Preparation


@runtime_checkable
class Batch(Protocol):
    """A batch that is being filled.

    places: where in the tower's results each image is, in the order they came in.
    """

    places: list[tuple[int, ...]]

    @property
    def arrays(self) -> Any:
        """What the tower takes: an array or a tree of them, rows first."""
        ...

    def add(self, pixels: UInt8[np.ndarray, "height width 3"], name: str = "") -> bool:
        """Puts an image in; False if there is no room for it."""
        ...


@runtime_checkable
class BatchFormat(Protocol):
    """How images become batches. varied: whether they may differ in size."""

    @property
    def varied(self) -> bool:
        """Whether they may differ in size."""
        ...

    def batch(self, rows: int) -> Batch:
        """A batch of so many rows, without an image."""
        ...


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Images of one shape, (height, width, 3) or of several images, one to a row."""

    shape: tuple[int, ...]
    varied = False

    def batch(self, rows: int) -> "StackedBatch":
        """A batch of so many rows of zeros."""
        return StackedBatch(rows, self.shape)


class StackedBatch:
    """Images in the rows of one array; what is not filled is 0."""

    def __init__(self, rows: int, shape: tuple[int, ...]):
        self.arrays = np.zeros((rows, *shape), np.uint8)
        self.places: list[tuple[int, ...]] = []

    def add(self, pixels: UInt8[np.ndarray, "*shape"], name: str = "") -> bool:
        """Puts an image into the next row; False if all are taken."""
        row = len(self.places)
        if pixels.shape != self.arrays.shape[1:]:  # NumPy would stretch some
            raise ValueError(f"{name}: {pixels.shape}, not {self.arrays.shape[1:]}")
        if row == len(self.arrays):
            return False
        self.arrays[row] = pixels
        self.places.append((row,))
        return True


@dataclasses.dataclass(frozen=True)
class Packing:
    """Images of their own shapes, of which a frozen tower takes several to a row.

    row_tokens: patches of a row, no fewer than the largest image has. Longer rows waste
      less of the tower's work on empty tokens, and more on attention, which is computed
      between all tokens of a row.
    enlarge: small images become as large as the budget of patches allows, as SigLIP 2's
      are; False keeps their size, but for the last patch.
    """

    row_tokens: int
    enlarge: bool = True

    def preparation(self, tower: Any) -> Preparation:
        """How files become images for a tower: by its own filter, in its patches.

        Raises:
          UserError: if the tower cannot take packed images.
        """
        if not hasattr(tower, "check_packable"):
            raise UserError(
                f"{type(tower).__name__} takes no packed images. Leave packing out, or "
                "take a tower of models/vit.py."
            )
        tower.check_packable()
        how = tower.preparation or Preparation()
        fit = "own_shape" if self.enlarge else "own_size"
        return Preparation(
            filter=how.filter, fit=fit, jpegs=how.jpegs, patch=tower.patch_size
        )

    def rows(self, largest: int, patch: int) -> RowFormat:
        """The rows for images of at most `largest` patches of `patch` pixels a side.

        Raises:
          UserError: if the largest does not fit into a row.
        """
        if self.row_tokens < largest:
            raise UserError(
                f"row_tokens is {self.row_tokens}, but an image of the run's size has "
                f"{largest} patches; give rows at least that, or make images smaller."
            )
        # Room for images of an eighth of the largest, on average, each of a token.
        images = min(self.row_tokens, -(-8 * self.row_tokens // largest))
        return RowFormat(self.row_tokens, images, patch)


def on_devices(place: Any, arrays: Any) -> Any:
    """Arrays, or a tree of them, as `data.placement.Placement` puts them there."""
    leaves, tree = jax.tree.flatten(arrays)
    placed = place({str(number): leaf for number, leaf in enumerate(leaves)})
    return jax.tree.unflatten(tree, [placed[str(n)] for n in range(len(leaves))])
