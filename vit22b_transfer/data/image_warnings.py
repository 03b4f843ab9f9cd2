"""What Pillow warns of while a thread reads an image.

Pillow tells of broken EXIF data through Python's `warnings`, which print a line of
Pillow's own code, and no image. `warnings.catch_warnings` would change what all threads
see, and images are read by many at a time.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator

from PIL import Image


class _Listening(threading.local):
    heard: list[str] | None = None


_LISTENING = _Listening()
_INSERTING = threading.Lock()


class _WhileListening:
    """What a filter of `warnings` matches texts with: those of a thread that listens.

    keeps: whether the texts are kept.
    """

    def __init__(self, *, keeps: bool):
        self._keeps = keeps

    def match(self, text: str) -> bool:
        if _LISTENING.heard is None:
            return False
        if self._keeps:
            _LISTENING.heard.append(text)
        return True


# (action, of its text, category, of its module, line; 0: any). Of too many pixels we
# have an error of our own.
_FILTERS = (
    ("ignore", _WhileListening(keeps=True), UserWarning, None, 0),
    ("ignore", _WhileListening(keeps=False), Image.DecompressionBombWarning, None, 0),
)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The texts of what this thread warns of in the block, which are not printed."""
    # Whoever has used `catch_warnings` since then has taken them away.
    with _INSERTING:
        for own in _FILTERS:
            if own not in warnings.filters:
                warnings.filters.insert(0, own)  # pyright: ignore
    before, _LISTENING.heard = _LISTENING.heard, []
    try:
        yield _LISTENING.heard
    finally:
        _LISTENING.heard = before
