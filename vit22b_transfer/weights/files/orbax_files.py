"""Checkpoints in Orbax's format, ours and T5X's, read array by array."""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.weights.files.stored_tensors import StoredTensor, json_object


def orbax_directory(path: str) -> str | None:
    """The directory of the arrays: `path`, its `state`, or its latest checkpoint's."""
    for candidate in (path, os.path.join(path, "state")):
        if os.path.isfile(os.path.join(candidate, "_METADATA")):
            return candidate
    for step in reversed(reading.complete_steps(path)):
        state = os.path.join(reading.checkpoint_path(path, step), "state")
        if os.path.isfile(os.path.join(state, "_METADATA")):
            return state
    return None


def open_orbax(path: str) -> dict[str, StoredTensor]:
    """The arrays of a checkpoint, unread; their names are '/'-joined paths."""
    import orbax.checkpoint as ocp
    import tensorstore

    handler = ocp.PyTreeCheckpointHandler()
    try:
        # type: Orbax declares its own Path, which this is.
        metadata = handler.metadata(pathlib.Path(path))  # type: ignore[arg-type]
    finally:
        handler.close()
    settings = json_object(os.path.join(path, "_METADATA"))
    tensors, context = {}, tensorstore.Context()
    for name, leaf in _leaves(metadata.tree, ()):
        shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
        reader = functools.partial(_read_zarr, path, name, settings, context)
        tensors["/".join(name)] = StoredTensor(shape, dtype, path, reader)
    return tensors


def _leaves(tree: Any, path: tuple[str, ...]):
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _leaves(child, (*path, str(name)))
    elif isinstance(tree, (list, tuple)):
        for i, child in enumerate(tree):
            yield from _leaves(child, (*path, str(i)))
    elif getattr(tree, "shape", None) is not None:
        yield path, tree


def _read_zarr(
    path: str,
    name: tuple[str, ...],
    settings: Mapping[str, Any],
    context: Any,
    layer: int | None = None,
) -> np.ndarray:
    import tensorstore

    driver = "zarr3" if settings.get("use_zarr3") else "zarr"
    joined = ".".join(name)
    if settings.get("use_ocdbt", True):
        kvstore = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{joined}/"}
    else:
        kvstore = {"driver": "file", "path": f"{path}/{joined}/"}
    try:
        array: Any = tensorstore.open(
            {"driver": driver, "kvstore": kvstore}, context=context
        ).result()
        return np.asarray((array if layer is None else array[layer]).read().result())
    except ValueError as error:
        raise UserError(
            f"{path}: {'/'.join(name)} cannot be read: {error}. Copy the checkpoint "
            "again."
        ) from error
