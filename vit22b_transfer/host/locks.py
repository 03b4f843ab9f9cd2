"""One process at a time writes in one place: a lock that a killed process gives back.

The lock is the kernel's (flock) on a file beside or in what is written, so it is gone
with its process, however that ended; the file itself may stay and means nothing. Over
NFS and Lustre's `-o flock` it holds between hosts. Where a file system has no locks the
run goes on without, and says so: to refuse would end all work there, for the sake of a
second start by mistake.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files

# What flock says where there are no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
# A lock file says little; what is longer is not one.
_MAX_BYTES = 4096


def lock_file(place: str) -> str:
    """Where the lock of a place lies: in a directory, beside a file."""
    return os.path.join(place, ".lock") if os.path.isdir(place) else f"{place}.lock"


@contextlib.contextmanager
def held(place: str) -> Iterator[None]:
    """Nobody else holds `place`, a directory or a file to be, while this is entered.

    Of several processes of one run only the first may ask for it.

    Raises:
      UserError: saying which process on which host holds it since when.
    """
    path = lock_file(place)
    file = _locked(path, place)
    try:
        yield
    finally:
        try:
            # While it is held: who has it open already finds another one at its name.
            with contextlib.suppress(OSError):
                os.remove(path)
        finally:
            os.close(file)


def _locked(path: str, place: str) -> int:
    """The open lock file, locked and with our name in it."""
    while True:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(path, flags, 0o666)
        except OSError as error:
            raise UserError(
                f"{path}, which keeps other runs out, cannot be opened: "
                f"{error.strerror}. Choose a directory that you may write to, or "
                "remove that file."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            os.close(file)
            who = "another process" if holder is None else "process {1} on {0}"
            since = "" if holder is None else f" since {holder[2]}"
            raise UserError(
                f"{place} is in use: {who.format(*holder or ())} has been writing "
                f"there{since or ' for a moment'}. Wait for it or stop it, or choose "
                "another place."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                raise
            _note(
                f"the file system of {place} has no locks ({error.strerror}): make "
                "sure that no other run writes there"
            )
        if _is_at(file, path):
            break
        os.close(file)  # the one before removed it when it ended
    left = _holder(file)
    if left is not None and left[0] != socket.gethostname():
        _note(
            f"process {left[1]} on {left[0]}, which began to write to {place} at "
            f"{left[2]}, did not end by itself. If it still runs, stop it: then the "
            "locks of this file system do not reach from host to host"
        )
    with contextlib.suppress(OSError):  # on a full disk it holds without a name
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_ourselves()).encode(), 0)
    return file


def _is_at(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _ourselves() -> dict[str, str | int]:
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _holder(file: int) -> tuple[str, int, str] | None:
    """Host, process and time in a lock file; None if it does not say."""
    content = os.pread(file, _MAX_BYTES, 0)
    try:
        found = json_files.parse(content, "lock")
    except UserError:
        return None
    if not isinstance(found, dict):
        return None
    host, pid, since = (found.get(name) for name in ("host", "pid", "since"))
    texts = [text for text in (host, since) if isinstance(text, str)]
    # Shown as it is, so that nothing else in the file may reach a terminal.
    if len(texts) < 2 or type(pid) is not int or not all(map(_is_plain, texts)):
        return None
    return texts[0], pid, texts[1]


def _is_plain(text: str) -> bool:
    return text.isprintable() and 0 < len(text) <= 255


def _note(text: str) -> None:
    print(f"vit22b: note: {text}.", file=sys.stderr)
