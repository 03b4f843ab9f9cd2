"""A tensor in a file, and how its bytes are brought into memory."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import brief, quoted
from vit22b_transfer.weights.mapping import SHOWN, num_bytes

GET_AGAIN = (
    "The download was gated or cut off: accept the model's terms where it is "
    "published, and fetch the file again."
)
_MAX_FOLD = 16


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `read()` brings it into memory, `read(i)` its i-th slice."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str
    read: Callable[..., np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return num_bytes(self.shape, self.dtype)


def is_shape(value: Any) -> bool:
    """Whether a list or tuple from outside is the shape of an array of NumPy's.

    That has at most 32 axes here, and less than 2^56 elements even without its axes of
    size zero, so that NumPy can count their bytes.
    """
    return (
        isinstance(value, list | tuple)
        and len(value) <= 32
        and all(type(size) is int and 0 <= size < 2**56 for size in value)
        and math.prod(size or 1 for size in value) < 2**56
    )


def listed(names: Sequence[str]) -> str:
    """Names of files as a message lists them: the first, and how many more."""
    shown = ", ".join(map(brief, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def check_name(path: str, name: str) -> None:
    """Raises UserError for what is no name of a tensor: it is printed and compared."""
    if not name.isprintable() or len(name) > 1000:
        raise UserError(
            f"{path}: a tensor is called {quoted(name)}, {len(name)} "
            "characters; expected are at most 1000 that can be printed."
        )


def check_inflated(path: str, stored: int, needed: int) -> None:
    """Raises UserError if what is compressed takes far more memory than its files.

    Weights hardly compress: float32 of bfloat16 numbers is halved. Zeros do, such as
    the optimizer's state at the first step, which is up to four times as large as the
    parameters. So all arrays may take 16 times the bytes of all files, beyond the first
    64 MiB.

    stored: bytes of all files. needed: of all arrays in memory.
    """
    if needed > _MAX_FOLD * stored + (64 << 20):
        raise UserError(
            f"{path} has {stored} bytes, but its arrays would take {needed} in memory, "
            f"more than {_MAX_FOLD} times as many: it holds no weights. {GET_AGAIN}"
        )


def read_bytes(file: Any, path: str, count: int) -> np.ndarray:
    """The next `count` bytes; a file that ends before is a UserError."""
    buffer = np.empty(count, np.uint8)
    view, done = memoryview(buffer.data), 0
    while done < count:
        read = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not read:
            raise UserError(f"{path} ended {count - done} bytes early. {GET_AGAIN}")
        done += read
    return buffer


def plain_reader(
    path: str, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[..., np.ndarray]:
    """Reads a tensor, or one slice of it, that lies plainly in a file."""

    def read(layer: int | None = None) -> np.ndarray:
        start, part = offset, shape
        if layer is not None:
            part = shape[1:]
            start += layer * num_bytes(part, dtype)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            data = read_bytes(file, path, num_bytes(part, dtype))
        return data.view(dtype).reshape(part)

    return read


def refuse_other_content(path: str) -> None:
    """Raises UserError for what is downloaded in place of weights."""
    if not os.path.isfile(path):  # a pipe would be waited for without end
        raise UserError(f"{path} is no plain file. {GET_AGAIN}")
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if not start:
        raise UserError(f"{path} is empty. {GET_AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a pointer of git-lfs, not the weights; run `git lfs pull` in "
            "its repository."
        )
    # The length that begins a safetensors file has zeros, whatever its first byte is.
    if b"\0" not in start[:8] and text.startswith(
        (b"<", b"{", b"access ", b"invalid ", b"entry not", b"not found")
    ):
        shown = start[:80].decode("utf-8", "replace").split("\n")[0]
        raise UserError(f"{path} is a text ({shown!r}), not weights. {GET_AGAIN}")
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise UserError(
            f"{path} is a pickle whatever its name says; it is not opened. Take a real "
            ".safetensors or .npz file."
        )
