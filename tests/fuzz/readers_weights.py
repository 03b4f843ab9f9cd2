"""Readers of weights: every file format, and the configurations of every family.

The files are the smallest that a reader takes for whole: of most families, what our own
table says for a config of a tiny model.
"""

import dataclasses
import functools
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import tiny_weights
from flax import traverse_util
from harness import Reader
from hostile_files import PROCESSOR

from vit22b_transfer.checkpoints import identity, legacy, reading, restoring
from vit22b_transfer.commands import weights as command
from vit22b_transfer.weights import companions, convert, export, import_plan, sources
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
TYPES = {name: (x.shape, x.dtype) for name, x in ARRAYS.items()}
RECORD = {
    "lora": {"alpha": 16.0},
    "vocabularies": {"input_vocabulary": {"class": "x", "size": 1, "sha256": "0"}},
    "window": {"['loss'].total": 1.5, "['loss'].count": [1, 2]},
    "tower": {"checkpoint": "/none", "digest": "0"},
}


def readers() -> list[Reader]:
    formats = [
        Reader("safetensors", tiny_weights.safetensors, all_tensors),
        Reader("shards", tiny_weights.shards, all_tensors),
        Reader("npz", tiny_weights.npz, all_tensors, share=2),
        Reader("orbax", checkpoint, all_tensors, share=0.5),
        Reader("checkpoint", checkpoint, whole_checkpoint, share=0.2),
        Reader("legacy", tiny_weights.legacy, legacy_arrays),
        Reader("run record", checkpoint, record, damage="*/run/metadata"),
        Reader("adapter", tiny_weights.adapter, open_adapter),
        Reader("import again", interrupted, import_again, share=0.05),
        Reader("export", imported, export_again, share=0.05),
        Reader("import", resized_source, import_resized, share=0.05),
        Reader("import with adapter", model_and_adapter, import_both, share=0.05),
        Reader("t5x-t5", tiny_weights.t5x, planned_legacy, share=0.2),
    ]
    families = [
        Reader(name, make, planned) for name, make in tiny_weights.SOURCES.items()
    ]
    return formats + families


def all_tensors(folder: str) -> None:
    """As `vit22b inspect --stats`."""
    for tensor in tensor_files.open_tensors(folder).values():
        tensor.read()
        if tensor.shape:
            tensor.read(0)


def planned(folder: str, opener=tensor_files.open_tensors, **options) -> None:
    """What `vit22b import` does before it writes."""
    source = sources.open_source(folder, FAMILIES, None, opener)
    part = import_plan.plan_part(source, import_plan.ImportOptions(**options))
    import_plan.origin([part], import_plan.ImportOptions(), None)
    companions.model_gin([part], "/out", {})
    list(convert._facts(part))


def planned_legacy(folder: str) -> None:
    path = os.path.join(folder, "checkpoint_5")
    source = sources.open_source(path, FAMILIES, "t5x-t5", command._open_tensors)
    import_plan.plan_part(source, import_plan.ImportOptions())


# --- Checkpoints ---


def write_checkpoint(folder: str) -> CheckpointOutput:
    """One of ours, not finished."""
    output = CheckpointOutput(folder, TYPES, "fuzz")
    for name, array in ARRAYS.items():
        output.write(Slot(name), array, name)
    return output


def checkpoint(folder: str) -> None:
    """One of ours, with the record of a run."""
    output = write_checkpoint(folder)
    output.write_record({key: x for key, x in RECORD.items() if key != "tower"})
    output.finish()


def whole_checkpoint(folder: str) -> None:
    """As a run that starts from it."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
        for name, x in ARRAYS.items()
    }
    tree = traverse_util.unflatten_dict(abstract, sep="/")
    restoring.restore_partial(reading.resolve(folder), tree)


def record(folder: str) -> None:
    """All that asks for what a checkpoint's arrays do not tell."""
    path = reading.resolve(folder)
    reading.is_ours(path)
    merging.lora_alpha(folder, None if reading.read_record(path).get("lora") else 1.0)
    for said in reading.read_record(path).get("vocabularies", {}).values():
        identity._describe(said)
    reading.saved_arrays(path)


def legacy_arrays(folder: str) -> None:
    path = os.path.join(folder, "checkpoint_5")
    for name, array in legacy.saved_arrays(path).items():
        legacy.read_array(path, name)
        if array.shape:
            legacy.read_array(path, name, 0)


# --- Imports and exports ---


def interrupted(folder: str) -> None:
    write_checkpoint(folder)


def import_again(folder: str) -> None:
    """Goes on with an interrupted import, in a copy of the folder."""
    copy = os.path.join(folder, "copy")
    shutil.copytree(
        os.path.join(folder, "checkpoint_0.importing"),
        os.path.join(copy, "checkpoint_0.importing"),
    )
    output = CheckpointOutput(copy, TYPES, "fuzz")
    for name, array in ARRAYS.items():
        if not output.has(Slot(name)):
            output.write(Slot(name), array, name)
    output.finish()
    found = tensor_files.open_tensors(copy)
    for name, array in ARRAYS.items():
        assert found[f"target/{name}"].read().tobytes() == array.tobytes()


def resized_source(folder: str) -> None:
    """CLIP with an image processor that names a shorter side."""
    tiny_weights.SOURCES["hf-clip"](folder)
    processor = PROCESSOR | {"size": {"shortest_edge": 20}}
    tiny_weights.write_json(folder, "preprocessor_config.json", processor)


def import_all(folder: str, *names: str, adapter=None, **options) -> None:
    convert.import_weights(
        [os.path.join(folder, name) for name in names],
        os.path.join(folder, "out"),
        FAMILIES,
        options=import_plan.ImportOptions(**options),
        adapter=adapter,
    )


def import_resized(folder: str) -> None:
    import_all(folder, "", image_size=(24, 24))


def imported(folder: str) -> None:
    source = os.path.join(folder, "source")
    os.mkdir(source)
    tiny_weights.SOURCES["hf-clip"](source)
    import_all(folder, "source")
    shutil.rmtree(source)


def export_again(folder: str) -> None:
    out = os.path.join(folder, "out")
    to = os.path.join(folder, "exported")
    export.export_weights(out, to, FAMILIES, family="hf-clip")


def open_adapter(folder: str) -> None:
    adapter = peft_adapters.open_adapter(folder)
    for pair in adapter.pairs.values():
        for tensor in pair.values():
            tensor.read()


def model_and_adapter(folder: str) -> None:
    for name in ("model", "adapter"):
        os.mkdir(os.path.join(folder, name))
    tiny_weights.SOURCES["hf-vit"](os.path.join(folder, "model"))
    tiny_weights.adapter(os.path.join(folder, "adapter"))


def import_both(folder: str) -> None:
    adapter = peft_adapters.open_adapter(os.path.join(folder, "adapter"))
    import_all(folder, "model", adapter=adapter)
    Path(folder, "out", "model.gin").read_text()
