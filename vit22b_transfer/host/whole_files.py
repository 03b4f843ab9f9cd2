"""Files that are there whole or not at all, whenever the machine stops."""

import contextlib
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import IO

from vit22b_transfer import UserError

# The end of a name that `replacing` writes under: of what a killed process left.
_UNFINISHED = ".unfinished"
# That of a directory that is being removed.
DELETED = ".being-deleted"


@contextlib.contextmanager
def replacing(path: str, mode: str = "w") -> Iterator[IO]:
    """A new file that takes the place of `path` when the block ends without an error.

    mode: "w" for UTF-8 text with its line ends as they are written, or "wb". The
    content is on the disk before the name is: after a power cut `path` holds the old
    content or the new. Permissions are those of the file that is there, or of any new
    one (the umask).
    """
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    directory, name = os.path.split(os.path.abspath(path))
    descriptor, written = tempfile.mkstemp(
        prefix=f".{name}.", suffix=_UNFINISHED, dir=directory
    )
    try:
        with open(descriptor, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _take_permissions(written, 0o666, of=path)
        os.replace(written, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(written)
        raise
    sync_directory(directory)


def remove_unfinished(path: str) -> None:
    """Removes what killed processes left of `replacing(path)`; hold its lock."""
    directory, name = os.path.split(os.path.abspath(path))
    pattern = f".{glob.escape(name)}.????????{_UNFINISHED}"
    for left in glob.glob(pattern, root_dir=directory):
        os.remove(os.path.join(directory, left))


def remove_tree(path: str) -> None:
    """Removes a directory, which is never seen in part: its name goes first.

    A process that is killed meanwhile leaves it with `DELETED` behind its name. Of a
    link to a directory only the link is removed.
    """
    gone = path if path.endswith(DELETED) else f"{path}{DELETED}"
    if gone != path:
        if os.path.lexists(gone):
            remove_tree(gone)
        os.rename(path, gone)
    if os.path.islink(gone):
        os.remove(gone)
    else:
        shutil.rmtree(gone)


@contextlib.contextmanager
def new_directory(path: str) -> Iterator[str]:
    """A directory to write into that becomes `path` when the block ends without error.

    Its files are on the disk before it has that name.

    Raises:
      UserError: if `path` is no directory or not empty, before the block or after it.
    """
    absolute = os.path.abspath(path)
    _check_is_free(absolute)
    parent, name = os.path.split(absolute)
    os.makedirs(parent, exist_ok=True)
    written = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    try:
        yield written
        sync_tree(written)
        _take_permissions(written, 0o777, of=absolute)
        _check_is_free(absolute)
        os.rename(written, absolute)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise
    sync_directory(parent)


def _check_is_free(path):
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise UserError(f"{path} is not an empty directory; choose another.")


def sync_directory(path: str) -> None:
    """Returns when the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: str) -> None:
    """Returns when all files below `path`, and their names, are on the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(folder)


def writable_directory(path: str, what: str) -> str:
    """The absolute path of a directory, created and known to be writable.

    Raises:
      UserError: if it cannot be created or written; `what` names it. Before any work
        is lost.
    """
    absolute = os.path.abspath(os.path.expanduser(path))
    try:
        os.makedirs(absolute, exist_ok=True)
        with tempfile.TemporaryFile(dir=absolute):
            pass
    except OSError as error:
        raise UserError(
            f"{what} {path!r} ({absolute}) cannot be written: {error.strerror}. "
            "Choose a directory that you may write to."
        ) from error
    return absolute


def _take_permissions(written, usual, *, of):
    """Those of `of` if it is there, else the usual; a temporary file is private."""
    try:
        permissions = stat.S_IMODE(os.stat(of).st_mode)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        permissions = usual & ~mask
    os.chmod(written, permissions)
