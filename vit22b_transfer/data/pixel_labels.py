"""PNG files whose pixels are labels: index masks of classes, and depths of 16 bits."""

import io
import os
import stat

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vit22b_transfer import UserError
from vit22b_transfer.data.images import MAX_PIXELS
from vit22b_transfer.data.records import printable

# No PNG of so many pixels of 16 bits needs more.
MAX_BYTES = 3 * MAX_PIXELS
_INDEX_MODES = ("1", "L", "P", "I", "I;16")
_DEPTH_MODES = ("I", "I;16")
_LARGEST = 65_535


def read_indices(path: str) -> Int[np.ndarray, "rows columns"]:
    """The indices of an index mask, from 0 to 65,535, as int32.

    A mask is grey or has a palette, of which the indices are taken; one bit is 0 or 1.

    Raises:
      UserError: naming the file, if it cannot be read, is too large, or is of colours.
    """
    return _read(
        path,
        _INDEX_MODES,
        "a mask is a grey PNG or one with a palette, whose numbers are classes",
    )


def read_depths(path: str, units_per_metre: float) -> Float[np.ndarray, "rows columns"]:
    """Metres, float32, of a grey PNG of 16 bits; 0 where none is known.

    units_per_metre: what the file says of a metre: 1000 of millimetres, 256 of KITTI.

    Raises:
      UserError: as `read_indices`; if it has 8 bits.
    """
    units = _read(
        path,
        _DEPTH_MODES,
        "a depth map is a grey PNG of 16 bits; 8 are too few for metres",
    )
    return (units / np.float64(units_per_metre)).astype(np.float32)


def _read(path, modes, wanted):
    name = printable(os.fspath(path))
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name} is not a file.")
        if status.st_size > MAX_BYTES:
            raise UserError(
                f"{name} has {status.st_size:,} bytes, more than the limit of "
                f"{MAX_BYTES:,}."
            )
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}.") from error
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            columns, rows = image.size
            if rows * columns > MAX_PIXELS:
                raise UserError(
                    f"{name} is too large to decode: {columns}x{rows} pixels are more "
                    f"than the limit of {MAX_PIXELS:,}."
                )
            if image.mode not in modes:
                raise UserError(f"{name} is a PNG of mode {image.mode}: {wanted}.")
            pixels = np.asarray(image)
    except UserError:
        raise
    except Exception as error:  # Pillow's plugins raise many types
        raise UserError(
            f"{name} is no PNG that can be read: {printable(str(error))[:200]}."
        ) from error
    return np.clip(pixels.astype(np.int32), 0, _LARGEST)
