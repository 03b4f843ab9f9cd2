"""safetensors, single or in shards, read header first."""

import os
import struct
from typing import Any

import ml_dtypes
import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files
from vit22b_transfer.host.file_errors import brief, quoted
from vit22b_transfer.weights.files import config_values
from vit22b_transfer.weights.files.stored_tensors import (
    GET_AGAIN,
    StoredTensor,
    check_name,
    is_shape,
    listed,
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
# A tensor takes about 150 bytes of a header: its name, dtype, shape and two offsets. So
# this is room for 50,000; the largest published model has 92,000, in 163 files. The
# format's own limit is 100 MB, which take 2.2 GiB and a minute to read.
_MAX_HEADER = 8 << 20
# In all shards; half as many again as the largest published model has.
_MAX_TENSORS = 150_000
# Of weights, a header is a thousandth. Where tensors are tiny it may be more than they,
# but from here on a header that is larger than all of its tensors is none of weights.
_LARGE_HEADER = 1 << 20


def open_safetensors(path: str) -> dict[str, StoredTensor]:
    """The tensors of one file, unread; see `tensor_files.open_tensors`."""
    refuse_other_content(path)
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
                f"of {length} bytes and has {size} in all; a header has at most "
                f"{_MAX_HEADER}. {GET_AGAIN}"
            )
        if length > max(_LARGE_HEADER, size - 8 - length):
            raise UserError(
                f"{path} has a header of {length} bytes, more than the "
                f"{size - 8 - length} bytes of all its tensors: it holds no weights. "
                + GET_AGAIN
            )
        text = file.read(length)
    place = f"{path}, its header"
    header = json_files.parse(text, place, advice=GET_AGAIN, unique_names=True)
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header is not a JSON object. {GET_AGAIN}")
    config_values.check_text(header, path)
    return header, 8 + length


def _safetensors_entry(path: str, name: str, entry: Any):
    """(shape, dtype, (begin, end)) of one line of a header."""

    check_name(path, name)
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(at) is int and 0 <= at < 2**63 for at in offsets)
        or not is_shape(entry.get("shape"))
    ):
        raise UserError(
            f"{path}: the header's line for {name} is broken: {brief(entry)}. "
            + GET_AGAIN
        )
    said = entry.get("dtype")
    dtype = SAFETENSORS_DTYPES.get(said) if isinstance(said, str) else None
    if dtype is None:
        raise UserError(
            f"{path}: {name} has the unknown dtype {quoted(said)}; "
            f"known are {', '.join(SAFETENSORS_DTYPES)}."
        )
    return tuple(entry["shape"]), dtype, tuple(offsets)


def open_shards(index: str) -> dict[str, StoredTensor]:
    """The tensors of all files that a shard index names, unread."""
    folder, name = os.path.split(index)
    places = config_values.read_json(folder, name).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(shard, str) and shard == os.path.basename(shard)
        for shard in places.values()
    ):
        raise UserError(f"{index} has no weight_map of tensors to files beside it.")
    if len(places) > _MAX_TENSORS:
        raise UserError(
            f"{index} names {len(places)} tensors, more than the {_MAX_TENSORS} that a "
            "model may have."
        )
    shards = sorted(set(places.values()))
    gone = [name for name in shards if not os.path.isfile(os.path.join(folder, name))]
    if gone:
        raise UserError(
            f"{folder} lacks {len(gone)} of {len(shards)} shards: {listed(gone)}. "
            + GET_AGAIN
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        path = os.path.join(folder, shard)
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
