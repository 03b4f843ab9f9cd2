"""The gin model file that an import writes: sizes, normalisation, preprocessing."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit22b_transfer.weights.mapping import Family, Model

# What the weights do not decide: written only where the import chose it.
_OF_THE_RUN = {
    "dropout_rate",
    "dtype",
    "fused_projections",
    "int8_kernels",
    "lora",
    "param_dtype",
    "remat",
}


def gin_text(
    parts: Sequence[tuple[Family, Model]],
    origins: Sequence[str],
    comments: Sequence[str],
    checkpoint: str,
    rules: str,
) -> str:
    """The gin file that, behind any recipe, makes it a run from the imported model.

    rules: of the training's `InitialCheckpoint`, which starts from `checkpoint`.
    """
    lines = [f"# Model: imported from {', '.join(origins)}."]
    if any(model.tower is not None for _, model in parts):
        lines.append("# IMAGE_SIZE belongs to the weights: vit22b import --image_size")
        lines.append("# resamples them to another.")
    lines.append("# Name it behind a recipe: training then starts from the weights.")
    lines += [f"# {line}" for line in comments]
    lines.append("from __gin__ import dynamic_registration")
    modules, body = set(), []
    for family, model in parts:
        for line in model.facts:
            body.append(f"# {family.name}: {line}")
        if model.tower is not None:
            binding = "TOWER = @{}()"
            body += _bindings(binding, model.tower, "image_size", "IMAGE_SIZE")
            modules.add(type(model.tower).__module__)
        if model.text is not None:
            binding = f"{family.text_binding} = @{{}}()"
            body += _bindings(binding, model.text, "vocab_size", "VOCAB_SIZE")
            modules.add(type(model.text).__module__)
            owner = family.text_binding.partition(".")[0]
            modules.add(f"vit22b_transfer.models.{owner}")
        body += model.bindings
    modules.add("vit22b_transfer.training.train")
    for module in sorted(modules):
        package, _, name = module.rpartition(".")
        lines.append(f"from {package} import {name}")
    body += [
        "include 'gin_configs/runs/from_checkpoint.gin'",
        f"INITIAL_CHECKPOINT = {checkpoint!r}",
        f"train.InitialCheckpoint.rules = {rules}",
    ]
    return "\n".join([*lines, "", *body]) + "\n"


def _bindings(binding: str, config: Any, macro_field: str, macro: str) -> list[str]:
    """A configuration's fields, as a recipe may bind any; one through a macro."""
    module = type(config).__module__.rpartition(".")[2]
    name = f"{module}.{type(config).__name__}"
    lines = [
        f"{macro} = {_value(getattr(config, macro_field))}",
        binding.format(name),
        f"{name}:",
        f"  {macro_field} = %{macro}",
    ]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == macro_field:
            continue
        if field.name not in _OF_THE_RUN or value != field.default:
            lines.append(f"  {field.name} = {_value(value)}")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, (bool, int, float, str, tuple, type(None))):
        return repr(value)
    return repr(np.dtype(value).name)
