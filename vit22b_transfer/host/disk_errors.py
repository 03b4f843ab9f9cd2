"""A disk that is full, read-only or gone while something is written to it: one line.

Python says so with an `OSError`, libraries in C++ with other exceptions whose texts
hold the number of the system's error.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator

from vit22b_transfer import UserError

# These come of writing, whatever file they are about.
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
# As TensorStore and TensorFlow end their messages.
_NUMBER = re.compile(r"os_error_code='(\d+)'")


class DiskError(UserError):
    """What is written to cannot be written any more."""


@contextlib.contextmanager
def said(path: str, state: Callable[[], str]) -> Iterator[None]:
    """Turns a failure to write below `path` into one line.

    state: half a sentence on what is kept, such as "checkpoint_5 is untouched".

    Raises:
      DiskError: in place of what is raised for a full disk, one that became read-only,
        a directory that is gone; anything else is left as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = _reason(error, os.path.abspath(path))
        if found is None:
            raise
        reason, file = found
        raise DiskError(
            f"{file} can no longer be written: {reason}. {_kept(state)}. When that is "
            "mended, the same command goes on from there."
        ) from error


def _kept(state: Callable[[], str]) -> str:
    try:
        text = state()
    except OSError as error:
        return f"What is kept cannot be told ({error.strerror})"
    return text[:1].upper() + text[1:]


def _reason(error: BaseException, path: str) -> tuple[str, str] | None:
    """(what the system says, of which file) if it is about writing below `path`."""
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        cause = pending.pop()
        if cause is None or cause in seen:
            continue
        seen.append(cause)
        pending += [cause.__cause__, cause.__context__]
        if found := _of_one(cause, path):
            return found
    return None


def _of_one(error: BaseException, path: str) -> tuple[str, str] | None:
    if isinstance(error, OSError) and error.errno is not None:
        reason = error.strerror or os.strerror(error.errno)
        if isinstance(error.filename, str) and _is_below(error.filename, path):
            return reason, error.filename
        if error.filename is None and error.errno in _OF_WRITING:
            return reason, path
        return None
    text = str(error)
    if path not in text:
        return None
    if number := _NUMBER.search(text):
        return os.strerror(int(number[1])), path
    for number in (*_OF_WRITING, errno.ENOENT):
        if os.strerror(number) in text:
            return os.strerror(number), path
    # A file of ours, or all of them, that others have removed.
    if text.startswith("NOT_FOUND") or not os.path.exists(path):
        return os.strerror(errno.ENOENT), path
    return None


def _is_below(file: str, path: str) -> bool:
    return os.path.abspath(file) == path or os.path.abspath(file).startswith(
        path.rstrip(os.sep) + os.sep
    )
