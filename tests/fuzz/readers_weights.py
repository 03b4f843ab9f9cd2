"""Readers of weights: every file format, and the configurations of every family.

The files are the smallest that a reader takes for whole: of most families, what our own
table says for a config of a tiny model.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tiny_weights
from harness import Reader

from vit22b_transfer.checkpoints import legacy, reading
from vit22b_transfer.weights import companions, convert, import_plan, sources
from vit22b_transfer.weights.adapters import merging, peft_adapters
from vit22b_transfer.weights.families import table
from vit22b_transfer.weights.files import tensor_files
from vit22b_transfer.weights.files.checkpoint_output import CheckpointOutput
from vit22b_transfer.weights.mapping import Slot

# Shapes are traced once for a configuration: most cases leave the sizes as they are.
FAMILIES = tuple(
    dataclasses.replace(family, shapes=functools.lru_cache(256)(family.shapes))
    for family in table.FAMILIES
)
ARRAYS = {
    "encoder/tower/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "encoder/tower/scale": np.ones(4, np.float16),
}


def readers() -> list[Reader]:
    formats = [
        Reader("safetensors", tiny_weights.safetensors, all_tensors),
        Reader("shards", tiny_weights.shards, all_tensors),
        Reader("npz", tiny_weights.npz, all_tensors, share=2),
        Reader("orbax", checkpoint, all_tensors, share=0.5),
        Reader("checkpoint", checkpoint, whole_checkpoint, share=0.2),
        Reader("legacy", tiny_weights.legacy, legacy_arrays),
        Reader("run record", checkpoint, record, share=0.5),
        Reader("adapter", tiny_weights.adapter, peft_adapters.open_adapter),
    ]
    families = [
        Reader(name, functools.partial(tiny_weights.source, name), planned)
        for name in tiny_weights.SOURCES
    ]
    return formats + families


def all_tensors(folder: str) -> None:
    """As `vit22b inspect --stats`."""
    for tensor in tensor_files.open_tensors(folder).values():
        tensor.read()
        if tensor.shape:
            tensor.read(0)


def planned(folder: str) -> None:
    """What `vit22b import` does before it writes."""
    source = sources.open_source(folder, FAMILIES)
    part = import_plan.plan_part(source, import_plan.ImportOptions())
    import_plan.origin([part], import_plan.ImportOptions(), None)
    companions.model_gin([part], "/out", {})
    list(convert._facts(part))


# --- Checkpoints ---


def checkpoint(folder: str) -> None:
    """One of ours, with the record of a run."""
    arrays = {name: (x.shape, x.dtype) for name, x in ARRAYS.items()}
    output = CheckpointOutput(folder, arrays, "fuzz")
    for name, array in ARRAYS.items():
        output.write(Slot(name), array, name)
    output.write_record(
        {
            "lora": {"alpha": 16.0},
            "vocabularies": {
                "input_vocabulary": {"class": "x", "size": 1, "sha256": "0"}
            },
        }
    )
    output.finish()


def whole_checkpoint(folder: str) -> None:
    """As a run that starts from it."""
    import jax

    path = reading.resolve(folder)
    saved = reading.saved_arrays(path)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
        for name, x in ARRAYS.items()
    }
    from vit22b_transfer.checkpoints import restoring

    del saved
    restoring.restore_partial(path, nested(abstract))


def nested(flat: Mapping[str, Any]) -> Any:
    from flax import traverse_util

    return traverse_util.unflatten_dict(dict(flat), sep="/")


def record(folder: str) -> None:
    """All that asks for what a checkpoint's arrays do not tell."""
    path = reading.resolve(folder)
    reading.is_ours(path)
    merging.lora_alpha(folder, None)
    reading.read_record(path)


def legacy_arrays(folder: str) -> None:
    path = os.path.join(folder, "checkpoint_5")
    for name, array in legacy.saved_arrays(path).items():
        legacy.read_array(path, name)
        if array.shape:
            legacy.read_array(path, name, 0)
