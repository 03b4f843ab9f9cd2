"""Registered tasks: found, counted, checked, described."""

import collections
import difflib
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import class_lists, labelled_sources, vocabularies
from vit22b_transfer.data.records import MissingFilesError, MissingSplitError

# Of a line of a description, as terminals have it.
_WIDTH, _NO_BREAK = 80, "\N{NO-BREAK SPACE}"


def names() -> set[str]:
    """Those of all registered tasks and mixtures."""
    return {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def describe() -> Iterator[str]:
    """Lines: each task with splits, features and metrics, then each mixture.

    A long line is broken between items, so that these stay whole on a narrow screen.
    """
    for name in sorted(seqio.TaskRegistry.names()):
        task = seqio.TaskRegistry.get(name)
        yield f"{name}"
        yield from _listed("splits", sorted(task.splits))
        yield from _listed("features", map(_feature, task.output_features.items()))
        yield from _listed("metrics", map(_name, task.metric_fns))
    for name in sorted(seqio.MixtureRegistry.names()):
        mixture = seqio.MixtureRegistry.get(name)
        rates = (f"{task.name} x{mixture.get_rate(task):g}" for task in mixture.tasks)
        yield f"{name}"
        yield from _listed("mixture of", rates)


def _listed(what: str, items: Iterable[str]) -> list[str]:
    whole = [item.replace(" ", _NO_BREAK) for item in items]
    lines = textwrap.wrap(
        f"{what}: {', '.join(whole) or 'none'}",
        width=_WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _name(function: Any) -> str:
    function = getattr(function, "func", function)  # bound by functools.partial
    return getattr(function, "__name__", type(function).__name__)


def _feature(item: tuple[str, Any]) -> str:
    name, feature = item
    size = ""
    if isinstance(feature.vocabulary, class_lists.ClassIds):
        size = ", ids of classes"
    elif feature.rank == 1:
        size = f", {feature.vocabulary.vocab_size} tokens"
    return f"{name} ({feature.dtype.name}, rank {feature.rank}{size})"


@runtime_checkable
class RandomAccess(Protocol):
    """A SeqIO source whose records can be read in any order."""

    def num_records(self, split: str) -> int:
        """Number of records in the split."""
        ...

    def records(self, split: str, order: tf.data.Dataset) -> tf.data.Dataset:
        """One example per index in `order` (int64 scalars), in that order."""
        ...


@runtime_checkable
class _SkipsRecords(Protocol):
    """A source that may leave out bad records, and tells of it."""

    def report(self) -> Mapping[str, Mapping[str, int]]:
        """Split -> reason -> number of records, of the splits read so far."""
        ...


@runtime_checkable
class _TellsDigest(Protocol):
    """A source whose data the task's name does not tell."""

    def digest(self) -> str:
        """A text that is equal for the same data."""
        ...


def find_provider(name: str, split: str) -> seqio.Task | seqio.Mixture:
    """The registered task or mixture of that name, which has the split.

    Raises:
      UserError: naming the nearest registered names, or the splits there are; a
        MissingSplitError if its files are not there.
    """
    known = sorted(names())
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise UserError(
            f"there is no task or mixture {name!r}. "
            + (f"Nearest: {', '.join(nearest)}. " if nearest else "")
            + f"{len(known)} names are registered; is the module that registers it "
            "imported?"
        )
    provider = seqio.get_mixture_or_task(name)
    for task in seqio.get_subtasks(provider):
        if split not in task.splits:
            raise UserError(
                f"task {task.name!r} has no split {split!r}; it has "
                f"{', '.join(sorted(task.splits))}."
            )
        try:
            size = num_records(task, split)
        except MissingFilesError as error:
            raise MissingSplitError(
                str(error), task.name, split, task.splits
            ) from error
        if size == 0:
            raise UserError(f"split {split!r} of task {task.name!r} is empty.")
    return provider


def with_rates(
    provider: seqio.Task | seqio.Mixture,
) -> tuple[list[seqio.Task], tuple[float, ...]]:
    """The tasks of a mixture that are read at all, and their rates; a task has 1.

    Raises:
      UserError: for rates that are no rates, or tasks whose features differ.
    """
    tasks = list(seqio.get_subtasks(provider))
    if not isinstance(provider, seqio.Mixture):
        return tasks, (1.0,)
    for task in tasks[1:]:
        for name, feature in tasks[0].output_features.items():
            if task.output_features[name] != feature:
                raise UserError(
                    f"tasks {tasks[0].name!r} and {task.name!r} of mixture "
                    f"{provider.name!r} differ in feature {name!r} (vocabulary, EOS, "
                    f"dtype or rank): {feature} and {task.output_features[name]}."
                )
    rates = [provider.get_rate(task) for task in tasks]
    if min(rates) < 0 or max(rates) == 0:
        raise UserError(f"mixture {provider.name!r} has the rates {rates}.")
    read = [(task, rate) for task, rate in zip(tasks, rates, strict=True) if rate > 0]
    return [task for task, _ in read], tuple(rate for _, rate in read)


def num_records(task: seqio.Task, split: str) -> int | None:
    """Number of records in the split, None if the source cannot tell."""
    if isinstance(task.source, RandomAccess):
        return task.source.num_records(split)
    return task.source.num_input_examples(split)


def skipped_records(provider: seqio.Task | seqio.Mixture, split: str) -> dict[str, int]:
    """Reason -> number of records that the sources left out of the split."""
    counts: collections.Counter[str] = collections.Counter()
    tasks = seqio.get_subtasks(provider)
    for source in {id(task.source): task.source for task in tasks}.values():
        if isinstance(source, _SkipsRecords):
            counts.update(source.report().get(split, {}))
    return dict(counts)


# Features of the texts before tokenisation, and the vocabulary of the model for each.
_TEXTS = {"inputs": "input_vocabulary", "targets": "output_vocabulary"}


def task_names(name: str, split: str) -> list[str]:
    """The tasks of a mixture, or the task itself.

    Raises:
      UserError: for an unknown name, or a split that a task does not have.
    """
    return [task.name for task in tasks_of(name, split)]


def tasks_of(name: str, split: str) -> list[seqio.Task]:
    """The tasks of a mixture, or the task itself; errors as of `task_names`."""
    return list(seqio.get_subtasks(find_provider(name, split)))


def prompts(name: str) -> list[str]:
    """Those that the preprocessors of a task, or of a mixture's tasks, put in."""
    found: dict[str, None] = {}
    for task in seqio.get_subtasks(seqio.get_mixture_or_task(name)):
        for step in task.preprocessors:
            prompt = getattr(step, "keywords", {}).get("prompt")
            if isinstance(prompt, str):
                found[prompt] = None
    return list(found)


def digest(task_name: str) -> str:
    """What a source says of what it reads, and how it is asked; "" if it says nothing.

    Only of sources whose name does not say which data are read.
    """
    source = task_named(task_name).source
    if not isinstance(source, _TellsDigest):
        return ""
    return f"{source.digest()}, prompts {prompts(task_name)}"


def num_examples(task_name: str, split: str) -> int | None:
    """Number of examples in the split, None if the source cannot tell.

    That of the records, for preprocessors that drop or multiply examples.
    """
    return num_records(task_named(task_name), split)


def check_max_examples(max_examples: int | None) -> None:
    """UserError unless it is None, for all, or a positive number of examples."""
    if max_examples is not None and max_examples < 1:
        raise UserError(
            f"max_examples is {max_examples}; it must be a positive number of "
            "examples, or None for all of the split."
        )


def cut_to(task_name: str, split: str, max_examples: int | None) -> int | None:
    """The number of first examples to read; None if that is the whole split.

    A limit that the split does not reach is none. UserError as `check_max_examples`.
    """
    check_max_examples(max_examples)
    size = num_examples(task_name, split)
    whole = max_examples is None or (size is not None and size <= max_examples)
    return None if whole else max_examples


def skipped_text(task_name: str, split: str) -> str:
    """What the source left out of the split (its policy 'skip'), "" if nothing.

    As `2 x missing image file, 1 x empty caption`.
    """
    task = task_named(task_name)
    num_records(task, split)  # a source tells of the splits it has read
    counts = skipped_records(task, split)
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items())


def check_vocabularies(task_name: str, model: Any) -> None:
    """Raises UserError unless the task's texts are in the model's vocabularies."""
    for feature, attribute in _TEXTS.items():
        task_feature = task_named(task_name).output_features.get(feature)
        vocabulary = getattr(model, attribute, None)
        if task_feature is None or vocabulary is None:
            continue
        theirs = vocabularies.fingerprint(task_feature.vocabulary)
        ours = vocabularies.fingerprint(vocabulary)
        if theirs != ours:
            raise UserError(
                f"task {task_name!r} has {feature} in the vocabulary {theirs}, but the "
                f"model's {attribute} is {ours}. Register the task with the model's."
            )


def check_classes(task_name: str, model: Any) -> None:
    """Raises UserError unless a classifier has as many classes as are listed.

    The lists are the model's own (`class_names`) and that of the task's source.
    """
    num_classes = getattr(getattr(model, "module", None), "num_classes", None)
    if num_classes is None:
        return
    _ = getattr(model, "class_names", None)  # which says what is wrong with it
    source = task_named(task_name).source
    if isinstance(source, labelled_sources.LabelledSource):
        listed = len(source.classes().names)
        if listed != num_classes:
            raise UserError(
                f"the class list of task {task_name!r} has {listed} names, but the "
                f"model has {num_classes} classes. Set NUM_CLASSES={listed}, or give "
                "the task the list that the model was trained with."
            )


def one_name(names_of_tasks: str | Sequence[str]) -> str:
    """One name for tasks and mixtures: their own, or that of a mixture of them all.

    For runtimes that take one name. The mixture is registered when first asked for, and
    is to be evaluated, not trained on: its rates say nothing.

    Raises:
      UserError: for no names, or an unknown one.
    """
    given = [names_of_tasks] if isinstance(names_of_tasks, str) else [*names_of_tasks]
    if not given:
        raise UserError("EVAL_TASKS names no task; name at least one.")
    for name in given:
        if name not in names():
            find_provider(name, "")  # says which names are near
    if len(given) == 1:
        return given[0]
    joined = "_and_".join(dict.fromkeys(given))
    if joined not in names():
        seqio.MixtureRegistry.add(joined, [*dict.fromkeys(given)], default_rate=1.0)
    return joined


def task_named(name: str) -> seqio.Task:
    """The registered task of that name; a mixture is an error that names its tasks."""
    task = seqio.get_mixture_or_task(name)
    if isinstance(task, seqio.Mixture):
        names = ", ".join(part.name for part in task.tasks)
        raise UserError(f"{name!r} is a mixture; name one of its tasks: {names}.")
    return task
