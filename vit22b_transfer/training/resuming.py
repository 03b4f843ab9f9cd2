"""From a checkpoint: first parameters, or the state and metrics to go on from."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Key

from vit22b_transfer.checkpoints import best, damage, identity, reading, restoring
from vit22b_transfer.host import whole_files
from vit22b_transfer.host.gin_arguments import gin_argument
from vit22b_transfer.models import freezing
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import finite, measures
from vit22b_transfer.training.state import (
    TrainState,
    from_checkpoint_tree,
    init_params,
    to_checkpoint_tree,
)

# In the record of a checkpoint whose step's measures were stopped: which they are.
_UNFINISHED = "evaluation_unfinished"


def record(
    model: Any,
    window: Any,
    *,
    settings: Mapping[str, Any],
    to_measure: Sequence[str] = (),
    measured: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds beside the state; float32 survives JSON exactly.

    settings: see `run_settings`.
    to_measure: what of `measures` is still to be done of its step, and of it all.
    measured: what was measured at its step.
    """
    unfinished = {_UNFINISHED: list(to_measure)} if to_measure else {}
    leaves = jax.tree_util.tree_leaves_with_path(window)
    return {
        "vocabularies": identity.vocabulary_record(model),
        "lora": identity.lora_record(model),
        "settings": dict(settings),
        "window": {jax.tree_util.keystr(key): leaf.tolist() for key, leaf in leaves},
    } | (unfinished | best.measured(measured or {}))


def initial_params(
    model: Any,
    initial: Any,
    rng: Key[Array, ""],
    batch: Mapping[str, Any],
    abstract: Any,
    partitioning: Partitioning,
    log: Any,
) -> Any:
    """Fresh parameters, or those of a checkpoint and fresh ones for the rest.

    Raises:
      UserError: if the checkpoint does not fit, or there is none to give what it must.
    """
    if initial is None:
        restoring.check_nothing_is_given(model, None)
        return init_params(model, rng, batch, abstract, partitioning)
    restored = restoring.restore_initial(
        initial.path,
        abstract,
        initial.rules,
        cast=initial.cast,
        image_size=initial.image_size,
        model=model,
    )
    log.message(f"initial checkpoint {initial.path}\n{restored.summary()}")
    if not restored.kept:
        return restored.params
    flat = reading.flatten(abstract)
    missing = traverse_util.unflatten_dict(
        {name: flat[name] for name in restored.kept}, sep="/"
    )
    fresh = init_params(model, rng, batch, missing, partitioning)
    return freezing.merge_frozen(fresh, restored.params)


def resume(
    path: str, model: Any, abstract: TrainState, window: Any
) -> tuple[TrainState, Any]:
    """The state of a checkpoint, and the metrics of its unfinished window.

    Raises:
      UserError: if it does not fit the model.
      UnreadableCheckpointError: if it is damaged, or what it holds is not finite.
    """
    identity.check_vocabularies(path, model)
    identity.check_lora(path, model)
    tree = reading.restore_tree(path, to_checkpoint_tree(abstract))
    saved = reading.read_record(path).get("window", {})
    window = jax.tree_util.tree_map_with_path(
        lambda key, leaf: _restored(saved.get(jax.tree_util.keystr(key)), leaf, path),
        window,
    )
    state = from_checkpoint_tree(tree, abstract)
    if names := finite.not_finite(state):
        raise damage.UnreadableCheckpointError(
            f"checkpoint {path} holds NaN or infinite values in {names}"
        )
    return state, window


def _restored(value: Any, leaf: Any, path: str) -> Any:
    if value is None:
        return leaf
    with damage.said(path):
        array = np.asarray(value, leaf.dtype)
        if array.shape != leaf.shape:
            raise ValueError("the metrics in its run/metadata have another shape")
        return jax.device_put(array, leaf.sharding)


def to_measure(path: str) -> tuple[str, ...]:
    """What of `measures` was stopped at a checkpoint's step: it is all done again."""
    unfinished = reading.read_record(path).get(_UNFINISHED, ())
    return (measures.LOSS,) if unfinished is True else tuple(unfinished)


def mark_as_measured(path: str, values: Mapping[str, float]) -> None:
    """Records that a checkpoint's step is measured and logged, and the values."""
    saved = reading.read_record(path)
    del saved[_UNFINISHED]
    with whole_files.replacing(reading.record_file(path)) as file:
        json.dump(saved | best.measured(values), file)


@contextlib.contextmanager
def explained(model_dir: str, step: int) -> Iterator[None]:
    """Says, of a checkpoint that cannot be gone on from, from which one can be."""
    try:
        yield
    except damage.UnreadableCheckpointError as error:
        raise damage.UnreadableCheckpointError(
            f"{str(error).rstrip('.')}. Nothing was removed. {_way_on(model_dir, step)}"
        ) from error


def _way_on(model_dir: str, step: int) -> str:
    path = reading.checkpoint_path(model_dir, step)
    move = f"mv {shlex.quote(path)} {shlex.quote(path + '.damaged')}"
    older = [s for s in reading.complete_steps(model_dir) if s < step]
    if not older:
        return (
            f"There is no older checkpoint in {model_dir}: restore this one, or move "
            f"it away ({move}), and the same command starts from the beginning."
        )
    good = reading.checkpoint_path(model_dir, older[-1])
    values = {"INITIAL_CHECKPOINT": good, "MODEL_DIR": f"{model_dir}_2"}
    bindings = " ".join(gin_argument(name, value) for name, value in values.items())
    return (
        f"The older {os.path.basename(good)} is there: move the damaged one away with "
        f"`{move}`, and the same command goes on from step {older[-1]}. To begin anew "
        "from its parameters alone, in another directory, add "
        f"`--gin_file=gin_configs/runs/from_checkpoint.gin {bindings}`."
    )
