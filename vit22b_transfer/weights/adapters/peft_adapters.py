"""Adapters in PEFT's format: low-rank updates alone, in and out.

An adapter is a directory with adapter_config.json and adapter_model.safetensors. It
calls a kernel's update `base_model.model.MODULE.lora_A.weight` [rank, in] and
`lora_B.weight` [out, rank], where MODULE is a module of Hugging Face's class.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.host import whole_files
from vit22b_transfer.host.file_errors import brief, naming, quoted
from vit22b_transfer.models.lora import LoraConfig
from vit22b_transfer.weights import mapping
from vit22b_transfer.weights.adapters import peft_modules
from vit22b_transfer.weights.adapters.merging import matrices, updated_kernels
from vit22b_transfer.weights.files import (
    config_values,
    tensor_files,
    tensor_writing,
)
from vit22b_transfer.weights.files.stored_tensors import StoredTensor
from vit22b_transfer.weights.files.tensor_writing import LazyTensor
from vit22b_transfer.weights.mapping import SHOWN, Shape, Slot, Step

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_POOLING = "encoder/tower/map/"

# Settings of PEFT that say nothing of what an adapter computes. Any other one that is
# set means something that our updates do not compute.
_WITHOUT_EFFECT = frozenset(
    "r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform "
    "layers_pattern task_type base_model_name_or_path inference_mode auto_mapping "
    "revision peft_version megatron_core megatron_config qalora_group_size "
    "loftq_config eva_config ensure_weight_tying".split()
)
_ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others change the kernels that the adapter belongs to.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
# What stands before the name of a module in PEFT's own class.
_PREFIX = "base_model.model."
_NAME = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])(\.default)?\.weight")


# --- Export ---


def write_adapter(
    out: str,
    family: str,
    plan: Sequence[Step],
    params: Mapping[str, StoredTensor],
    alpha: float,
) -> list[str]:
    """Writes the updates of a checkpoint in PEFT's format into `out`; lines to show.

    Raises:
      UserError: if one has no place there; then `out` is not touched.
    """
    known = peft_modules.modules([(family, plan)])
    by_slot = {place.kernel: place for place in known.values()}
    ranks = {
        params[matrices(kernel)[0]].shape[-1] for kernel in updated_kernels(params)
    }
    if len(ranks) != 1:
        raise UserError(f"the updates have the ranks {sorted(ranks)}, not one.")
    tensors, modules, left, problems = [], [], 0, []
    scopes = {slot.name for step in plan for slot in step.ours}
    for kernel in updated_kernels(params):
        shape = params[kernel].shape
        layers = [None] if len(shape) == 2 else range(shape[0])
        if kernel not in scopes:
            left += 1
            continue
        for layer in layers:
            place = by_slot.get(Slot(kernel, layer))
            if place is None:
                problems.append(kernel)
                break
            modules.append(place.module)
            for name, ours in zip("AB", matrices(kernel), strict=True):
                tensors.append(_their_matrix(place.module, name, params[ours], layer))
    if problems:
        raise UserError(
            f"{family} keeps these kernels fused with others or turned otherwise, and "
            f"PEFT has no place for their updates: {', '.join(problems[:SHOWN])}. "
            "Export without --adapter (the updates are merged), or train with patterns "
            "that leave them out."
        )
    if not modules:
        raise UserError(f"no update belongs to a kernel of {family}.")
    out = os.path.abspath(os.path.expanduser(out))
    with whole_files.new_directory(out) as folder:
        tensor_writing.write_safetensors(
            folder, tensors, max_shard_bytes=2**62, done=lambda count: None
        )
        os.rename(
            os.path.join(folder, "model.safetensors"), os.path.join(folder, WEIGHTS)
        )
        with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as file:
            json.dump(_config(ranks.pop(), alpha, modules), file, indent=2)
            file.write("\n")
    lines = [f"wrote the updates of {len(modules)} kernels to {out}"]
    if left:
        lines.insert(0, f"not exported: the updates of {left} kernels of other parts")
    return lines


def _their_matrix(
    module: str, name: str, ours: StoredTensor, layer: int | None
) -> LazyTensor:
    shape = ours.shape if layer is None else ours.shape[1:]
    dtype = np.dtype(np.float32)
    return LazyTensor(
        f"{_PREFIX}{module}.lora_{name}.weight",
        shape[::-1],
        dtype,
        lambda: ours.read(layer).T.astype(dtype),
    )


def _config(rank: int, alpha: float, modules: Sequence[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(modules),
    }


# --- Import of an adapter ---


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that was opened: its updates are ones that we compute.

    pairs: name of a module -> its matrices A and B, unread.
    """

    source: str
    rank: int
    alpha: float
    dropout: float
    pairs: Mapping[str, Mapping[str, StoredTensor]]


def is_adapter(path: str) -> bool:
    """Whether `path` is a directory with an adapter in PEFT's format."""
    return os.path.isfile(os.path.join(os.path.expanduser(path), CONFIG))


def open_adapter(path: str) -> Adapter:
    """The adapter in a directory, unread.

    Raises:
      UserError: if it is damaged, or computes what our updates do not.
    """
    folder = os.path.abspath(os.path.expanduser(path))
    config = config_values.read_json(folder, CONFIG)
    with naming(os.path.join(path, CONFIG)):
        kind = config_values.text(config, "peft_type", "LORA")
        if kind != "LORA":
            raise UserError(
                f"this adapter is of the type {kind}; only LORA can be imported. Merge "
                "it into its model with PEFT (merge_and_unload) and import that."
            )
        rank = config_values.size(config, "r", most=2**16)
        alpha = config_values.number(config, "lora_alpha")
        dropout = config_values.number(config, "lora_dropout", 0.0, least=0.0)
    _check_config(path, config)
    file = os.path.join(folder, WEIGHTS)
    tensors = tensor_files.open_tensors(file if os.path.isfile(file) else folder)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"{path}: {name} is not a matrix of a low-rank update of a linear "
                "layer, which is all that can be imported."
            )
        pair = pairs.setdefault(match[1], {})
        if match[2] in pair:
            raise UserError(f"{path}: {match[1]} has lora_{match[2]} twice.")
        pair[match[2]] = tensor
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise UserError(f"{path}: {module} has lora_{'/'.join(pair)} alone.")
        a, b = (pair[name].shape for name in "AB")
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise UserError(
                f"{path}: {module} has lora_A of shape {a} and lora_B of shape {b}; "
                f"by r = {rank} of {CONFIG} they are ({rank}, inputs) and "
                f"(outputs, {rank})."
            )
    if not pairs:
        raise UserError(f"{path} holds no updates.")
    return Adapter(path, rank, alpha, dropout, pairs)


def _check_config(path: str, config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        allowed = _ALLOWED.get(name)
        if value not in allowed if allowed else value and name not in _WITHOUT_EFFECT:
            said = f"only {', '.join(map(repr, allowed))}" if allowed else "unset"
            raise UserError(
                f"{path}: {CONFIG} says {brief(name)} = {quoted(value)}, and what that "
                f"computes models/lora.py does not; it may be {said}. Merge the "
                "adapter into its model with PEFT (merge_and_unload) and import that."
            )


@dataclasses.dataclass(frozen=True)
class Updates:
    """An adapter as it is written beside the kernels of an import.

    arrays: parameter -> (shape, dtype). places: what is written where.
    """

    adapter: Adapter
    config: LoraConfig
    arrays: Mapping[str, tuple[Shape, np.dtype]]
    places: Mapping[str, Slot]

    def write(self, output: Any) -> None:
        """Writes all matrices into a `CheckpointOutput`."""
        for module, kernel in self.places.items():
            pair = self.adapter.pairs[module]
            for name, letter in zip(matrices(kernel.name), "AB", strict=True):
                slot = Slot(name, kernel.layer)
                if not output.has(slot):
                    shown = f"{module}.lora_{letter}"
                    with naming(self.adapter.source):
                        output.write(slot, pair[letter].read().T, shown)
        output.write_record({"lora": {"alpha": self.config.alpha}})

    def gin_fields(self, fresh: str | None) -> dict[str, Any]:
        """Fields of the `LoraConfig` that a recipe needs beside the imported model.

        fresh: pattern of what training does not load, and so has to train.
        """
        trained = (fresh,) if fresh else ()
        return dataclasses.asdict(dataclasses.replace(self.config, trained=trained))

    def lines(self) -> Iterator[str]:
        """What was imported, for the user."""
        yield (
            f"{self.adapter.source}: updates of {len(self.places)} kernels, rank "
            f"{self.adapter.rank}, alpha {self.adapter.alpha}"
        )
        if self.adapter.dropout:
            yield f"  its lora_dropout of {self.adapter.dropout} is not taken over"


def plan_updates(
    adapter: Adapter, parts: Sequence[tuple[str, Sequence[Step], Mapping[str, Shape]]]
) -> Updates:
    """Where the updates of an adapter go.

    parts: of each imported model the family, the steps, and our parameters' shapes.

    Raises:
      UserError: naming every module that has no place or is of another shape.
    """
    known = peft_modules.modules((family, plan) for family, plan, _ in parts)
    families = [family for family, _, _ in parts]
    shapes = {name: shape for _, _, each in parts for name, shape in each.items()}
    places: dict[str, Slot] = {}
    problems = []
    for module, pair in adapter.pairs.items():
        place = known.get(peft_modules.plain(module, *families))
        if place is None:
            near = [known[name].module for name in known]
            hint = mapping.nearest(module, near) if len(problems) < SHOWN else ""
            problems.append(f"{module}: there is no update of such a module; {hint}")
            continue
        inputs, outputs = shapes[place.kernel.name][-2:]
        got = pair["A"].shape[1], pair["B"].shape[0]
        if got != (inputs, outputs):
            problems.append(
                f"{module}: from {got[0]} inputs to {got[1]} outputs, but the model "
                f"has {inputs} and {outputs}"
            )
        places[module] = place.kernel
    problems += _twice(places) + _missing_layers(places.values(), shapes)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError(
            f"{adapter.source} does not fit the model that is imported with it:\n  "
            + "\n  ".join(problems[:SHOWN] + more)
            + "\nUpdates are of the kernels of attention and MLPs; import the adapter "
            "with the model that it was trained on, or merge it into that with PEFT "
            "(merge_and_unload) and import the result."
        )
    arrays = {}
    for kernel in {slot.name for slot in places.values()}:
        *stack, inputs, outputs = shapes[kernel]
        a, b = matrices(kernel)
        arrays[a] = (*stack, inputs, adapter.rank), np.dtype(np.float32)
        arrays[b] = (*stack, adapter.rank, outputs), np.dtype(np.float32)
    patterns = _patterns({slot.name for slot in places.values()}, shapes)
    config = LoraConfig(adapter.rank, adapter.alpha, patterns)
    return Updates(adapter, config, arrays, places)


def _twice(places: Mapping[str, Slot]) -> list[str]:
    seen: dict[Slot, str] = {}
    lines = []
    for module, slot in places.items():
        if slot in seen:
            lines.append(f"{module}: it is the same module as {seen[slot]}")
        seen[slot] = module
    return lines


def _missing_layers(slots: Iterable[Slot], shapes: Mapping[str, Shape]) -> list[str]:
    """Lines for stacked kernels of which the adapter updates some layers only."""
    counts: dict[str, int] = {}
    for slot in slots:
        if slot.layer is not None:
            counts[slot.name] = counts.get(slot.name, 0) + 1
    return [
        f"{name}: updated in {count} of {shapes[name][0]} layers; leave --scan_layers "
        "out"
        for name, count in counts.items()
        if count < shapes[name][0]
    ]


def _patterns(kernels: Iterable[str], shapes: Mapping[str, Any]) -> tuple[str, ...]:
    """Patterns that choose these kernels, in scanned and in unrolled layers.

    Those of a tower's pooling are left out: an image-text model does without it.
    """
    layer = re.compile(r"\blayers_(\d+)\b")
    numbers: dict[str, set[str]] = {}
    for kernel in kernels:
        if kernel.startswith(_POOLING):
            continue
        match = layer.search(kernel)
        group = layer.sub("{}", kernel)
        numbers.setdefault(group, set()).update([match[1]] if match else [])
    patterns = []
    for group, found in sorted(numbers.items()):
        every = {m[1] for s in shapes if (m := layer.search(s)) and _same(group, s, m)}
        chosen = "|".join(sorted(found, key=int))
        some = r"layers(_\d+)?" if found == every else f"layers_({chosen})"
        patterns.append(
            group.replace("{}", some).replace("/layers/", r"/layers(_\d+)?/")
        )
    return tuple(patterns)


def _same(group: str, name: str, match: re.Match) -> bool:
    return name[: match.start()] + "{}" + name[match.end() :] == group
