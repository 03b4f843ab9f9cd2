"""What is done to an image and its labels alike: sizes, crops, flips, windows.

Images are resized bilinearly and smoothed, labels by their nearest pixel. Both are
resized to the same size, cut at the same place and mirrored together.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image

from vit22b_transfer import UserError
from vit22b_transfer.data.images import MAX_PIXELS


@dataclasses.dataclass(frozen=True)
class RandomCrops:
    """How training images are drawn.

    scales: (least, most): the image is resized until it just covers the crop, then by a
      factor drawn evenly from these. Below 1 it is smaller than the crop: what is left
      over has the fill colour and no label.
    flip: half of the images are mirrored, left to right.
    """

    scales: tuple[float, float] = (0.5, 2.0)
    flip: bool = True

    def __post_init__(self):
        least, most = self.scales
        if not 0 < least <= most < 100:
            raise UserError(
                f"scales={self.scales} must be (least, most), above 0 and below 100."
            )

    def draw(
        self,
        image: UInt8[np.ndarray, "rows columns 3"],
        labels: Num[np.ndarray, "rows columns"],
        size: tuple[int, int],
        rng: np.random.Generator,
        *,
        fill: tuple[int, int, int],
        no_label: int,
    ) -> tuple[UInt8[np.ndarray, "h w 3"], Num[np.ndarray, "h w"]]:
        """A crop of (height, width) = size of both, drawn from `rng`.

        fill, no_label: of an image that is smaller than the crop.
        """
        scale = rng.uniform(*self.scales)
        shape = covering(image.shape[:2], size, scale)
        places = rng.uniform(size=2)
        mirrored = rng.uniform() < 0.5
        # Only what is kept is resized.
        top, left = (
            int(place * max(0, whole - side + 1))
            for place, whole, side in zip(places, shape, size, strict=True)
        )
        kept = min(size[0], shape[0]), min(size[1], shape[1])
        cut = resized_image(image, shape, (top, left), kept)
        marks = resized_labels(labels, shape, (top, left), kept)
        if kept != size:
            whole = np.empty((*size, 3), np.uint8)
            whole[:] = fill
            whole[: kept[0], : kept[1]] = cut
            around = np.full(size, no_label, labels.dtype)
            around[: kept[0], : kept[1]] = marks
            cut, marks = whole, around
        if self.flip and mirrored:
            cut, marks = cut[:, ::-1], marks[:, ::-1]
        return np.ascontiguousarray(cut), np.ascontiguousarray(marks)


def covering(
    shape: tuple[int, ...], size: tuple[int, int], scale: float = 1.0
) -> tuple[int, int]:
    """(rows, columns) of an image that just covers `size`, times a scale; at least 1.

    Raises:
      UserError: if that has more than `MAX_PIXELS` pixels: the image is too long.
    """
    factor = max(side / own for side, own in zip(size, shape, strict=True)) * scale
    rows, columns = (max(1, round(own * factor)) for own in shape)
    if rows * columns > MAX_PIXELS:
        raise UserError(
            f"an image of {shape[1]}x{shape[0]} pixels becomes {columns}x{rows} to "
            f"cover {size[1]}x{size[0]}, more than the limit of {MAX_PIXELS:,} pixels. "
            "Leave it out, or cut it."
        )
    return rows, columns


def resized_image(
    image: UInt8[np.ndarray, "rows columns 3"],
    shape: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
    kept: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image at `shape`, or of that the part `kept` from a corner, bilinear."""
    kept = kept or shape
    if image.shape[:2] == shape:
        (top, left), (height, width) = corner, kept
        return image[top : top + height, left : left + width]
    down, across = (own / new for own, new in zip(image.shape[:2], shape, strict=True))
    (top, left), (height, width) = corner, kept
    box = (
        left * across,
        top * down,
        min((left + width) * across, image.shape[1]),
        min((top + height) * down, image.shape[0]),
    )
    found = Image.fromarray(image).resize(
        (width, height), Image.Resampling.BILINEAR, box=box
    )
    return np.asarray(found)


def resized_labels(
    labels: Num[np.ndarray, "rows columns"],
    shape: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
    kept: tuple[int, int] | None = None,
) -> Num[np.ndarray, "h w"]:
    """As `resized_image`, each pixel that of the label under its centre."""
    places = []
    for own, new, start, count in zip(
        labels.shape, shape, corner, kept or shape, strict=True
    ):
        at = (np.arange(start, start + count) + 0.5) * own / new
        places.append(np.minimum(at.astype(np.int64), own - 1))
    return labels[np.ix_(*places)]


def windows(
    shape: tuple[int, int], size: tuple[int, int], stride: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """(top, left) of the windows that cover an image; the last ones end at its edges.

    shape: of the image, at least `size` on both sides.
    """
    starts: list[Any] = []
    for whole, side, step in zip(shape, size, stride, strict=True):
        count = -(-(whole - side) // step) + 1
        starts.append([min(n * step, whole - side) for n in range(count)])
    for top in starts[0]:
        for left in starts[1]:
            yield top, left
