"""Images of various sizes as rows of patches: how large each is, and where it lies.

`models.packing.PackedImages` is what comes of it, which a tower takes.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8

from vit22b_transfer import UserError
from vit22b_transfer.models import packing

# SigLIP 2's processor looks for the scale between these two, by halving.
_SCALES = (1e-6, 100.0)
_NEAR_ENOUGH = 1e-5


def size_within(
    shape: tuple[int, ...], budget: int, patch: int, *, enlarge: bool = True
) -> tuple[int, int]:
    """(height, width) of an image's shape, in whole patches, no more than `budget`.

    The rule of SigLIP 2's processor: both sides times the largest scale at which the
    patches fit, up to 100, each rounded up to a multiple of `patch`. The scale is found
    as theirs is, so that sizes agree where two of them are a hair apart.

    shape: (height, width) of the image, from 1. enlarge: False stops at scale 1.

    Raises:
      UserError: if no scale fits: a long strip in very few patches.
    """
    height, width = shape

    def at(scale):
        return tuple(
            max(1, math.ceil(side * scale / patch)) for side in (height, width)
        )

    found = at(1.0)
    if enlarge or math.prod(found) > budget:
        least, most = _SCALES
        while most - least >= _NEAR_ENOUGH:
            middle = (least + most) / 2
            if math.prod(at(middle)) <= budget:
                least = middle
            else:
                most = middle
        found = at(least)
    if math.prod(found) > budget:
        raise UserError(
            f"an image of {height}x{width} is too long and narrow for {budget} "
            f"{'patch' if budget == 1 else 'patches'}; give it more"
        )
    return found[0] * patch, found[1] * patch


def patches_of(
    pixels: UInt8[np.ndarray, "height width 3"], patch: int
) -> UInt8[np.ndarray, "patches values"]:
    """An image's patches by rows, the pixels of each by rows, channels last.

    Raises:
      UserError: if patches do not tile the image.
    """
    height, width = pixels.shape[:2]
    if height % patch or width % patch:
        raise UserError(
            f"an image of {height}x{width} is no whole number of patches of {patch}."
        )
    grid = pixels.reshape(height // patch, patch, width // patch, patch, 3)
    return grid.swapaxes(1, 2).reshape(-1, patch * patch * 3)


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """The rows of packed images.

    tokens: of a row. images: the most of a row. patch: side of the patches in pixels.
    """

    tokens: int
    images: int
    patch: int
    varied = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(
                    f"{field.name} of packed images is {getattr(self, field.name)}; it "
                    "must be at least 1."
                )

    def batch(self, rows: int) -> "PackedBatch":
        """So many rows without an image."""
        return PackedBatch(rows, self)


class PackedBatch:
    """Images in rows, as they come, each in the first row that has room.

    arrays: the `PackedImages`. places: row and number in it (from 0) of each image, in
    the order in which they came: `pooled[row, number]` is its vector.
    """

    def __init__(self, rows: int, form: RowFormat):
        self._form = form
        self.arrays = packing.no_images(rows, form.tokens, form.patch, form.images)
        self.places: list[tuple[int, ...]] = []
        self._used = np.zeros(rows, np.int64)
        self._images = np.zeros(rows, np.int64)

    def add(
        self, pixels: UInt8[np.ndarray, "height width 3"], name: str = "an image"
    ) -> bool:
        """Lays an image; False, and nothing is done, if no row has room for it.

        Raises:
          UserError: naming the image, if an empty row had none, or if patches do not
            tile it.
        """
        form = self._form
        try:
            patches = patches_of(pixels, form.patch)
        except UserError as e:
            raise UserError(f"{name}: {e}") from None
        count = len(patches)
        if count > form.tokens:
            raise UserError(
                f"{name} has {count} patches, but a row has {form.tokens} tokens. Make "
                "the rows longer, or the image smaller."
            )
        room = (self._used + count <= form.tokens) & (self._images < form.images)
        if not room.any():
            return False
        row = int(np.argmax(room))
        tokens = slice(self._used[row], self._used[row] + count)
        grid = (pixels.shape[0] // form.patch, pixels.shape[1] // form.patch)
        packed = self.arrays
        packed.patches[row, tokens] = patches
        packed.segments[row, tokens] = self._images[row] + 1
        packed.places[row, tokens] = np.indices(grid).reshape(2, -1).T
        packed.grids[row, tokens] = grid
        self.places.append((row, int(self._images[row])))
        self._used[row] += count
        self._images[row] += 1
        return True
