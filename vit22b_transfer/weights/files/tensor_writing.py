"""Writing safetensors and npz, one tensor at a time, with the header known before."""

import dataclasses
import json
import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from vit22b_transfer.weights.files import blocks
from vit22b_transfer.weights.files.safetensors_files import SAFETENSORS_DTYPES
from vit22b_transfer.weights.mapping import Shape, num_bytes

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn has come to be written."""

    name: str
    shape: Shape
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in memory and in a file."""
        return num_bytes(self.shape, self.dtype)

    def array(self) -> np.ndarray:
        """The values, in this shape and dtype."""
        array = self.make()
        assert array.shape == self.shape and array.dtype == self.dtype, self.name
        return array


def write_safetensors(
    folder: str,
    tensors: Sequence[LazyTensor],
    *,
    max_shard_bytes: int,
    done: Callable[[int], None],
) -> None:
    """Writes `model.safetensors`, or shards and their index if that is too large.

    done: called with the number of bytes after each tensor.
    """
    shards: list[list[LazyTensor]] = [[]]
    for tensor in tensors:
        size = sum(other.nbytes for other in shards[-1])
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        _write_shard(os.path.join(folder, "model.safetensors"), tensors, done)
        return
    places = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(os.path.join(folder, name), shard, done)
        places |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    path = os.path.join(folder, "model.safetensors.index.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(index, file, indent=2)


def _write_shard(
    path: str, tensors: Sequence[LazyTensor], done: Callable[[int], None]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for block in _blocks(tensor.array()):
                file.write(block.reshape(-1).view(np.uint8).data)
            done(tensor.nbytes)


def write_npz(
    path: str, tensors: Sequence[LazyTensor], *, done: Callable[[int], None]
) -> None:
    """Writes an archive that `numpy.load` reads without pickle."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for tensor in tensors:
            # NumPy has no name for bfloat16: it saves two bytes of anything.
            plain = tensor.dtype != np.dtype(ml_dtypes.bfloat16)
            header = {
                "descr": tensor.dtype.str if plain else "|V2",
                "fortran_order": False,
                "shape": tensor.shape,
            }
            member = f"{tensor.name}.npy"
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for block in _blocks(tensor.array()):
                    file.write(block.reshape(-1).view(np.uint8).data)
            done(tensor.nbytes)


def _blocks(array: np.ndarray):
    """Contiguous pieces of an array, in C order."""
    # They are cut along the first axes only, so they follow each other in C order.
    shape = blocks.block_shape(array.shape, array.dtype.itemsize)
    for region in blocks.regions(array.shape, shape):
        yield blocks.contiguous(array[region])
