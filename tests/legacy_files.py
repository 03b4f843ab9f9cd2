"""Checkpoints as T5X wrote them before Orbax."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization, traverse_util


def write(folder: str | Path, arrays: dict[str, Any], **state: np.ndarray) -> Path:
    """`checkpoint_5` of parameters: a msgpack index, one zarr array per parameter.

    state: what the index says beside the step.
    """
    path = Path(folder, "checkpoint_5")
    path.mkdir()
    specs = {}
    for name, value in arrays.items():
        value = np.asarray(value)
        key = f"target.{name.replace('/', '.')}"
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": key}}
        (path / key).mkdir()
        metadata = {
            "zarr_format": 2,
            "shape": value.shape,
            "chunks": value.shape,
            "dtype": value.dtype.str,
            "compressor": None,
            "fill_value": None,
            "filters": None,
            "order": "C",
        }
        (path / key / ".zarray").write_text(json.dumps(metadata))
        (path / key / ".".join("0" * value.ndim)).write_bytes(value.tobytes())
        specs[name] = spec | {"metadata": {"shape": list(value.shape)}}
    tree = {
        "version": 3,
        "optimizer": {
            "target": traverse_util.unflatten_dict(specs, sep="/"),
            "state": {"step": np.int32(5)} | state,
        },
    }
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    return path
