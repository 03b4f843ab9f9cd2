"""Checkpoints in T5X's directory layout: where they lie, what they hold, reading it.

`model_dir/checkpoint_<step>/state` holds `{'target': params, 'state': {'step',
'param_states'}}`, so that T5X restores what we write and the other way round. Beside it
`run` (which T5X does not read) holds what else a run needs: the fingerprints of the
vocabularies and the metrics of an unfinished logging window. The older format of T5X
(see `legacy`) is read wherever a checkpoint is, and never written.
"""

import contextlib
import difflib
import functools
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import (
    damage,
    fingerprints,
    legacy,
    orbax_noise,
    run_records,
    stored_sizes,
)
from vit22b_transfer.host import file_errors, json_files

Tree = Any

STEP_NAME = re.compile(r"checkpoint_(\d+)")
_SHOWN = 20
_COMPARED = 5_000
# What Orbax says of an array takes 400 bytes: this is room for 40,000.
_METADATA_BYTES = 16 << 20
_TOWER = "target/encoder/tower/"
_RECORD_ADVICE = (
    "Restore it, or remove that file: the arrays are then read for themselves, and "
    "what the checkpoint was trained with is not compared."
)


def complete_steps(model_dir: str) -> list[int]:
    """Steps of the finished checkpoints in `model_dir`, ascending."""
    if not os.path.isdir(model_dir):
        return []
    found = (STEP_NAME.fullmatch(name) for name in os.listdir(model_dir))
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
    return legacy.is_legacy(path) or all(
        os.path.isfile(os.path.join(path, name)) for name in needed
    )


def resolve(path: str) -> str:
    """The absolute path of a checkpoint: `path` itself, or the latest inside it.

    Raises:
      UserError: if there is no finished checkpoint.
    """
    absolute = os.path.abspath(os.path.expanduser(path))
    if is_complete(absolute):
        return absolute
    step = latest_step(absolute)
    if step is not None:
        return checkpoint_path(absolute, step)
    if not os.path.isdir(absolute):
        raise UserError(f"checkpoint {path!r}: there is no directory {absolute}.")
    shown = [name for name in sorted(os.listdir(absolute)) if not name.startswith(".")]
    holds = ", ".join(shown[:_SHOWN]) or "nothing"
    raise UserError(
        f"checkpoint {path!r}: {absolute} is no finished checkpoint and holds no "
        f"checkpoint_<step> that is one. It holds: {holds}."
    )


# --- Reading ---


def restore_tree(path: str, abstract: Tree, *, spared: tuple[str, ...] = ()) -> Tree:
    """A whole checkpoint, or the top-level parts of it that `abstract` has.

    `abstract` holds shapes, dtypes and the shardings to read straight into.
    spared: how names begin that may be left over.

    Raises:
      UserError: naming every array that is missing, left over, or of another shape or
        dtype than `abstract`'s.
    """
    path = resolve(path)
    wanted, saved = flatten(abstract), saved_arrays(path)
    problems = [
        f"{name}: not in the model"
        for name in _arrays_in(path)
        if name.split("/")[0] in abstract
        and name not in wanted
        and not name.startswith(spared)
    ]
    check_fit(path, {name: name for name in wanted}, wanted, saved, problems)
    return read_arrays(path, abstract)


def check_fit(
    path: str,
    sources: Mapping[str, str],
    wanted: Mapping[str, Any],
    saved: Mapping[str, Any],
    problems: Sequence[str] = (),
    *,
    cast: bool = False,
) -> None:
    """Raises UserError unless each wanted array has a source of its shape and dtype.

    `sources` maps names in `wanted` to names in `saved`; `problems` were found before.
    With `cast` the dtypes may differ.
    """
    problems = list(problems)
    for name, source in sources.items():
        expected, found = wanted[name], saved.get(source)
        shown = name if name == source else f"{name} (from {source})"
        if found is None:
            # To compare every name with every other takes minutes.
            few = len(problems) < _SHOWN and len(saved) < _COMPARED
            near = difflib.get_close_matches(source, saved if few else (), cutoff=0.6)
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
        raise UserError(
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
    if all("/position_embedding/" in problem for problem in problems):
        return (
            "It was trained on images of another size. Take that size, or start from "
            "it with its table resampled (gin_configs/runs/from_other_size.gin)."
        )
    return (
        "Use the model that it was written with, or an initial checkpoint with rules "
        "(and cast=True for other dtypes)."
    )


def read_arrays(path: str, abstract: Tree) -> Tree:
    """The arrays of `abstract`, unchecked, in its dtypes and shardings.

    Orbax neither refuses another shape nor another dtype: call `check_fit` before.

    Raises:
      UserError: if the files are damaged.
    """
    flat = flatten(abstract)
    borrowed = {name for name in flat if name.startswith(_TOWER)}
    if borrowed and "tower" in read_record(path):
        borrowed -= _arrays_in(path).keys()
    else:
        borrowed = set()
    if borrowed:
        read = read_arrays(_origin_of_tower(path), _part(flat, borrowed))
        if own := flat.keys() - borrowed:
            own = _read_from(path, _part(flat, own))
            read = traverse_util.unflatten_dict(
                traverse_util.flatten_dict(read) | traverse_util.flatten_dict(own)
            )
        return read
    return _read_from(path, abstract)


def _part(flat, names):
    return traverse_util.unflatten_dict({n: flat[n] for n in sorted(names)}, sep="/")


def _read_from(path, abstract):
    if legacy.is_legacy(path):
        return legacy.read_arrays(path, abstract)
    arguments = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        ),
        abstract,
    )
    damage.check_index(path)
    with _reading(path), ocp.PyTreeCheckpointer() as orbax:
        return orbax.restore(
            os.path.join(path, "state"),
            args=ocp.args.PyTreeRestore(
                abstract, restore_args=arguments, partial_restore=True
            ),
        )


def saved_arrays(path: str) -> dict[str, Any]:
    """Shape and dtype of every array in a checkpoint, by '/'-joined name.

    After a training on cached features, with the tower of the checkpoint that its
    record names.
    """
    arrays = _arrays_in(path)
    if "tower" in read_record(path) and not any(
        name.startswith(_TOWER) for name in arrays
    ):
        arrays |= tower_arrays(_origin_of_tower(path))
    return arrays


def tower_arrays(path: str) -> dict[str, Any]:
    """Shape and dtype of the tower's arrays, by '/'-joined name; empty without one."""
    saved = saved_arrays(path)
    return {name: leaf for name, leaf in saved.items() if name.startswith(_TOWER)}


def _origin_of_tower(path):
    """The checkpoint with the tower whose cached features `path` was trained on."""
    record = read_record(path)["tower"]
    origin = record["checkpoint"]
    _check_chain(path)
    if not is_complete(origin):
        raise UserError(
            f"checkpoint {path} was trained on cached features and has no tower of its "
            f"own; it is in {origin}, which is not there. Put it back."
        )
    if tower_digest(origin) != record["digest"]:
        raise UserError(
            f"checkpoint {path} was trained on cached features of the tower in "
            f"{origin}, but now there is another tower. Put the old one back."
        )
    return origin


def _check_chain(path):
    """Raises UserError if records of towers name each other in a circle."""
    seen, at = [], path
    while os.path.isdir(at) and is_complete(at) and "tower" in read_record(at):
        if at in seen:
            raise UserError(
                f"checkpoint {path}: the record of {seen[-1]} names {at} for its "
                f"tower, whose record leads back to it. {damage.ADVICE}"
            )
        seen.append(at)
        at = read_record(at)["tower"]["checkpoint"]


def _arrays_in(path):
    """Shape and dtype of the arrays that lie in `path`, no tower from elsewhere."""
    if legacy.is_legacy(path):
        return legacy.saved_arrays(path)
    leaves = flatten(metadata(os.path.join(path, "state")))
    # Orbax also stores texts, which no run of ours or T5X's writes.
    return {n: leaf for n, leaf in leaves.items() if hasattr(leaf, "shape")}


def metadata(path: str) -> Tree:
    """Nested dicts of what Orbax says of the arrays in a directory, unread.

    Raises:
      UserError: if it is damaged, or has chunks that the files cannot.
    """
    # Not a Checkpointer: it warns that `state` alone is not a whole checkpoint.
    handler = ocp.PyTreeCheckpointHandler()
    with _reading(path), contextlib.closing(handler):
        for name in ("_METADATA", "_sharding"):
            file = os.path.join(path, name)
            if os.path.isfile(file):
                json_files.read_object(file, limit=_METADATA_BYTES)
        tree = handler.metadata(pathlib.Path(path)).tree
        stored = stored_sizes.of_directory(path)
        for name, leaf in flatten(tree).items():
            storage = getattr(leaf, "storage", None)
            if storage is not None and storage.chunk_shape is not None:
                with file_errors.naming(f"{path}: {name}"):
                    stored_sizes.check_chunk(
                        leaf.shape, storage.chunk_shape, leaf.dtype.itemsize, stored
                    )
    return tree


@contextlib.contextmanager
def _reading(path):
    # Of several arrays that Orbax opens at a time it raises one error, and Python logs
    # the others with their tracebacks.
    orbax_noise.hush()
    log = logging.getLogger("asyncio")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with damage.said(path):
            yield
    finally:
        log.setLevel(level)


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts as one dict with '/'-joined names."""
    return traverse_util.flatten_dict(tree, sep="/")


def read_record(path: str) -> dict[str, Any]:
    """The JSON record of a checkpoint; empty if another program wrote it.

    Raises:
      UnreadableCheckpointError: if it is damaged.
    """
    path = resolve(path)
    file = record_file(path)
    if not os.path.isfile(file):
        return {}
    with damage.said(path):
        return run_records.read(file, _RECORD_ADVICE)


def is_ours(path: str) -> bool:
    """Whether a run of ours wrote a checkpoint; neither T5X nor an import did.

    Of a damaged one that is not known, and so it is not.
    """
    if not os.path.isfile(record_file(path)):
        return False
    try:
        return not read_record(path).get("imported")
    except damage.UnreadableCheckpointError:
        return False


def record_file(path: str) -> str:
    """Where a checkpoint has what its arrays do not tell."""
    return os.path.join(path, "run", "metadata")


def tower_digest(path: str) -> str:
    """Hash of the tower's arrays in a checkpoint, as they are stored.

    Raises:
      UserError: if it holds no tower.
    """
    return _digest(*_identity(path), (_TOWER,))


def classifier_digest(path: str) -> str:
    """Hash of a classifier's arrays in a checkpoint, without those of its teacher.

    Raises:
      UserError: if it holds no tower.
    """
    return _digest(*_identity(path), ("target/encoder/", "target/head/"))


def _identity(path):
    """A checkpoint is renamed into place, so another one there is another directory."""
    path = resolve(path)
    return path, os.stat(path).st_ino, os.stat(path).st_mtime_ns


@functools.cache
def _digest(path: str, inode: int, time: int, names: tuple[str, ...]) -> str:
    del inode, time
    if not tower_arrays(path):
        raise UserError(
            f"checkpoint {path} holds no tower (encoder/tower/...). Name one that "
            "does, such as that of `vit22b import`."
        )
    saved = {n: leaf for n, leaf in saved_arrays(path).items() if n.startswith(names)}
    return fingerprints.stored_digest(saved, functools.partial(read_arrays, path))


def tower_record(cache: Any) -> dict[str, Any]:
    """What a checkpoint records of a tower that it lacks: where it is, and its hash."""
    if cache is None:
        return {}
    path = resolve(cache.tower)
    return {"tower": {"checkpoint": path, "digest": tower_digest(path)}}
