"""Images that are the same but for their size, their coding or a little light.

Two images are near duplicates if their difference hashes (64 bits: of a grey image of
9 x 8, whether a pixel is brighter than the one to its left) differ in at most
`NEAR_BITS` bits and their colours on a grid of 8 x 8 by at most `NEAR_LEVELS` of 255 on
average; or if their files are equal. The hash alone would take plain images for equal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt64
from PIL import Image

NEAR_BITS, NEAR_LEVELS = 4, 6.0
# Two hashes that differ in at most 4 bits have one of 5 parts of their bits in common.
_PARTS = [(0, 13), (13, 13), (26, 13), (39, 13), (52, 12)]
# Images with one part in common that are compared pair by pair.
_MOST = 1_500


class Look(NamedTuple):
    """What is kept of an image to find it again."""

    hash: int
    colors: UInt8[np.ndarray, " 192"]


class Groups(NamedTuple):
    """Numbers of images that are near duplicates, by chains too; each once.

    plain: images that have a part of their hash in common with more than `_MOST`
      others, as all-white ones have: of these some near duplicates may be missed.
    """

    groups: list[list[int]]
    plain: int


def look(pixels: UInt8[np.ndarray, "height width 3"]) -> Look:
    """The difference hash and the colours of an image."""
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), int)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    colors = np.asarray(image.resize((8, 8), Image.Resampling.BOX))
    return Look(int.from_bytes(bits.tobytes(), "big"), colors.reshape(192))


def near(
    hashes: UInt64[np.ndarray, " a"],
    colors: UInt8[np.ndarray, "a 192"],
    other_hashes: UInt64[np.ndarray, " b"],
    other_colors: UInt8[np.ndarray, "b 192"],
) -> Bool[np.ndarray, "a b"]:
    """Which of the first are near duplicates of which of the others."""
    differing = np.bitwise_count(hashes[:, None] ^ other_hashes[None])
    found = differing <= NEAR_BITS
    first, second = np.nonzero(found)
    gaps = np.abs(
        colors[first].astype(np.int16) - other_colors[second].astype(np.int16)
    ).mean(axis=1)
    found[first, second] = gaps <= NEAR_LEVELS
    return found


def groups(looks: Sequence[Look], files: Sequence[bytes]) -> Groups:
    """The near duplicates among images; files: a digest of each image's file."""
    count = len(looks)
    hashes = np.array([one.hash for one in looks], np.uint64)
    colors = np.array([one.colors for one in looks], np.uint8).reshape(count, 192)
    parent = np.arange(count)
    first_of: dict[bytes, int] = {}
    for number, digest in enumerate(files):
        _join(parent, first_of.setdefault(digest, number), number)
    plain: set[int] = set()
    for start, width in _PARTS:
        parts = (hashes >> np.uint64(start)) & np.uint64((1 << width) - 1)
        order = np.argsort(parts, kind="stable")
        ends = np.flatnonzero(np.diff(parts[order])) + 1
        for alike in np.split(order, ends):
            if len(alike) > _MOST:
                plain.update(alike.tolist())
            elif len(alike) > 1:
                pairs = near(hashes[alike], colors[alike], hashes[alike], colors[alike])
                for one, other in np.argwhere(np.triu(pairs, 1)):
                    _join(parent, int(alike[one]), int(alike[other]))
    members: dict[int, list[int]] = {}
    for number in range(count):
        members.setdefault(_root(parent, number), []).append(number)
    return Groups([group for group in members.values() if len(group) > 1], len(plain))


def _root(parent: Int[np.ndarray, " images"], number: int) -> int:
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = int(parent[number])
    return number


def _join(parent: Int[np.ndarray, " images"], one: int, other: int) -> None:
    low, high = sorted((_root(parent, one), _root(parent, other)))
    parent[high] = low
