"""Maps of whole images of any size, from a model that sees one size: by windows.

An image is resized until it just covers a window, windows cover it, and what they say
of a pixel is averaged. Logits and metres alike.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.data import pixel_crops
from vit22b_transfer.data.placement import Placement

# Numbers of a map that are resized at a time.
_AT_A_TIME = 1 << 24


@dataclasses.dataclass(frozen=True)
class Windows:
    """How images are cut into windows.

    size: (height, width) in pixels. stride: (down, across) from a window to the next.
    """

    size: tuple[int, int]
    stride: tuple[int, int]

    def __post_init__(self):
        for step, side in zip(self.stride, self.size, strict=True):
            if not 1 <= step <= side:
                raise UserError(
                    f"windows of {self.size[0]}x{self.size[1]} pixels at a stride of "
                    f"{tuple(self.stride)}: it must be at least 1 and not more than "
                    "the window, or pixels between them would be left out."
                )

    def maps(
        self,
        images: Iterable[UInt8[np.ndarray, "_ _ 3"]],
        predict: Callable[[Any], Any],
        placement: Placement,
    ) -> Iterator[Float[np.ndarray, "_ _ outputs"]]:
        """Of each image, in order, the mean map at the size that it was resized to.

        predict: from images [B, height, width, 3], as `placement` puts them on the
          devices, to maps [B, height, width, outputs]. The last batch is filled up.
        """
        waiting: collections.deque[_Sum] = collections.deque()
        batch: list[tuple[_Sum, tuple[int, int], np.ndarray]] = []
        count = placement.batch_size

        def run():
            rows = [window for _, _, window in batch]
            rows += [rows[-1]] * (count - len(rows))
            features = placement({"images": np.stack(rows)})
            maps = np.asarray(predict(features["images"]))
            for (total, corner, _), found in zip(batch, maps, strict=False):
                total.add(found, corner, self.size)
            batch.clear()

        for image in images:
            shape = pixel_crops.covering(image.shape[:2], self.size)
            resized = pixel_crops.resized_image(image, shape)
            corners = list(pixel_crops.windows(shape, self.size, self.stride))
            total = _Sum(shape, len(corners))
            waiting.append(total)
            for top, left in corners:
                cut = resized[top : top + self.size[0], left : left + self.size[1]]
                batch.append((total, (top, left), cut))
                if len(batch) == count:
                    run()
            while waiting and not waiting[0].left:
                yield waiting.popleft().mean()
        if batch:
            run()
        while waiting:
            yield waiting.popleft().mean()


class _Sum:
    """The sum of the windows of an image, and how many lie over each pixel."""

    def __init__(self, shape, left):
        self.left = left
        self._shape = shape
        self._total: Any = None
        self._count = np.zeros((*shape, 1), np.float32)

    def add(self, found, corner, size):
        if self._total is None:
            self._total = np.zeros((*self._shape, found.shape[-1]), np.float32)
        (top, left), (height, width) = corner, size
        place = (slice(top, top + height), slice(left, left + width))
        self._total[place] += found
        self._count[place] += 1
        self.left -= 1

    def mean(self):
        return self._total / self._count


def classes_at(
    logits: Float[np.ndarray, "rows columns classes"], shape: tuple[int, int]
) -> Int[np.ndarray, "h w"]:
    """The likeliest class of each pixel of (h, w), logits resized bilinearly."""
    parts = [part.argmax(axis=-1) for part in _resized(logits, shape)]
    return np.concatenate(parts).astype(np.int32)


def values_at(
    values: Float[np.ndarray, "rows columns 1"], shape: tuple[int, int]
) -> Float[np.ndarray, "h w"]:
    """The value at each pixel of (h, w) = shape, resized bilinearly."""
    return np.concatenate([part[..., 0] for part in _resized(values, shape)])


def _resized(values, shape):
    """The map at a shape, some rows at a time; edges in place, without smoothing."""
    if values.shape[:2] == tuple(shape):
        yield values
        return
    across = _taps(values.shape[1], shape[1])
    low, high, share = _taps(values.shape[0], shape[0])
    step = max(1, _AT_A_TIME // (max(values.shape[1], shape[1]) * values.shape[2]))
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        part = _mixed(values[low[rows]], values[high[rows]], share[rows, None, None])
        left, right, of_right = across
        yield _mixed(part[:, left], part[:, right], of_right[None, :, None])


def _mixed(first, second, share):
    return first * (1 - share) + second * share


def _taps(old, new):
    """Of each new point the two old ones around it, and the share of the second."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, old - 1)
    return low, high, (at - low).astype(np.float32)
