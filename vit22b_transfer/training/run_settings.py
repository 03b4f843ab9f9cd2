"""What a run was told: recorded with its checkpoints, compared when it goes on.

A checkpoint says what its arrays are, not what made them. So its record has the
settings of the run, flat: a name such as `optimizer.b2` and a number, a text or null.
"""

import dataclasses
import difflib
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.host.file_errors import brief, quoted
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers

Setting = str | int | float | bool | None

# What cannot change without another order of examples, other random numbers or another
# loss: a run goes on with such a change only if it is allowed by name.
EXACT = (
    "task",
    "split",
    "feature_lengths",
    "batch_size",
    "augmentation",
    "seed",
    "num_microbatches",
    "optimizer",
    "frozen",
    "tower",
    "teacher",
    "initial_checkpoint",
)
# Of these, none at all now is no change: the parameters are in the checkpoint.
_NOT_NEEDED_AGAIN = ("tower", "initial_checkpoint")
# Attributes of a model that are settings of their own, or decide nothing in training.
_NOT_OF_THE_MODEL = (
    "decode_fn",
    "frozen",
    "input_vocabulary",
    "max_decode_length",
    "optimizer_def",
    "output_vocabulary",
)
# Steps at which a schedule that tells no settings is asked for its rate.
_PROBED = (0, 1, 10, 100, 1_000, 10_000, 100_000)
# Characters of a text; of a longer one the rest is told by a hash.
_LONGEST = 1_000
# Changes that are told one by one.
_SHOWN = 20


def of_run(
    model: Any,
    *,
    data: Any,
    eval_data: Any,
    initial: Any,
    partitioning: Partitioning,
    periods: Any,
    numbers: Mapping[str, int | None],
    instruments: Any = None,
    guard: Any = None,
    qk_clip: Any = None,
) -> dict[str, Setting]:
    """All settings of a `train.fine_tune`, whose arguments these are.

    numbers: those of its arguments that are numbers, by name.

    Raises:
      UserError: if `data` is cached and the checkpoint with its tower, or of its
        teacher, is not there.
    """
    mesh = {f"mesh.{name}": size for name, size in partitioning.mesh.shape.items()}
    return (
        of_data(data, eval_data)
        | of_initial(initial)
        | dict(numbers)
        | of_model(model)
        | _flat("periods", periods)
        | _flat("instruments", instruments)
        | _flat("spike_guard", guard)
        | _flat("qk_clip", qk_clip)
        | mesh
    )


def of_model(model: Any) -> dict[str, Setting]:
    """The settings of a model: its optimizer, schedule, frozen patterns, and its own.

    Attributes that are numbers, texts, dtypes, functions, or collections and
    dataclasses of such; arrays and other objects are not settings.
    """
    optimizer = model.optimizer_def
    found: dict[str, Setting] = {"frozen": _literal(tuple(model.frozen))}
    schedule = getattr(optimizer, "learning_rate", None)
    for name, value, kind in (
        ("optimizer", getattr(optimizer, "settings", None), type(optimizer).__name__),
        ("learning_rate", getattr(schedule, "settings", None), _function(schedule)),
    ):
        found |= _named(name, value or {"name": kind})
    if callable(schedule) and not isinstance(schedule, optimizers.NamedSchedule):
        for step in _PROBED:
            rate = float(f"{float(schedule(np.int32(step))):.5g}")
            found[f"learning_rate.at_step_{step}"] = _scalar(rate)
    for name, value in sorted(vars(model).items()):
        if name not in _NOT_OF_THE_MODEL and name[0] != "_":
            found |= _flat(f"model.{name}", value)
    return found


def of_data(data: Any, eval_data: Any) -> dict[str, Setting]:
    """What is read: of `TrainData` and `EvalData`, or whatever has their attributes."""
    names = ("task", "split", "feature_lengths", "batch_size")
    found = {name: _literal(getattr(data, name, None)) for name in names}
    cache = getattr(data, "cache", None)
    digest = reading.tower_record(cache).get("tower", {}).get("digest")
    found |= {"tower": digest, "cached_features": getattr(cache, "storage", None)}
    taught = getattr(data, "teacher_cache", None)
    found["teacher"] = taught and reading.classifier_digest(taught.teacher)
    found |= _flat("augmentation", getattr(data, "augmentation", None))
    for name in ("tasks", "split", "feature_lengths", "batch_size"):
        found[f"eval_data.{name}"] = _literal(getattr(eval_data, name, None))
    return found


def of_initial(initial: Any) -> dict[str, Setting]:
    """Of an `InitialCheckpoint`, or None."""
    if initial is None:
        return {"initial_checkpoint": None}
    return {
        "initial_checkpoint": os.path.abspath(os.path.expanduser(initial.path)),
        "initial_checkpoint.rules": _literal(tuple(map(tuple, initial.rules))),
        "initial_checkpoint.cast": initial.cast,
        "initial_checkpoint.image_size": _literal(initial.image_size),
    }


def check_names(allow_changes: Sequence[str]) -> None:
    """Raises UserError unless these are names of `EXACT`."""
    if isinstance(allow_changes, str):
        raise UserError(
            f"allow_changes is a text, {quoted(allow_changes)}; it must be a tuple of "
            f"names: ({quoted(allow_changes)},)."
        )
    for name in allow_changes:
        if name not in EXACT:
            near = difflib.get_close_matches(name, EXACT, n=2, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise UserError(
                f"allow_changes names {quoted(name)}. {hint}It may name "
                f"{', '.join(EXACT)}; any other change is said, and needs no leave."
            )


def changes(
    path: str, now: Mapping[str, Setting], allow_changes: Sequence[str]
) -> list[str]:
    """A line on each setting that is another than in the run that wrote a checkpoint.

    path: the checkpoint. now: the settings of the run that is to go on from it.
    allow_changes: names of `EXACT`.

    Raises:
      UserError: for a change of what is exact and not allowed, with all such.
      UnreadableCheckpointError: if the record is damaged.
    """
    what = os.path.basename(path)
    before = reading.read_record(path).get("settings")
    if before is None:
        return [
            f"what {what} was trained with is not recorded: whether batch size, seed, "
            "task or optimizer are the same is unknown"
        ]
    lines, refused = [], {}
    for name in dict.fromkeys([*now, *sorted(before)]):
        was, is_now = before.get(name), now.get(name)
        if _same(was, is_now):
            continue
        top = name.split(".")[0]
        told = _told(name, before, "was"), _told(name, now, "is now")
        lines.append(f"changed since {what}: {brief(name)} {', '.join(told)}")
        needless = top in _NOT_NEEDED_AGAIN and now.get(top) is None
        if top in EXACT and name in before and not needless:
            if top not in allow_changes:
                refused.setdefault(top, []).append(lines[-1])
    if refused:
        raise UserError(_refusal(path, refused))
    if len(lines) > _SHOWN:
        more = f"changed since {what}: {len(lines) - _SHOWN} other settings"
        return [*lines[:_SHOWN], more]
    return lines


def _refusal(path: str, refused: Mapping[str, list[str]]) -> str:
    lines = [line for name in refused for line in refused[name]]
    shown = [line.partition(": ")[2] for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"{len(lines) - _SHOWN} others")
    names = "".join(f'"{name}",' for name in refused)
    return (
        f"{path} is of a run with other settings, so going on would not be one run: "
        f"{'; '.join(shown)}. Start with what it was begun with, or in another "
        "model_dir (MODEL_DIR), or allow the change by name: "
        f"--gin.train.fine_tune.allow_changes='({names})'."
    )


def _told(name: str, settings: Mapping[str, Setting], verb: str) -> str:
    value = settings.get(name)
    return f"{verb} not set" if value is None else f"{verb} {brief(value)}"


def _same(one: Setting, other: Setting) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _named(name: str, settings: Mapping[str, Any]) -> dict[str, Setting]:
    """`{"name": "adamw", "b2": 0.9}` as `name` and `name.b2`."""
    return {
        name if key == "name" else f"{name}.{key}": _literal(value)
        for key, value in settings.items()
    }


def _flat(name: str, value: Any) -> dict[str, Setting]:
    """A value by dotted names; {} if it is no setting."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Setting] = {name: type(value).__name__}
        for field in dataclasses.fields(value):
            # A flax module's place in another one.
            if field.name not in ("parent", "name"):
                found |= _flat(f"{name}.{field.name}", getattr(value, field.name))
        return found
    if isinstance(value, jax.Array | np.ndarray):
        return {}
    text = _literal(value)
    return {} if text is None and value is not None else {name: text}


def _literal(value: Any) -> Setting:
    """A number as it is, anything else as text; None for what is no setting."""
    if value is None or isinstance(value, bool | int | float | np.generic):
        return _scalar(value)
    text = value if isinstance(value, str) else _text(value)
    if text is None or len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
    return f"{text[:_LONGEST]}... (sha256 {digest})"


def _scalar(value: Any) -> Setting:
    value = value.item() if isinstance(value, np.generic) else value
    # JSON has no endless numbers.
    is_text = isinstance(value, float) and not math.isfinite(value)
    return str(value) if is_text else value


def _text(value: Any) -> str | None:
    """Collections, types and functions, the same in every process; None for others."""
    if isinstance(value, Mapping):
        parts = sorted(f"{_item(key)}: {_item(part)}" for key, part in value.items())
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list | tuple):
        end = ",)" if len(value) == 1 else ")"
        return "(" + ", ".join(map(_item, value)) + end
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        parts = [f"{f.name}={_item(getattr(value, f.name))}" for f in fields]
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, np.dtype):
        return value.name
    return _function(value) if callable(value) else None


def _item(value: Any) -> str:
    literal = _literal(value)
    if literal is None and value is not None:
        return type(value).__name__
    return repr(literal) if value is literal else str(literal)


def _function(value: Any) -> str | None:
    """The name of a function or class, of what is around it too."""
    if value is None:
        return None
    value = getattr(value, "func", value)  # of a partial
    return getattr(value, "__qualname__", type(value).__qualname__)
