"""Checkpoints of T5X before Orbax: a msgpack index, and a zarr directory per array.

`checkpoint_<step>/checkpoint` holds `{'version', 'optimizer': {'target', 'state'}}`.
Its leaves are small arrays, or tensorstore specs of directories beside it, named with
dots for slashes (`target.encoder.pos_embed`). The first T5X versions with Orbax wrote
`checkpoint_<step>/state/checkpoint` instead: the tree alone, and for an array the text
`PLACEHOLDER://target.encoder.pos_embed`. Reading either needs no T5X and runs no code
from it: of a spec only the path is used, and that must lie inside the checkpoint.
"""

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import serialization, traverse_util

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import stored_sizes
from vit22b_transfer.host import memory_limit
from vit22b_transfer.host.file_errors import brief, damaged, quoted

Tree = Any

# What reading arrays raises for damage. What a device raises while they are read onto
# it, a RuntimeError, is none.
UNREADABLE = (
    *(ValueError, LookupError, OSError, EOFError),
    *(RecursionError, NotImplementedError, OverflowError),
)
_VERSIONS = (2, 3)
_PLACEHOLDER = "PLACEHOLDER://"
_SHOWN = 20
_THREADS = 16
# Host memory of all reads at a time; a single larger shard is read alone.
_BYTES_IN_FLIGHT = 1 << 32
# Chunks that several shards need are decoded once, if they are read at about one time.
_CACHED_BYTES = 1 << 30
# An entry of the index takes 300 bytes, so this is room for 25,000 arrays. A damaged
# one becomes objects of up to 65 times its size.
_INDEX_BYTES = 8 << 20
# What describes an array takes 300 bytes too.
_METADATA_BYTES = 1 << 20
_ADVICE = "Copy the checkpoint again."


@dataclasses.dataclass(frozen=True)
class _SavedArray:
    """An array in the index itself, or an open store. The dtype may be of its bits."""

    shape: tuple[int, ...]
    dtype: np.dtype
    content: Any


def is_legacy(path: str) -> bool:
    """Whether `path` is a checkpoint that this module reads."""
    return _index_file(path) is not None


def saved_arrays(path: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array in a checkpoint, by '/'-joined name.

    Raises:
      UserError: if the index or an array is damaged, missing or of unknown format.
    """
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, array in _open(path).items()
    }


def read_arrays(path: str, abstract: Tree) -> Tree:
    """The arrays of `abstract`, in its dtypes and shardings; shapes are not checked.

    Every shard is read on its own, straight to its devices, many at a time within a
    limit of host memory.

    Raises:
      UserError: naming an array that cannot be read.
    """
    flat = traverse_util.flatten_dict(abstract, sep="/", keep_empty_nodes=True)
    wanted = {
        name: leaf
        for name, leaf in flat.items()
        if leaf is not traverse_util.empty_node
    }
    saved = _open(path, wanted)
    memory = memory_limit.MemoryLimit(_BYTES_IN_FLIGHT)
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
    try:
        shards = {
            name: [
                pool.submit(_read_shard, saved[name], index, devices, leaf, memory)
                for index, devices in _shards(leaf)
            ]
            for name, leaf in wanted.items()
        }
        read = {}
        for name, futures in shards.items():
            with damaged(f"checkpoint {path}: {name}", _ADVICE, UNREADABLE):
                parts = [part for future in futures for part in future.result()]
            leaf = wanted[name]
            read[name] = jax.make_array_from_single_device_arrays(
                leaf.shape, leaf.sharding, parts, dtype=leaf.dtype
            )
    finally:
        pool.shutdown(cancel_futures=True)
    return traverse_util.unflatten_dict(flat | read, sep="/")


def read_array(path: str, name: str, layer: int | None = None) -> np.ndarray:
    """One array, or one slice of its first axis, on the host and in its own dtype."""
    saved = _open(path, (name,))[name]
    with damaged(f"checkpoint {path}: {name}", _ADVICE, UNREADABLE):
        part = saved.content if layer is None else saved.content[layer]
        if not isinstance(part, np.ndarray | np.generic):
            part = part.read().result()
    part = np.asarray(part)
    return part if part.dtype == saved.dtype else part.view(saved.dtype)


# --- The index ---


def _index_file(path):
    file = os.path.join(path, "checkpoint")
    if os.path.isfile(file):
        return file
    # Beside `_METADATA` or an OCDBT database, Orbax reads it itself, or nobody does.
    state = os.path.join(path, "state")
    others = ("_METADATA", "manifest.ocdbt")
    file = os.path.join(state, "checkpoint")
    if os.path.isfile(file) and not any(
        os.path.exists(os.path.join(state, name)) for name in others
    ):
        return file
    return None


def _read_index(path):
    """(directory of the arrays, version, leaves by '/'-joined name)."""
    file = _index_file(path)
    if file is None:
        raise UserError(f"checkpoint {path}: it is no legacy T5X checkpoint.")
    with open(file, "rb") as stream:
        content = stream.read(_INDEX_BYTES + 1)
    if len(content) > _INDEX_BYTES:
        raise UserError(
            f"checkpoint {path}: the file {file} has more than {_INDEX_BYTES} bytes, "
            f"too many for an index of arrays. {_ADVICE}"
        )
    if content.startswith(b"model_checkpoint_path"):
        raise UserError(
            f"checkpoint {path}: this is a TensorFlow checkpoint. Convert it with "
            "T5X's convert_tf_checkpoint first."
        )
    what = f"the file {file} ({len(content)} bytes) is damaged or cut off: it"
    with damaged(f"checkpoint {path}: {what}", _ADVICE):
        tree = serialization.msgpack_restore(content)
    version = tree.get("version") if isinstance(tree, dict) else None
    if version is None and os.path.basename(os.path.dirname(file)) == "state":
        version, tree = max(_VERSIONS), {"optimizer": tree}
    known = type(version) is int and version in _VERSIONS
    if not known or not isinstance(tree.get("optimizer"), dict):
        raise UserError(
            f"checkpoint {path}: the file {file} is of version {brief(version)}; "
            f"readable are versions {' and '.join(map(str, _VERSIONS))} with an "
            "'optimizer' inside."
        )
    with damaged(f"checkpoint {path}: the file {file}", _ADVICE):
        leaves = dict(_leaves(tree["optimizer"]))
    return os.path.dirname(file), version, leaves


def _leaves(tree, prefix="") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or not name.isprintable() or len(name) > 1000:
            raise ValueError(f"an array is called {name[:100]!r}")
        if isinstance(value, dict) and not {"driver", "kvstore"} <= set(value):
            yield from _leaves(value, f"{name}/")
        # None stands for the state of a parameter that no optimizer trains.
        elif value is not None:
            yield name, value


# --- Arrays ---


def _open(path, names: Collection[str] | None = None) -> dict[str, _SavedArray]:
    """The arrays, or those called `names`, opened and not yet read."""
    root, version, leaves = _read_index(path)
    if names is not None:
        if gone := [name for name in names if name not in leaves]:
            raise UserError(f"checkpoint {path} has no {', '.join(gone[:_SHOWN])}.")
        leaves = {name: leaves[name] for name in names}
    context = ts.Context(
        {
            "cache_pool": {"total_bytes_limit": _CACHED_BYTES},
            "file_io_concurrency": {"limit": 128},
        }
    )
    arrays, opening, problems = {}, {}, []
    for name, leaf in leaves.items():
        try:
            with damaged("it", _ADVICE):
                relative = _relative_path(leaf)
                if relative is None:
                    arrays[name] = _indexed(leaf)
                else:
                    spec = _spec(root, relative)
                    opening[name] = ts.open(spec, context=context, read=True)
        except UserError as error:
            problems.append(f"{name}: {error}")
    for name, future in opening.items():
        try:
            with damaged("it", _ADVICE):
                arrays[name] = _opened(future.result(), leaves[name], version)
        except UserError as error:
            problems.append(f"{name}: {error}")
    if problems:
        rest = len(problems) - _SHOWN
        more = [f"and {rest} more"] if rest > 0 else []
        lines = "\n  ".join(problems[:_SHOWN] + more)
        raise UserError(f"checkpoint {path} is incomplete or damaged:\n  {lines}")
    return {name: arrays[name] for name in leaves}


def _indexed(leaf) -> _SavedArray:
    value = np.asarray(leaf, np.int32 if isinstance(leaf, int) else None)
    # Of kind V is bfloat16, and what has no fields.
    if value.dtype.kind not in "biufV" or value.dtype.names or value.dtype.hasobject:
        raise UserError(f"its entry in the index has the dtype {value.dtype}")
    return _SavedArray(value.shape, value.dtype, value)


def _relative_path(leaf) -> str | None:
    """Where the array of a leaf lies; None if the leaf is the array."""
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        return leaf.removeprefix(_PLACEHOLDER)
    if isinstance(leaf, Mapping):
        if leaf["driver"] != "zarr" or not isinstance(leaf["kvstore"], Mapping):
            raise UserError(
                f"stored by {quoted(leaf['driver'])}; only zarr is readable"
            )
        # Older tensorstores wrote the path outside of the store's own part.
        path = leaf["kvstore"].get("path", leaf.get("path"))
        if not isinstance(path, str):
            raise UserError("its entry in the index has no path")
        if len(path) > 1000:
            raise UserError(f"its path in the index has {len(path)} characters")
        return path
    if isinstance(leaf, np.ndarray | np.generic | int | float):
        return None
    raise UserError(f"its entry in the index is a {type(leaf).__name__}")


def _spec(root, relative):
    # Buckets and drivers of where it was written mean nothing here.
    root = os.path.realpath(root)
    directory = os.path.realpath(os.path.join(root, relative))
    if not directory.startswith(root + os.sep):
        raise UserError(f"{brief(relative)!r} leads out of the checkpoint's directory")
    if not os.path.isdir(directory):
        raise UserError(f"the directory {directory} is missing")
    metadata = os.path.join(directory, ".zarray")
    if not os.path.isfile(metadata):
        raise UserError(
            f"{directory} has no .zarray; some ways to copy leave out hidden files"
        )
    if os.path.getsize(metadata) > _METADATA_BYTES:
        raise UserError(f"{metadata} has more than {_METADATA_BYTES} bytes")
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": directory + "/"}}


def _opened(store, leaf, version):
    shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
    indexed = leaf.get("metadata", {}) if isinstance(leaf, Mapping) else {}
    expected = indexed.get("shape", shape) if isinstance(indexed, Mapping) else None
    if not isinstance(expected, list | tuple) or shape != tuple(expected):
        shown = brief(tuple(expected) if isinstance(expected, list) else expected)
        raise UserError(f"the array has shape {shape}, the index says {shown}")
    stored = stored_sizes.of_directory(store.kvstore.path)
    chunk = store.chunk_layout.read_chunk.shape or shape
    stored_sizes.check_chunk(shape, chunk, dtype.itemsize, stored)
    if version < 3 and dtype == np.uint16:
        dtype = np.dtype(jnp.bfloat16)  # version 2 stored its bits
    return _SavedArray(shape, dtype, store)


def _shards(leaf):
    """(index, devices of this process that hold it) of each different shard."""
    shards = {}
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    for device, index in indices.items():
        bounds = tuple(
            slice_.indices(size)[:2]
            for slice_, size in zip(index, leaf.shape, strict=True)
        )
        shards.setdefault(bounds, []).append(device)
    for bounds, devices in shards.items():
        yield tuple(slice(start, stop) for start, stop in bounds), devices


def _read_shard(saved, index, devices, leaf, memory):
    size = math.prod(slice_.stop - slice_.start for slice_ in index)
    with memory.holding(size * (saved.dtype.itemsize + leaf.dtype.itemsize)):
        part = saved.content[index]
        if not isinstance(part, np.ndarray | np.generic):
            part = part.read().result()
        if part.dtype != saved.dtype:
            part = part.view(saved.dtype)
        part = np.asarray(part.astype(leaf.dtype, copy=False))
        return jax.block_until_ready([jax.device_put(part, d) for d in devices])
