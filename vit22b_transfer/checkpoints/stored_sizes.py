"""How large an array may say its chunks are, by the bytes of its files.

TensorStore takes the memory of a whole chunk before it reads one, and ends the process
where there is not enough. So what the metadata says is compared with the files first.
What an array as a whole may be is for those to say who want it: T5X leaves out chunks
of zeros, so its files may have any size.
"""

import math
import os
from collections.abc import Sequence

from vit22b_transfer import UserError

# Deflate makes at most 1032 bytes of one; zeros are what it does that for.
_FOLD = 1_032
# Whatever the files have.
_FREE = 64 << 20


def of_directory(path: str) -> int:
    """Bytes of all files below a directory."""
    total = 0
    for folder, _, names in os.walk(path):
        total += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
    return total


def check_chunk(
    shape: Sequence[int], chunk: Sequence[int], itemsize: int, stored: int
) -> None:
    """Raises UserError if no chunk of these sizes can be in the files of an array.

    stored: bytes of these files, of one array or of many.
    """
    nbytes = math.prod(chunk) * itemsize
    if nbytes > _FOLD * stored + _FREE or (
        nbytes > _FREE and math.prod(chunk) > math.prod(shape)
    ):
        raise UserError(
            f"its chunks are {tuple(chunk)}, {nbytes} bytes each, of an array of shape "
            f"{tuple(shape)} in files of {stored} bytes"
        )
