"""The gin model file that an import writes: sizes, normalisation, preprocessing."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.models.lora import LoraConfig
from vit22b_transfer.recipes import gin_values
from vit22b_transfer.weights.mapping import Family, Model

# What the weights do not decide: written only where the import chose it.
_OF_THE_RUN = {
    "attention_form",
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
    rules: Sequence[tuple[str, None]],
    updates: Mapping[str, Any],
) -> str:
    """The gin file that, behind any recipe, makes it a run from the imported model.

    rules: of the training's `InitialCheckpoint`, which starts from `checkpoint`.
    updates: fields of the `LoraConfig` of an imported adapter; empty without one.

    What comes from a source is written as a literal of its field's type, or into a
    comment of one line.

    Raises:
      UserError: for a value of another type, or text with control characters.
    """
    lines = [_comment(f"Model: imported from {', '.join(origins)}.")]
    if any(model.tower is not None for _, model in parts):
        lines.append("# IMAGE_SIZE belongs to the weights: vit22b import --image_size")
        lines.append("# resamples them to another.")
    lines.append("# Name it behind a recipe: training then starts from the weights.")
    lines += [_comment(line) for line in comments]
    lines.append("from __gin__ import dynamic_registration")
    modules, body = {"vit22b_transfer.training.train"}, []
    for family, model in parts:
        body += [_comment(f"{family.name}: {line}") for line in model.facts]
        if model.tower is not None:
            binding, size = "TOWER = @{}()", model.images or model.tower.image_size
            body += _bindings(binding, model.tower, "image_size", "IMAGE_SIZE", size)
            modules.add(type(model.tower).__module__)
            if (how := getattr(model.tower, "preparation", None)) is not None:
                body += _fields("preparation.Preparation", how)
                modules.add(type(how).__module__)
        if model.text is not None:
            binding = f"{family.text_binding} = @{{}}()"
            size = model.text.vocab_size
            body += _bindings(binding, model.text, "vocab_size", "VOCAB_SIZE", size)
            modules.add(type(model.text).__module__)
            owner = family.text_binding.partition(".")[0]
            modules.add(f"vit22b_transfer.models.{owner}")
        for name, value in model.bindings.items():
            # A word, a flag, a number or nothing; no other text.
            other = isinstance(value, str) and not value.isidentifier()
            body.append(_binding(name, value, int if other else type(value)))
        modules |= {
            f"vit22b_transfer.models.{name.partition('.')[0]}"
            for name in model.bindings
        }
    body += [
        "include 'gin_configs/runs/from_checkpoint.gin'",
        _binding("INITIAL_CHECKPOINT", checkpoint, str),
        _binding("train.InitialCheckpoint.rules", tuple(rules), tuple),
    ]
    if updates:
        modules |= {f"vit22b_transfer.models.{name}" for name in ("lora", "multimodal")}
        body.append("multimodal.ImageTextModel.lora = @lora.LoraConfig()")
        hints = typing.get_type_hints(LoraConfig)
        body += [
            _binding(f"lora.LoraConfig.{name}", value, hints[name])
            for name, value in updates.items()
        ]
    for module in sorted(modules):
        package, _, name = module.rpartition(".")
        lines.append(f"from {package} import {name}")
    return "\n".join([*lines, "", *body]) + "\n"


def _bindings(
    binding: str, config: Any, macro_field: str, macro: str, value: Any
) -> list[str]:
    """A macro, and a configuration's fields, as a recipe may bind any.

    The field is bound through the macro where it has its value.
    """
    module = type(config).__module__.rpartition(".")[2]
    name = f"{module}.{type(config).__name__}"
    hints = typing.get_type_hints(type(config))
    through = {macro_field: macro} if getattr(config, macro_field) == value else {}
    return [
        _binding(macro, value, hints[macro_field]),
        binding.format(name),
        *_fields(name, config, through),
    ]


def _fields(name: str, config: Any, macros: Mapping[str, str] | None = None) -> list:
    """The fields of a configuration; `macros` names those bound through one."""
    hints = typing.get_type_hints(type(config))
    lines = [f"{name}:"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in (macros or {}):
            lines.append(f"  {field.name} = %{(macros or {})[field.name]}")
            continue
        if field.name in _OF_THE_RUN and value == field.default:
            continue
        if field.name == "preparation" and value is not None:
            lines.append("  preparation = @preparation.Preparation()")
            continue
        if field.name.endswith("dtype"):
            value = np.dtype(value).name
        lines.append("  " + _binding(field.name, value, hints[field.name]))
    return lines


def _binding(name: str, value: Any, expected: Any) -> str:
    """`name = value`, if it is a literal of the type expected."""
    if not _is_literal(value) or not gin_values.fits(value, expected):
        raise UserError(
            f"the source says {name} = {value!r}, but {name} takes {expected}. Its "
            "configuration is damaged, or not of the family: fetch it again."
        )
    return f"{name} = {value!r}"


def _is_literal(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_literal, value))
    # Not subclasses, whose repr may be anything.
    return type(value) in (bool, int, float, str, type(None))


def _comment(text: str) -> str:
    """One line of comment; what could end it is refused."""
    odd = [character for character in text if not character.isprintable()]
    if odd:
        raise UserError(
            f"the source's configuration or name holds the control character "
            f"{odd[0]!r} in {text[:200]!r}. Rename it, or correct the configuration."
        )
    return f"# {text}"
