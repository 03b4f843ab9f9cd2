"""The average of the weights that a training kept beside them, in place of them."""

import re
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import identity, reading, restoring
from vit22b_transfer.models import distillation

Tree = Any

# Where the optimizer's state has it, at any place in a chain of its parts.
_STORED = re.compile(r"state/param_states/(?:.+?/)??weight_average/(.+)")


def names(path: str) -> dict[str, str]:
    """Parameter -> name of its average in a checkpoint, or the latest in `path`.

    Empty if it holds none.

    Raises:
      UserError: if it holds several of one parameter.
    """
    path, found = reading.resolve(path), {}
    for match in filter(None, map(_STORED.fullmatch, reading.saved_arrays(path))):
        if match[1] in found:
            raise UserError(
                f"checkpoint {path} holds several averages of {match[1]}: "
                f"{found[match[1]]} and {match[0]}. Train with one ema_decay."
            )
        found[match[1]] = match[0]
    return found


def restore(path: str, abstract_params: Tree, *, model: Any) -> tuple[Tree, int]:
    """(parameters, how many are averages) of a checkpoint, or the latest in `path`.

    Averages are read in the dtypes and shardings of `abstract_params`. Parameters
    without one were frozen in the training; they are read as they are.

    Raises:
      UserError: if the checkpoint holds no average, or does not fit the model.
    """
    path = reading.resolve(path)
    averages = names(path)
    if not averages:
        raise UserError(
            f"checkpoint {path} holds no average of the weights: it was trained "
            "without ema_decay. Evaluate weights='trained', or train with "
            "gin_configs/runs/ema.gin."
        )
    restoring.check_trained_together(path, abstract_params)
    identity.check_vocabularies(path, model)
    identity.check_lora(path, model)
    flat, saved = reading.flatten(abstract_params), reading.saved_arrays(path)
    kept = {name.removeprefix("target/") for name in saved if name[:7] == "target/"}
    alone = not restoring.has_teacher(abstract_params)
    problems = [
        f"target/{name}: not in the model"
        for name in sorted(kept | averages.keys())
        if name not in flat and not (alone and distillation.is_of_lesson(name))
    ]
    sources = {name: source for name, source in averages.items() if name in flat}
    for name in sources:
        if not jnp.issubdtype(flat[name].dtype, jnp.floating):
            raise UserError(
                f"checkpoint {path}: {name} was trained and has an average, but the "
                f"model has it as {flat[name].dtype}. Leave "
                "gin_configs/models/int8_tower.gin out, or evaluate weights='trained'."
            )
    reading.check_fit(path, sources, flat, saved, problems, cast=True)
    read = reading.read_arrays(
        path,
        traverse_util.unflatten_dict({s: flat[n] for n, s in sources.items()}, sep="/"),
    )
    values = reading.flatten(read)
    params = {name: values[source] for name, source in sources.items()}
    if rest := {name: leaf for name, leaf in flat.items() if name not in sources}:
        restored = restoring.restore_partial(
            path, traverse_util.unflatten_dict(rest, sep="/"), model=model
        )
        if restored.kept:
            raise UserError(
                f"checkpoint {path} does not fit the model: it has no "
                f"{restored.kept[0]} (one of {len(restored.kept)}). Use the model that "
                "it was written with."
            )
        params |= reading.flatten(restored.params)
    return traverse_util.unflatten_dict(params, sep="/"), len(sources)
