"""Blocks of large arrays: contiguous copies, checksums, and the search for NaN.

All work on pieces that fit a processor's cache, so that they keep up with a disk and
take no memory to speak of.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

BLOCK_BYTES = 64 * 2**20
_TILE = 256
_PIECE = 2**19
# The bits of the exponent; all of them set means infinite or not a number.
_EXPONENTS = {
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
}
FLOATS = tuple(_EXPONENTS)


def block_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of blocks of about `BLOCK_BYTES`, cut along the first axes."""
    sizes = list(shape)
    for axis, size in enumerate(shape):
        rest = itemsize * int(np.prod(shape[axis + 1 :], dtype=np.int64))
        if rest <= BLOCK_BYTES:
            pieces = max(1, -(-size * rest // BLOCK_BYTES))
            sizes[axis] = -(-size // pieces)
            return tuple(max(1, size) for size in sizes)
        sizes[axis] = 1
    return tuple(sizes)


def regions(
    shape: tuple[int, ...], blocks: tuple[int, ...]
) -> Iterator[tuple[Any, ...]]:
    """The slices that cut an array into blocks, in C order.

    Each ends with an ellipsis, or NumPy would make numbers of arrays without axes.
    """
    counts = [-(-size // block) for size, block in zip(shape, blocks, strict=True)]
    for index in np.ndindex(*counts):
        slices = (
            slice(i * block, min((i + 1) * block, size))
            for i, block, size in zip(index, blocks, shape, strict=True)
        )
        yield (*slices, ...)


def contiguous(array: np.ndarray) -> np.ndarray:
    """The same values in C order; a matrix is transposed tile by tile."""
    if array.flags.c_contiguous:
        return array
    if array.ndim != 2 or array.strides[0] > array.strides[1]:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    for i in range(0, array.shape[0], _TILE):
        for j in range(0, array.shape[1], _TILE):
            tile = (slice(i, i + _TILE), slice(j, j + _TILE))
            out[tile] = array[tile]
    return out


def is_finite(array: np.ndarray) -> bool:
    """Whether no element of a contiguous float array is infinite or not a number."""
    integer, exponent = _EXPONENTS[array.dtype]
    flat = array.reshape(-1).view(integer)
    return all(
        int((flat[i : i + _PIECE] & exponent).max()) < exponent
        for i in range(0, flat.size, _PIECE)
    )


def checksum(array: np.ndarray, before: int = 0) -> int:
    """CRC-32 of a contiguous array's bytes, continuing that of the bytes before."""
    return zlib.crc32(array.reshape(-1).view(np.uint8).data, before)
