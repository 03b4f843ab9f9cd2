"""Parameters of a checkpoint: all of them, or those that rules take."""

import collections
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import (
    identity,
    int8_restore,
    position_tables,
    reading,
)
from vit22b_transfer.models import distillation, freezing, lora

Tree = Any

# Between a tower and a text model.
_PROJECTION = "encoder/projection/"


@dataclasses.dataclass(frozen=True)
class PartialRestore:
    """What `restore_partial` read: a subtree of the parameters, and all the names.

    loaded: parameter -> name in the checkpoint. kept: parameters that keep their fresh
    values. unused: what the checkpoint has and the model did not take.
    """

    params: Tree
    loaded: Mapping[str, str]
    kept: Sequence[str]
    unused: Sequence[str]

    def summary(self) -> str:
        """Counts and names, one line per name; numbered layers share a line."""
        loaded = [
            name if name == source else f"{name} <- {source}"
            for name, source in self.loaded.items()
        ]
        parts = (("loaded", loaded), ("kept", self.kept), ("unused", self.unused))
        lines = []
        for title, names in parts:
            lines.append(f"{title}: {len(names)}")
            counts = collections.Counter(re.sub(r"\d+", "*", name) for name in names)
            for name, count in counts.items():
                lines.append(f"  {name}" + (f"  (x{count})" if count > 1 else ""))
        return "\n".join(lines)


def restore_partial(
    path: str,
    abstract_params: Tree,
    rules: Sequence[tuple[str, str | None]] = (),
    *,
    cast: bool = False,
    model: Any = None,
) -> PartialRestore:
    """Those parameters that the rules take from a checkpoint.

    A rule is (pattern over a whole parameter path, name in the checkpoint), where the
    name may refer to the pattern's groups (`\\1`), and None means: do not load. The
    first matching rule decides; a parameter without one is loaded under its own name.
    With `cast`, values are converted to the model's dtypes; without, another dtype is
    an error. The vocabularies of a `model` are compared if its token table is loaded.
    From a checkpoint without low-rank updates, those of the model are not loaded: they
    start at zero. Kernels that the model has in int8 may be saved in floating point.

    Raises:
      UserError: if a rule matches no parameter, two parameters have one source, or an
        array is missing in the checkpoint or of another shape or dtype.
    """
    path = reading.resolve(path)
    flat = reading.flatten(abstract_params)
    saved = {
        name.removeprefix("target/"): leaf
        for name, leaf in reading.saved_arrays(path).items()
        if name.startswith("target/")
    }
    if _has_updates(flat) and not _has_updates(saved):
        rules = ((lora.UPDATES, None), *rules)
    sources = _sources(flat, rules)
    if model is not None and any(
        name.startswith("token_embedder/") for name in sources
    ):
        identity.check_vocabularies(path, model)
    if model is not None and _has_updates(sources):
        identity.check_lora(path, model)
    by_source = {source: flat[name] for name, source in sources.items()}
    stored = int8_restore.as_saved(by_source, saved)
    read_as = {name: source for name, source in sources.items() if source in stored}
    wanted = {name: stored[source] for name, source in read_as.items()}
    reading.check_fit(path, read_as, wanted, saved, cast=cast)
    read = int8_restore.read_arrays(
        path, {"target": traverse_util.unflatten_dict(by_source, sep="/")}
    )
    values = reading.flatten(read["target"])
    params = {name: values[source] for name, source in sources.items()}
    return PartialRestore(
        params=traverse_util.unflatten_dict(params, sep="/"),
        loaded=sources,
        kept=[name for name in flat if name not in sources],
        unused=[name for name in saved if name not in by_source],
    )


def restore_initial(
    path: str,
    abstract_params: Tree,
    rules: Sequence[tuple[str, str | None]] = (),
    *,
    cast: bool = False,
    image_size: tuple[int, int] | None = None,
    model: Any,
) -> PartialRestore:
    """As `restore_partial`, for a training that starts from these parameters.

    image_size: (height, width) in pixels that the checkpoint was trained with, if they
      are not the model's: the tower's position table is resampled.

    Raises:
      UserError: as `restore_partial`; if a parameter is neither loaded nor trained; if
        `image_size` has no effect.
    """
    saved = abstract_params
    if image_size is not None:
        flat = reading.flatten(abstract_params)
        saved = position_tables.as_of(flat, model, image_size)
        saved = traverse_util.unflatten_dict(saved, sep="/")
    restored = restore_partial(path, saved, rules, cast=cast, model=model)
    if image_size is not None:
        restored = _resampled(restored, flat, model, image_size)
    mask = reading.flatten(freezing.frozen_mask(abstract_params, model.frozen))
    check_none_stays_random([name for name in restored.kept if mask[name]], path)
    return restored


def _resampled(restored, abstract, model, image_size):
    table = position_tables.TABLE
    if table not in restored.loaded:
        raise UserError(
            f"the initial checkpoint's image_size={tuple(image_size)} has no effect: "
            f"the rules do not load {table}. Leave one of them out."
        )
    flat = dict(reading.flatten(restored.params))
    flat[table] = position_tables.resampled(
        flat[table], abstract[table], model, image_size
    )
    loaded = {**restored.loaded}
    loaded[table] += f", resampled from {image_size[0]}x{image_size[1]} pixels"
    params = traverse_util.unflatten_dict(flat, sep="/")
    return dataclasses.replace(restored, params=params, loaded=loaded)


def check_frozen_are_loaded(
    path: str,
    abstract_params: Tree,
    frozen: Sequence[str],
    rules: Sequence[tuple[str, str | None]] | None,
) -> None:
    """Raises UserError if T5X's own restore leaves a frozen parameter fresh.

    rules: T5X's `assignment_map`: over names that begin with `target/`, the first one
      that matches decides, None means fresh; T5X refuses a name that is not there.
    """
    saved = reading.saved_arrays(reading.resolve(path))
    mask = reading.flatten(freezing.frozen_mask(abstract_params, frozen))

    def is_fresh(name):
        for pattern, to in rules or ():
            if re.fullmatch(pattern, name):
                return to is None
        return name not in saved

    names = [name for name, is_frozen in mask.items() if is_frozen]
    check_none_stays_random([n for n in names if is_fresh(f"target/{n}")], path)


def check_t5x_restores_the_same(path: str, initial: Any | None) -> None:
    """Raises UserError if T5X's restore of `path` is not what a recipe starts from.

    initial: the recipe's `train.InitialCheckpoint`, if it names one. T5X takes
      everything under its own name, in its own dtype and size; the rest is fresh.
    """
    if initial is None:
        return
    saved = reading.saved_arrays(reading.resolve(path))
    names = [n.removeprefix("target/") for n in saved if n.startswith("target/")]
    kept = [
        (pattern, to)
        for pattern, to in initial.rules
        if to is not None or any(re.fullmatch(pattern, name) for name in names)
    ]
    said = None
    if reading.resolve(initial.path) != reading.resolve(path):
        said = f"{initial.path}, but INITIAL_CHECKPOINT_PATH is {path}"
    elif kept:
        said = f"{path} by the rule {kept[0]}, but T5X takes all of it as it is"
    elif initial.cast:
        said = f"{path} with cast=True, but T5X casts nothing here"
    elif initial.image_size is not None:
        said = f"{path} of another image_size, but T5X resamples nothing here"
    if said:
        raise UserError(
            f"the recipe starts from {said}. Name t5x_train.gin in place of "
            "t5x_finetune.gin: it goes by the recipe's initial checkpoint."
        )


def check_none_stays_random(names: Sequence[str], path: str) -> None:
    """Raises UserError if there are frozen parameters that nothing was loaded for."""
    if names:
        raise UserError(
            f"{names[0]} (one of {len(names)}) is neither loaded from the initial "
            f"checkpoint {path} nor trained, so it would stay random. Choose "
            "other rules of InitialCheckpoint or other `frozen` patterns of the model; "
            "with LoRA, LoraConfig.trained names what is trained beside its updates."
        )


def check_nothing_is_given(model: Any, path: str | None) -> None:
    """Raises UserError if a model must not start from fresh parameters alone.

    Its `given` are patterns of parameters that only a checkpoint can give. path: of the
    initial checkpoint; None: there is none.
    """
    if path is None and (given := getattr(model, "given", ())):
        raise UserError(
            f"{', '.join(given)} is learned from and not trained, so a checkpoint has "
            "to give it, but this training has no initial checkpoint. Name one: "
            "gin_configs/runs/distill.gin has TEACHER_CHECKPOINT."
        )


def has_teacher(abstract_params: Tree) -> bool:
    """Whether a model holds the teacher of a distillation; a student alone does not."""
    return any(map(distillation.is_of_lesson, reading.flatten(abstract_params)))


def teacher_left_out(path: str, abstract_params: Tree) -> int:
    """How many arrays of a distillation's teacher a student alone does not take."""
    if has_teacher(abstract_params):
        return 0
    names = reading.saved_arrays(reading.resolve(path))
    return sum(map(distillation.is_of_lesson, names))


def restore_whole(path: str, abstract_params: Tree, *, model: Any = None) -> Tree:
    """All parameters of a checkpoint, int8 kernels as in `restore_partial`.

    Raises:
      UserError: as `restore_partial`, and if anything is left over on either side, but
        for the teacher of a student alone.
    """
    restored = restore_partial(path, abstract_params, model=model)
    unused = restored.unused
    if not has_teacher(abstract_params):
        unused = [name for name in unused if not distillation.is_of_lesson(name)]
    if left := [*restored.kept, *unused]:
        raise UserError(
            f"checkpoint {path} does not fit the model: {len(left)} arrays are in one "
            f"of them only, such as {left[0]}. Use the model that it was written with."
        )
    return restored.params


def _has_updates(names):
    return any(re.fullmatch(lora.UPDATES, name) for name in names)


def _sources(flat, rules):
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, name) for name in flat):
            near = difflib.get_close_matches(pattern, flat, n=3, cutoff=0.0)
            raise UserError(
                f"restore rule {pattern!r} matches no parameter; rules are regular "
                f"expressions over whole paths. Nearest paths: {', '.join(near)}."
            )
    sources = {}
    for name in flat:
        matches = ((re.fullmatch(pattern, name), to) for pattern, to in rules)
        match, to = next(((m, to) for m, to in matches if m), (None, name))
        if to is not None:
            source = match.expand(to) if match else name
            if source in sources.values():
                raise UserError(
                    f"the restore rules give {source!r} of the checkpoint to {name} "
                    "and to another parameter; every parameter needs its own."
                )
            sources[name] = source
    return sources


def check_trained_together(path: str, abstract_params: reading.Tree) -> None:
    """Raises UserError if a model with a tower is to be read from parts of it."""
    ours = reading.flatten(abstract_params)
    if any(name.startswith(_PROJECTION) for name in ours) and not any(
        name.startswith(f"target/{_PROJECTION}") for name in reading.saved_arrays(path)
    ):
        raise UserError(
            f"{path} has no projection between them: tower and text model have not "
            "been trained together: train first."
        )


def restore_params(
    path: str,
    abstract_params: reading.Tree,
    shardings: reading.Tree,
    *,
    model: Any = None,
) -> reading.Tree:
    """The parameters of a checkpoint (or of the latest in a `model_dir`), and no more.

    With a `model`, its vocabularies and the factor of its low-rank updates must be
    those that the checkpoint was trained with.

    Raises:
      UserError: naming every parameter that is missing, left over (but for the teacher
        of a student alone), or of another shape or dtype.
    """
    path = reading.resolve(path)
    if model is not None:
        check_trained_together(path, abstract_params)
        identity.check_vocabularies(path, model)
        identity.check_lora(path, model)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        abstract_params,
        shardings,
    )
    tree = {"target": abstract}
    alone = not has_teacher(abstract_params)
    lesson = tuple(f"target/{name}" for name in distillation.OF_LESSON)
    spared = lesson if alone else ()
    return reading.restore_tree(path, tree, spared=spared)["target"]
