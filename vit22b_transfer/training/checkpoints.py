"""Checkpoints in T5X's directory layout, written by Orbax in the background.

`model_dir/checkpoint_<step>/state` holds `{'target': params, 'state': {'step',
'param_states'}}`, so that T5X restores what we write and the other way round. Beside it
`run` (which T5X does not read) holds what else a run needs: the fingerprints of the
vocabularies and the metrics of an unfinished logging window. The older format of T5X
(see `legacy_checkpoints`) is read wherever a checkpoint is, and never written.
"""

import difflib
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from vit22b_transfer.training import legacy_checkpoints

Tree = Any

_NAME = re.compile(r"checkpoint_(\d+)")
_SHOWN = 20
_TOWER = "target/encoder/tower/"


# --- Directories ---


def prepare_model_dir(model_dir: str) -> str:
    """The absolute path of `model_dir`, created and known to be writable.

    Raises:
      ValueError: if it cannot be created or written; before any work is lost.
    """
    path = os.path.abspath(os.path.expanduser(model_dir))
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"model_dir {model_dir!r} ({path}) cannot be written: {error.strerror}. "
            "Choose a directory that you may write to."
        ) from error
    return path


def complete_steps(model_dir: str) -> list[int]:
    """Steps of the finished checkpoints in `model_dir`, ascending."""
    if not os.path.isdir(model_dir):
        return []
    found = (_NAME.fullmatch(name) for name in os.listdir(model_dir))
    steps = sorted(int(match[1]) for match in found if match)
    return [step for step in steps if is_complete(checkpoint_path(model_dir, step))]


def latest_step(model_dir: str) -> int | None:
    """The newest finished checkpoint's step, or None."""
    steps = complete_steps(model_dir)
    return steps[-1] if steps else None


def checkpoint_path(model_dir: str, step: int) -> str:
    """Where the checkpoint of `step` lies."""
    return os.path.join(model_dir, f"checkpoint_{step}")


def is_complete(path: str) -> bool:
    """Whether `path` is a checkpoint that was written to its end."""
    # Both formats are renamed into place when all is written; a partial copy lacks some
    # of these.
    needed = ("state/_METADATA", "state/manifest.ocdbt")
    return legacy_checkpoints.is_legacy(path) or all(
        os.path.isfile(os.path.join(path, name)) for name in needed
    )


def resolve(path: str) -> str:
    """The absolute path of a checkpoint: `path` itself, or the latest inside it.

    Raises:
      ValueError: if there is no finished checkpoint.
    """
    absolute = os.path.abspath(os.path.expanduser(path))
    if is_complete(absolute):
        return absolute
    step = latest_step(absolute)
    if step is not None:
        return checkpoint_path(absolute, step)
    if not os.path.isdir(absolute):
        raise ValueError(f"checkpoint {path!r}: there is no directory {absolute}.")
    holds = ", ".join(sorted(os.listdir(absolute))[:_SHOWN]) or "nothing"
    raise ValueError(
        f"checkpoint {path!r}: {absolute} is no finished checkpoint and holds no "
        f"checkpoint_<step> that is one. It holds: {holds}."
    )


# --- Writing ---


class CheckpointWriter:
    """Writes the checkpoints of one run without holding up its loop.

    `save` returns as soon as the arrays are safe from later steps, and waits only for
    the save before it. After a save has finished, all but the newest `keep` checkpoints
    in `model_dir` are removed (None keeps all), of those that this class wrote: what
    T5X left there stays.
    """

    def __init__(self, model_dir: str, keep: int | None = 1):
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep} must be at least 1, or None to keep all.")
        self.model_dir = model_dir
        self.keep = keep
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.AsyncOptions(timeout_secs=3600),
        )
        self._remove(
            name
            for name in os.listdir(model_dir)
            if re.fullmatch(_NAME.pattern + r"\.orbax-checkpoint-tmp.*", name)
        )

    def save(self, step: int, tree: Tree, record: Mapping[str, Any]) -> None:
        """Starts writing `tree` (see `to_checkpoint_tree`) and a JSON `record`."""
        self.wait()
        path = checkpoint_path(self.model_dir, step)
        if os.path.isdir(path) and not is_complete(path):
            self._remove([os.path.basename(path)])
        self._orbax.save(
            path,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(tree), run=ocp.args.JsonSave(dict(record))
            ),
        )

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises what went wrong."""
        self._orbax.wait_until_finished()
        if self.keep is not None:
            steps = complete_steps(self.model_dir)
            paths = {step: checkpoint_path(self.model_dir, step) for step in steps}
            own = [step for step in steps if _is_own(paths[step])]
            self._remove(f"checkpoint_{step}" for step in own[: -self.keep])

    def close(self) -> None:
        """Finishes the last save."""
        self.wait()
        self._orbax.close()

    def _remove(self, names):
        if jax.process_index() == 0:
            for name in names:
                shutil.rmtree(os.path.join(self.model_dir, name))


# --- Reading ---


def restore_tree(path: str, abstract: Tree) -> Tree:
    """A whole checkpoint, or the top-level parts of it that `abstract` has.

    `abstract` holds shapes, dtypes and the shardings to read straight into.

    Raises:
      ValueError: naming every array that is missing, left over, or of another shape or
        dtype than `abstract`'s.
    """
    path = resolve(path)
    wanted, saved = flatten(abstract), saved_arrays(path)
    problems = [
        f"{name}: not in the model"
        for name in _own_arrays(path)
        if name.split("/")[0] in abstract and name not in wanted
    ]
    check_fit(path, {name: name for name in wanted}, wanted, saved, problems)
    return read_arrays(path, abstract)


def restore_params(
    path: str, abstract_params: Tree, shardings: Tree, *, model: Any = None
) -> Tree:
    """The parameters of a checkpoint (or of the latest in a `model_dir`), and no more.

    With a `model`, its vocabularies and the factor of its low-rank updates must be
    those that the checkpoint was trained with.

    Raises:
      ValueError: naming every parameter that is missing, left over, or of another shape
        or dtype.
    """
    path = resolve(path)
    if model is not None:
        check_vocabularies(path, model)
        check_lora(path, model)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        abstract_params,
        shardings,
    )
    return restore_tree(path, {"target": abstract})["target"]


def check_fit(
    path: str,
    sources: Mapping[str, str],
    wanted: Mapping[str, Any],
    saved: Mapping[str, Any],
    problems: Sequence[str] = (),
    *,
    cast: bool = False,
) -> None:
    """Raises ValueError unless each wanted array has a source of its shape and dtype.

    `sources` maps names in `wanted` to names in `saved`; `problems` were found before.
    With `cast` the dtypes may differ.
    """
    problems = list(problems)
    for name, source in sources.items():
        expected, found = wanted[name], saved.get(source)
        shown = name if name == source else f"{name} (from {source})"
        if found is None:
            near = difflib.get_close_matches(source, saved, n=3, cutoff=0.6)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            problems.append(f"{shown}: not in the checkpoint{hint}")
        elif tuple(found.shape) != tuple(expected.shape):
            problems.append(
                f"{shown}: shape {tuple(found.shape)} in the checkpoint, "
                f"{tuple(expected.shape)} in the model"
            )
        elif found.dtype != expected.dtype and not cast:
            problems.append(
                f"{shown}: dtype {found.dtype} in the checkpoint, {expected.dtype} in "
                "the model"
            )
    if problems:
        rest = len(problems) - _SHOWN
        more = [f"and {rest} more"] if rest > 0 else []
        lines = "\n  ".join(problems[:_SHOWN] + more)
        raise ValueError(
            f"checkpoint {path} does not fit the model:\n  {lines}\n{_advice(problems)}"
        )


def _advice(problems):
    if all(problem.startswith("state/param_states/") for problem in problems):
        return (
            "Its parameters fit; its optimizer state is of another optimizer or of "
            "other frozen parameters. Train on with those, or load the parameters "
            "alone into a new model_dir: an initial checkpoint "
            "(gin_configs/runs/from_checkpoint.gin)."
        )
    return (
        "Use the model that it was written with, or an initial checkpoint with rules "
        "(and cast=True for other dtypes)."
    )


def read_arrays(path: str, abstract: Tree) -> Tree:
    """The arrays of `abstract`, unchecked, in its dtypes and shardings.

    Orbax neither refuses another shape nor another dtype: call `check_fit` before.
    """
    flat = flatten(abstract)
    borrowed = {name for name in flat if name.startswith(_TOWER)}
    if borrowed and "tower" in read_record(path):
        borrowed -= _own_arrays(path).keys()
    else:
        borrowed = set()
    if borrowed:
        read = read_arrays(_origin_of_tower(path), _part(flat, borrowed))
        if own := flat.keys() - borrowed:
            own = _read_own_arrays(path, _part(flat, own))
            read = traverse_util.unflatten_dict(
                traverse_util.flatten_dict(read) | traverse_util.flatten_dict(own)
            )
        return read
    return _read_own_arrays(path, abstract)


def _part(flat, names):
    return traverse_util.unflatten_dict({n: flat[n] for n in sorted(names)}, sep="/")


def _read_own_arrays(path, abstract):
    if legacy_checkpoints.is_legacy(path):
        return legacy_checkpoints.read_arrays(path, abstract)
    arguments = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        ),
        abstract,
    )
    with ocp.PyTreeCheckpointer() as orbax:
        return orbax.restore(
            os.path.join(path, "state"),
            args=ocp.args.PyTreeRestore(
                abstract, restore_args=arguments, partial_restore=True
            ),
        )


def saved_arrays(path: str) -> dict[str, Any]:
    """Shape and dtype of every array in a checkpoint, by '/'-joined name.

    One that was trained on cached features counts the tower of the checkpoint that its
    record names as its own.
    """
    own = _own_arrays(path)
    if "tower" in read_record(path) and not any(
        name.startswith(_TOWER) for name in own
    ):
        own |= tower_arrays(_origin_of_tower(path))
    return own


def tower_arrays(path: str) -> dict[str, Any]:
    """Shape and dtype of the tower's arrays, by '/'-joined name; empty without one."""
    saved = saved_arrays(path)
    return {name: leaf for name, leaf in saved.items() if name.startswith(_TOWER)}


def _origin_of_tower(path):
    """The checkpoint with the tower whose cached features `path` was trained on."""
    # Here, because it reads checkpoints itself.
    from vit22b_transfer.training import tower_weights

    record = read_record(path)["tower"]
    origin = record["checkpoint"]
    if not is_complete(origin):
        raise ValueError(
            f"checkpoint {path} was trained on cached features and has no tower of its "
            f"own; it is in {origin}, which is not there. Put it back."
        )
    if tower_weights.digest(origin) != record["digest"]:
        raise ValueError(
            f"checkpoint {path} was trained on cached features of the tower in "
            f"{origin}, but now there is another tower. Put the old one back."
        )
    return origin


def _own_arrays(path):
    if legacy_checkpoints.is_legacy(path):
        return legacy_checkpoints.saved_arrays(path)
    # Not a Checkpointer: it warns that `state` alone is not a whole checkpoint.
    handler = ocp.PyTreeCheckpointHandler()
    try:
        metadata = handler.metadata(pathlib.Path(path) / "state")
    finally:
        handler.close()
    return flatten(metadata.tree)


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts as one dict with '/'-joined names."""
    return traverse_util.flatten_dict(tree, sep="/")


# --- The record beside the arrays ---


def vocabulary_record(model: Any) -> dict[str, Any]:
    """Class, size and content hash of both vocabularies, to compare at restore."""
    record = {}
    for name in ("input_vocabulary", "output_vocabulary"):
        vocabulary = getattr(model, name)
        kind, size = type(vocabulary).__name__, int(vocabulary.vocab_size)
        # A SentencePiece vocabulary has its whole model; others are what they are
        # called and how large they are.
        content = getattr(vocabulary, "sp_model", None) or f"{kind} {size}".encode()
        digest = hashlib.sha256(content).hexdigest()
        record[name] = {"class": kind, "size": size, "sha256": digest}
    return record


def check_vocabularies(path: str, model: Any) -> None:
    """Raises ValueError unless the model's vocabularies are the checkpoint's.

    Checkpoints that other programs wrote record none; then there is nothing to compare.
    """
    path = resolve(path)
    saved = read_record(path).get("vocabularies", {})
    for name, ours in vocabulary_record(model).items():
        theirs = saved.get(name, ours)
        if theirs["sha256"] != ours["sha256"]:
            raise ValueError(
                f"the model's {name} is not the one that {path} was trained with: "
                f"there {_describe(theirs)}, here {_describe(ours)}. Use the "
                "vocabulary of the run that wrote the checkpoint."
            )


def lora_record(model: Any) -> dict[str, float]:
    """What the arrays do not tell of a model's low-rank updates; empty without any."""
    lora = getattr(model, "lora", None)
    return {} if lora is None else {"alpha": lora.alpha}


def check_lora(path: str, model: Any) -> None:
    """Raises ValueError if the model scales its updates otherwise than the checkpoint.

    Checkpoints that other programs wrote do not record it.
    """
    path, ours = resolve(path), lora_record(model)
    theirs = read_record(path).get("lora") or ours
    if ours and ours != theirs:
        raise ValueError(
            f"the model's LoRA has alpha {ours['alpha']}, but {path} was trained with "
            f"{theirs['alpha']}: set LoraConfig.alpha = {theirs['alpha']}."
        )


def _describe(vocabulary):
    return (
        f"{vocabulary['class']} with {vocabulary['size']} tokens "
        f"(sha256 {vocabulary['sha256'][:12]})"
    )


def read_record(path: str) -> dict[str, Any]:
    """The JSON record of a checkpoint; empty if another program wrote it."""
    file = _record_file(resolve(path))
    if not os.path.isfile(file):
        return {}
    with open(file, encoding="utf-8") as stream:
        return json.load(stream)


def _is_own(path):
    """Whether a run of ours wrote a checkpoint; neither T5X nor an import did."""
    is_recorded = os.path.isfile(_record_file(path))
    return is_recorded and not read_record(path).get("imported")


def _record_file(path):
    return os.path.join(path, "run", "metadata")
