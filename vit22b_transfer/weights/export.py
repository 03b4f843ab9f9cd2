"""Export: a checkpoint of ours in the format of a public family.

The sizes and the tensor names are those of a directory with the family's config.json:
the one that the import wrote (`OUT/FAMILY`), or one of the user's making. The values
are those of the checkpoint, in its dtype: import and then export gives all bytes back.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.host import whole_files
from vit22b_transfer.host.file_errors import brief, naming
from vit22b_transfer.host.progress import Progress, console
from vit22b_transfer.models import int8
from vit22b_transfer.weights import mapping, model_sizes, sources, transforms
from vit22b_transfer.weights.adapters import merging, peft_adapters
from vit22b_transfer.weights.companions import CARRIED, RECORD
from vit22b_transfer.weights.files import (
    blocks,
    config_values,
    tensor_files,
    tensor_writing,
)
from vit22b_transfer.weights.files.stored_tensors import (
    StoredTensor,
    check_name,
    is_shape,
)
from vit22b_transfer.weights.files.tensor_writing import LazyTensor
from vit22b_transfer.weights.mapping import SHOWN, Family, Model, Slot, Step

MAX_SHARD_BYTES = 5 * 10**9
_TARGET = "target/"
_LOGITS = "decoder/logits_dense/kernel"


def export_weights(
    checkpoint: str,
    out: str,
    families: Sequence[Family],
    *,
    family: str,
    config_folder: str | None = None,
    adapter: bool = False,
    alpha: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Writes the parameters of a checkpoint as `family` into `out`; lines to show.

    Low-rank updates are added to their kernels.

    config_folder: holds the config.json (and tokenizer files) of the family; by default
      the one beside the checkpoint that the import wrote.
    adapter: write the low-rank updates alone, in PEFT's format.
    alpha: of the updates, if the checkpoint does not say it.

    Raises:
      UserError: if the checkpoint does not have the parameters that the config asks
        for; then `out` is not touched.
    """
    found = sources.by_name(families, family)
    if found.file_format not in ("safetensors", "npz"):
        raise UserError(
            f"{family} is no format to export to: T5X restores our checkpoints, with "
            "this package's models, as they are."
        )
    params = _parameters(checkpoint)
    updated = merging.updated_kernels(params)
    if not updated and (adapter or alpha is not None):
        raise UserError(f"{checkpoint} has no low-rank updates.")
    alpha = merging.lora_alpha(checkpoint, alpha) if updated else None
    folder = _config_folder(checkpoint, config_folder, family)
    config = sources.read_config(folder)
    theirs = _recorded(folder, family)
    with naming(folder):
        model = found.read(config, theirs)
        model_sizes.check(model, theirs or params)
    lines: list[str] = []
    params |= _pooling(found, model, params, folder, lines)
    plan = _plan(found, model, theirs, params, checkpoint)
    if alpha is not None:
        if adapter:
            return peft_adapters.write_adapter(out, family, plan, params, alpha)
        params = merging.merged(params, alpha)
        lines.append(f"merged the updates of {len(updated)} kernels, alpha {alpha}")
    tensors = _tensors(plan, model, theirs, params)
    tensors += _carried(folder, tensors[0].dtype)
    out = os.path.abspath(os.path.expanduser(out))
    with whole_files.new_directory(out) as folder_to_be:
        total = sum(tensor.nbytes for tensor in tensors)
        with Progress(
            console(stderr=True), "exporting", total=total, unit="bytes"
        ) as progress:
            if found.file_format == "npz":
                path = os.path.join(folder_to_be, f"{family}.npz")
                tensor_writing.write_npz(path, tensors, done=progress.add)
            else:
                tensor_writing.write_safetensors(
                    folder_to_be,
                    tensors,
                    max_shard_bytes=max_shard_bytes,
                    done=progress.add,
                )
        _copy_companions(folder, folder_to_be, tensors[0].dtype)
    used = {slot.name for step in plan for slot in step.ours}
    return [*lines, *_left(params, used), f"wrote {len(tensors)} tensors to {out}"]


def _parameters(checkpoint: str) -> dict[str, StoredTensor]:
    tensors = {
        name.removeprefix(_TARGET): tensor
        for name, tensor in tensor_files.open_tensors(checkpoint).items()
        if name.startswith(_TARGET)
    }
    if not tensors:
        raise UserError(f"{checkpoint} is no checkpoint of ours: it has no {_TARGET}.")
    if rounded := [name for name in tensors if name.endswith(int8.SCALES)]:
        raise UserError(
            f"{checkpoint} has {len(rounded)} kernels in int8, which no public format "
            "holds: export the tower from the checkpoint that it was made of."
        )
    return tensors


def _config_folder(checkpoint: str, given: str | None, family: str) -> str:
    """The directory that says what is exported."""
    path = os.path.abspath(os.path.expanduser(given or checkpoint))
    if given is not None:
        folder = os.path.dirname(path) if os.path.isfile(path) else path
    else:
        one = reading.STEP_NAME.fullmatch(os.path.basename(path))
        folder = os.path.join(os.path.dirname(path) if one else path, family)
    for name in (RECORD, sources.CONFIG):
        if os.path.isfile(os.path.join(folder, name)):
            return folder
    raise UserError(
        f"there is no {sources.CONFIG} in {folder}, which would say what sizes and "
        f"names a {family} has; name a directory that has one with --config: what "
        f"`vit22b import` wrote into OUT/{family}, or a published model's."
    )


def _recorded(folder: str, family: str) -> dict[str, Any]:
    """Names and shapes of the tensors that the import read.

    Without a record, of the safetensors that lie there; empty without any.
    """
    record = config_values.read_json(folder, RECORD)
    if not record:
        if not any(".safetensors" in name for name in os.listdir(folder)):
            return {}
        beside = tensor_files.open_tensors(folder)
        return {n: transforms.abstract(tensor.shape) for n, tensor in beside.items()}
    path = os.path.join(folder, RECORD)
    with naming(path):
        said = config_values.text(record, "family")
        shapes = config_values.part(record, "tensors")
    if said != family:
        raise UserError(
            f"{folder} was imported from {said}, not from {family}; export "
            f"with --format {said}, or name another --config."
        )
    for name, shape in shapes.items():
        check_name(path, name)
        if not is_shape(shape):
            raise UserError(
                f"{path} says that {name} has the shape {brief(shape)}. Import the "
                "model again."
            )
    return {name: transforms.abstract(shape) for name, shape in shapes.items()}


def _pooling(
    family: Family,
    model: Model,
    params: Mapping[str, StoredTensor],
    folder: str,
    lines: list[str],
) -> dict[str, StoredTensor]:
    """The tower's pooling from the import, where the checkpoint has none of it.

    Training with a text model leaves it out, and so never changes it. The second
    checkpoint is the import's own, beside its `folder`; a line says what was taken.
    """
    if model.tower is None:
        return {}
    whole, without = (
        mapping.stack_shapes(family.shapes(tower, model.text)).keys()
        for tower in (model.tower, model.tower.without_pooling())
    )
    wanted = whole - without
    if not wanted or wanted & params.keys() or not without & params.keys():
        return {}
    path = os.path.join(os.path.dirname(folder), "checkpoint_0")
    if not os.path.isdir(path):
        raise UserError(
            f"the checkpoint lacks {len(wanted)} arrays of the tower's pooling, which "
            f"training with a text model leaves out, and there is no {path} to take "
            "them from. Name with --config the directory that the import wrote, its "
            "checkpoint_0 beside it; or, for a SigLIP, set vision_use_head to false in "
            f"{os.path.join(folder, sources.CONFIG)}."
        )
    imported = _parameters(path)
    dtype = next(iter(params.values())).dtype
    found = {name: imported[name] for name in wanted & imported.keys()}
    lines.append(
        f"{len(found)} arrays of the tower's pooling are not in the checkpoint, which "
        f"was trained without: they are those of {path}"
    )
    return {
        name: StoredTensor(
            tensor.shape,
            dtype,
            tensor.file,
            lambda *layer, tensor=tensor: tensor.read(*layer).astype(dtype),
        )
        for name, tensor in found.items()
    }


def _plan(
    family: Family,
    model: Model,
    theirs: Mapping[str, Any],
    params: Mapping[str, StoredTensor],
    checkpoint: str,
) -> list[Step]:
    """The steps, after a check that the checkpoint has all they need."""
    shapes = family.shapes(model.tower, model.text)
    stacked = mapping.stack_shapes(shapes)
    if any(name in params for name in stacked.keys() - shapes.keys()):
        shapes = stacked
    problems = []
    for name, shape in shapes.items():
        if name not in params:
            near = mapping.nearest(name, params) if len(problems) < SHOWN else ""
            problems.append(f"{name}: not in the checkpoint; {near}")
        elif params[name].shape != shape:
            problems.append(
                f"{name}: shape {params[name].shape} in the checkpoint, {shape} by "
                "the config"
            )
        elif params[name].dtype not in blocks.FLOATS:
            problems.append(f"{name}: dtype {params[name].dtype} cannot be exported")
    if _LOGITS in params and _LOGITS not in shapes and model.text is not None:
        problems.append(
            f"{_LOGITS}: in the checkpoint, but by the config logits are taken from "
            "the token table (tie_word_embeddings)"
        )
    if problems:
        more = len(problems) - SHOWN
        lines = problems[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise UserError(
            f"{checkpoint} is not the model that the config of {family.name} describes:"
            "\n  " + "\n  ".join(lines) + "\nName the right --config."
        )
    plan = mapping.steps(model.rows, theirs, shapes)
    mapping.expected_shapes(plan, shapes)  # raises if the table has gaps
    return plan


def _tensors(
    plan: Sequence[Step],
    model: Model,
    theirs: Mapping[str, Any],
    params: Mapping[str, StoredTensor],
) -> list[LazyTensor]:
    """All tensors of theirs, in the order of the table."""
    made: dict[str, list[tuple[Slot, Step]]] = {}
    for step in plan:
        for slot in step.theirs:
            places = made.setdefault(slot.name, [])
            if slot.layer is not None or not places:
                places.append((slot, step))
            else:
                _check_equal(slot, places[0][1], step, params)
    tensors = [_tensor(name, places, params) for name, places in made.items()]
    by_name = {tensor.name: tensor for tensor in tensors}
    for copy, of in model.copies.items():
        if copy in theirs:
            other = by_name[of]
            tensors.append(LazyTensor(copy, other.shape, other.dtype, other.make))
    return tensors


def _check_equal(
    slot: Slot, one: Step, other: Step, params: Mapping[str, StoredTensor]
) -> None:
    """Raises UserError if two steps give one tensor of theirs different values."""

    def value(step: Step) -> np.ndarray:
        arrays = tuple(params[s.name].read(s.layer) for s in step.ours)
        return step.transform.to_theirs(arrays)[step.theirs.index(slot)]

    if value(one).tobytes() != value(other).tobytes():
        raise UserError(
            f"{one.ours[0].name} and {other.ours[0].name} are one tensor, {slot.name}, "
            "in the files that were imported, but differ in the checkpoint. To write "
            f"them apart, name a --config directory without {RECORD}."
        )


def _carried(folder: str, dtype: np.dtype) -> list[LazyTensor]:
    """What the import kept of what only their class has."""
    path = os.path.join(folder, CARRIED)
    if not os.path.isdir(path):
        return []
    return [
        LazyTensor(name, kept.shape, dtype, lambda kept=kept: kept.read().astype(dtype))
        for name, kept in tensor_files.open_tensors(path).items()
    ]


def _tensor(
    name: str,
    places: Sequence[tuple[Slot, Step]],
    params: Mapping[str, StoredTensor],
) -> LazyTensor:
    """One tensor of theirs, of one step or of one per layer."""

    def outputs(slot: Slot, step: Step, arrays) -> np.ndarray:
        return step.transform.to_theirs(tuple(arrays))[step.theirs.index(slot)]

    def shape_of(slot: Slot) -> tuple[int, ...]:
        shape = params[slot.name].shape
        return shape if slot.layer is None else shape[1:]

    def value(slot: Slot, step: Step) -> np.ndarray:
        return outputs(slot, step, (params[s.name].read(s.layer) for s in step.ours))

    slot, step = places[0]
    abstract = [transforms.abstract(shape_of(slot)) for slot in step.ours]
    shape = outputs(slot, step, abstract).shape
    dtype = params[step.ours[0].name].dtype
    if slot.layer is None:
        return LazyTensor(name, shape, dtype, lambda: value(slot, step))

    def stack() -> np.ndarray:
        whole = np.empty((len(places), *shape), dtype)
        for place, step in places:
            whole[place.layer] = value(place, step)
        return whole

    return LazyTensor(name, (len(places), *shape), dtype, stack)


def _copy_companions(folder: str, to: str, dtype: np.dtype) -> None:
    for name in sorted(os.listdir(folder)):
        if name != RECORD and name.endswith((".json", ".model")):
            shutil.copyfile(os.path.join(folder, name), os.path.join(to, name))
    path = os.path.join(to, sources.CONFIG)
    if os.path.isfile(path):
        config = config_values.read_json(folder, sources.CONFIG)
        for name in ("dtype", "torch_dtype"):
            if name in config:
                config[name] = dtype.name
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2)
            file.write("\n")


def _left(params: Mapping[str, StoredTensor], used: set[str]) -> list[str]:
    """What of the checkpoint has no place in the family, by its first two scopes."""
    counts: dict[str, int] = {}
    for name in params.keys() - used:
        scope = "/".join(name.split("/")[:2])
        counts[scope] = counts.get(scope, 0) + 1
    return [f"not exported: {n} arrays of {s}" for s, n in sorted(counts.items())]
