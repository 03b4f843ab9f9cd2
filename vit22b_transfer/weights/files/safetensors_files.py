"""safetensors, single or in shards, read header first."""

import json
import os
import struct
from typing import Any

import ml_dtypes
import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.weights.files.stored_tensors import (
    GET_AGAIN,
    StoredTensor,
    json_object,
    plain_reader,
    refuse_other_content,
)
from vit22b_transfer.weights.mapping import nearest, num_bytes

SAFETENSORS_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# The format's own limit; a larger header is a file of another kind.
_MAX_HEADER = 100_000_000


def open_safetensors(path: str) -> dict[str, StoredTensor]:
    """The tensors of one file, unread; see `tensor_files.open_tensors`."""
    header, start = _safetensors_header(path)
    size = os.path.getsize(path) - start
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, dtype, (begin, end) = _safetensors_entry(path, name, entry)
        if end - begin != num_bytes(shape, dtype):
            raise UserError(
                f"{path}: the header gives {name} {end - begin} bytes, but shape "
                f"{shape} of {dtype} takes {num_bytes(shape, dtype)}. {GET_AGAIN}"
            )
        if begin < 0 or end > size:
            raise UserError(
                f"{path}: {name} ends at byte {start + end}, but the file has only "
                f"{start + size}: it is truncated. {GET_AGAIN}"
            )
        spans.append((begin, end, name))
        reader = plain_reader(path, start + begin, shape, dtype)
        tensors[name] = StoredTensor(shape, dtype, path, reader)
    at, last = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin != at:
            said = "overlaps" if begin < at else "leaves a hole after"
            raise UserError(f"{path}: {name} {said} {last}. {GET_AGAIN}")
        at, last = end, name
    if at != size:
        raise UserError(
            f"{path}: {size - at} bytes after the last tensor belong to none. "
            + GET_AGAIN
        )
    return tensors


def _safetensors_header(path: str) -> tuple[dict[str, Any], int]:
    """The header and where the data begins."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise UserError(
                f"{path} is no safetensors file, or truncated: it announces a header "
                f"of {length} bytes and has {size} in all. {GET_AGAIN}"
            )
        text = file.read(length)

    def unique(pairs):
        found = {}
        for name, value in pairs:
            if name in found:
                raise UserError(f"{name} is there twice")
            found[name] = value
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise UserError(f"{path}: unreadable header: {error}. {GET_AGAIN}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header is not a JSON object. {GET_AGAIN}")
    return header, 8 + length


def _safetensors_entry(path: str, name: str, entry: Any):
    """(shape, dtype, (begin, end)) of one line of a header."""

    def is_sizes(value):
        return isinstance(value, list) and all(
            type(number) is int and number >= 0 for number in value
        )

    if (
        not isinstance(entry, dict)
        or not is_sizes(entry.get("shape"))
        or not is_sizes(entry.get("data_offsets"))
        or len(entry["data_offsets"]) != 2
    ):
        raise UserError(f"{path}: the header's line for {name} is broken: {entry!r}.")
    dtype = SAFETENSORS_DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise UserError(
            f"{path}: {name} has the unknown dtype {entry.get('dtype')!r}; known are "
            f"{', '.join(SAFETENSORS_DTYPES)}."
        )
    return tuple(entry["shape"]), dtype, tuple(entry["data_offsets"])


def open_shards(index: str) -> dict[str, StoredTensor]:
    """The tensors of all files that a shard index names, unread."""
    folder = os.path.dirname(index)
    places = json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(shard, str) and shard == os.path.basename(shard)
        for shard in places.values()
    ):
        raise UserError(f"{index} has no weight_map of tensors to files beside it.")
    shards = sorted(set(places.values()))
    gone = [name for name in shards if not os.path.isfile(os.path.join(folder, name))]
    if gone:
        raise UserError(
            f"{folder} lacks {len(gone)} of {len(shards)} shards: {', '.join(gone)}. "
            + GET_AGAIN
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        path = os.path.join(folder, shard)
        refuse_other_content(path)
        for name, tensor in open_safetensors(path).items():
            if name in tensors:
                raise UserError(
                    f"{name} is in two shards, {os.path.basename(tensors[name].file)} "
                    f"and {shard}; only one of them can be right. {GET_AGAIN}"
                )
            tensors[name] = tensor
            if places.get(name) != shard:
                raise UserError(
                    f"{name} lies in {shard}, but the index says "
                    f"{places.get(name, 'nothing of it')}. {GET_AGAIN}"
                )
    if lost := [name for name in places if name not in tensors]:
        raise UserError(
            f"{lost[0]} is not in {places[lost[0]]}, where the index says it is; "
            f"{nearest(lost[0], tensors)}. {GET_AGAIN}"
        )
    return tensors
