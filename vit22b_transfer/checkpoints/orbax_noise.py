"""What Orbax prints beside the errors that it raises, kept off the terminal.

Its threads and coroutines log or leave a screen of traceback each when one of them
fails, some of them only when Python ends; the error itself is raised once.
"""

import functools
import inspect
import logging
import sys
from typing import Any

_CLOSED = "Event loop is closed"  # while other threads of Orbax still have work


@functools.cache
def hush() -> None:
    """Drops these, and nothing else, from now on."""
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def without_closed(kind: Any, error: Any, trace: Any) -> None:
        if not (isinstance(error, RuntimeError) and str(error) == _CLOSED):
            excepthook(kind, error, trace)

    def without_coroutines(unraisable: Any) -> None:
        error, left = unraisable.exc_value, unraisable.object
        is_closed = isinstance(error, RuntimeError) and str(error) == _CLOSED
        if inspect.iscoroutine(left):
            is_closed = "orbax" in left.cr_code.co_filename
        if not is_closed:
            unraisablehook(unraisable)

    sys.excepthook, sys.unraisablehook = without_closed, without_coroutines
    logging.getLogger("absl").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    is_known = record.exc_info or str(record.msg).startswith("Metadata file does not")
    return not (is_known and "orbax" in record.pathname)
