"""A limit on the bytes that threads hold at a time."""

import contextlib
import threading
from collections.abc import Iterator


class MemoryLimit:
    """Threads hold at most `limit` bytes; a larger request waits to be alone."""

    def __init__(self, limit: int):
        self._limit, self._free = limit, limit
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Context that is entered as soon as `size` bytes are free."""
        size = min(size, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()
