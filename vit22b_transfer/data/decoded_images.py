"""Images that stay in memory once they are decoded, as all of a small set can."""

import contextlib
import threading
from collections.abc import Iterator

import numpy as np

from vit22b_transfer.data.images import USUAL, read_image, read_whole
from vit22b_transfer.models.preparation import Preparation


class DecodedImages:
    """Decoded images of the files that were read first, up to a number of bytes.

    A small set is then decoded once, not in every epoch, by every caption and by every
    task that shows the image. Nothing is ever evicted: in a shuffled set larger than
    the limit any image is as good as another.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._bytes = 0
        self._images: dict[tuple, np.ndarray] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def keeping_none(self) -> Iterator[None]:
        """A block in which every image is decoded anew, as those of a large set are."""
        with self._lock:
            kept, self._images = (self._max_bytes, self._bytes, self._images), {}
            self._max_bytes = self._bytes = 0
        try:
            yield
        finally:
            with self._lock:
                self._max_bytes, self._bytes, self._images = kept

    def read(
        self,
        source: bytes | str,
        size: tuple[int, int] | None = None,
        how: Preparation = USUAL,
        *,
        name: str = "an image",
    ) -> np.ndarray:
        """`read_image` of encoded bytes called `name`, or of the file at a path.

        Without a size `read_whole`. Not to be written to: it may be what is kept.
        """
        key = (source, size, how)
        pixels = self._images.get(key) if isinstance(source, str) else None
        if pixels is None:
            if size is None:
                pixels = read_whole(source, name=name)
            else:
                pixels = read_image(source, size, how, name=name)
            with self._lock:
                fits = self._bytes + pixels.nbytes <= self._max_bytes
                if isinstance(source, str) and fits and key not in self._images:
                    self._images[key] = pixels
                    self._bytes += pixels.nbytes
        return pixels


SMALL_SETS = DecodedImages(max_bytes=256 * 2**20)
# Apart from the others, so that large ones do not take their place.
WHOLE_IMAGES = DecodedImages(max_bytes=256 * 2**20)
