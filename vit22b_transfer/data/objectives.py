"""Which objectives a task has in a mixed run, and what judges it there.

A task with labels is one of classification, one with targets one of captioning, or of
pairs if the model has no decoder. A task may say otherwise by a preprocessor: pairs
have the features of captions, and captions may be learned both ways at once. What it
says travels with every example, in the feature `objectives`. SeqIO mixes tasks of the
same features only: `mixture` gives each those that it lacks, empty.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf
from seqio.utils import Feature

from vit22b_transfer import UserError
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.class_lists import ClassIds
from vit22b_transfer.data.converters import (
    Example,
    Lengths,
    feature_specs,
    map_examples,
)
from vit22b_transfer.models.mixed import OBJECTIVES

# int32: numbers in `OBJECTIVES`. Empty, or not there: it is known by the features.
FEATURE = "objectives"


def marked(*objectives: str) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A preprocessor that says what a task's examples are for; one of a kind is enough.

    Raises:
      UserError: for no objective, or an unknown one.
    """
    unknown = [name for name in objectives if name not in OBJECTIVES]
    if unknown or not objectives:
        said = f"unknown: {unknown[0]!r}" if unknown else "none is given"
        raise UserError(f"objectives are {', '.join(OBJECTIVES)}; {said}.")
    return functools.partial(_mark, objectives=tuple(dict.fromkeys(objectives)))


def _mark(dataset: tf.data.Dataset, *, objectives: Sequence[str]) -> tf.data.Dataset:
    numbers = [OBJECTIVES.index(name) for name in objectives]
    return map_examples(
        dataset, lambda x: {**x, FEATURE: tf.constant(numbers, tf.int32)}
    )


def mixture(name: str, rates: Sequence[tuple[str, float]]) -> seqio.Mixture:
    """The registered mixture of registered tasks, whatever their features.

    rates: the tasks' names, with the rate of each. Those tasks stay as they are, and
    are evaluated under their own names.

    Raises:
      UserError: if tasks differ in a feature that they share, or one is a mixture.
    """
    tasks = [registered.task_named(task) for task, _ in rates]
    features: dict[str, Feature] = {}
    for task in tasks:
        for feature, what in task.output_features.items():
            if features.setdefault(feature, what) != what:
                raise UserError(
                    f"task {task.name!r} has another feature {feature!r} (vocabulary, "
                    f"EOS, dtype or rank) than others of mixture {name!r}: {what} and "
                    f"{features[feature]}."
                )
    features[FEATURE] = seqio.Feature(ClassIds(), add_eos=False)
    mixed = [
        task.replace(
            output_features=features,
            preprocessors=[
                *task.preprocessors,
                functools.partial(_complete, output_features=features),
            ],
        )
        for task in tasks
    ]
    return seqio.MixtureRegistry.add(
        name, [(task, rate) for task, (_, rate) in zip(mixed, rates, strict=True)]
    )


def _complete(
    dataset: tf.data.Dataset, *, output_features: Mapping[str, Feature]
) -> tf.data.Dataset:
    """Vectors that the task lacks, empty, and that it does; others are errors later."""
    lacking = {
        name: tf.zeros([0], feature.dtype)
        for name, feature in output_features.items()
        if feature.rank == 1 and name not in feature_specs(dataset)
    }
    said = {f"lacks_{name}": tf.constant(True) for name in lacking}
    return map_examples(dataset, lambda example: {**example, **lacking, **said})


def of_task(task: seqio.Task, known: Sequence[str]) -> tuple[str, ...]:
    """Those of `known`, a model's objectives, that the task has; as it names them."""
    for step in task.preprocessors:
        if getattr(step, "func", None) is _mark:
            said = step.keywords["objectives"]
            return tuple(name for name in said if name in known)
    has = {
        "classification": "labels" in task.output_features,
        text_objective(known): "targets" in task.output_features,
    }
    return tuple(name for name in known if has.get(name))


def text_objective(known: Sequence[str]) -> str:
    """What targets are for, of a model's objectives, where nothing says it."""
    return "captioning" if "captioning" in known else "contrastive"


def of_example(example: Example, known: Sequence[str]) -> Mapping[str, tf.Tensor]:
    """Of each of `known`, a model's objectives, whether the example has it (bool)."""
    said = example[FEATURE]
    by_features = {
        "classification": tf.size(example.get("labels", ())) > 0,
        text_objective(known): tf.size(example.get("targets", ())) > 0,
    }
    return {
        name: tf.where(
            tf.size(said) > 0,
            tf.reduce_any(tf.equal(said, OBJECTIVES.index(name))),
            by_features.get(name, False),
        )
        for name in known
    }


def judge(model: Any, task_name: str, lengths: Lengths) -> tuple[Any, Lengths]:
    """The model that predicts and scores a task, and the feature lengths it takes.

    Of a mixed model that is the part for the task's objective, the first it names; any
    other model is its own.

    Raises:
      UserError: if the model has no part for the task.
    """
    known = getattr(model, "objectives", None)
    if known is None:
        return model, lengths
    found = of_task(registered.task_named(task_name), known)
    if not found:
        raise UserError(_no_part(task_name, known))
    part = model.part(found[0])
    wanted = part.FEATURE_CONVERTER_CLS(pack=False).TASK_FEATURES
    return part, {name: size for name, size in lengths.items() if name in wanted}


def check(task_name: str, model: Any) -> None:
    """Raises UserError if a mixed model would learn nothing of the task."""
    known = getattr(model, "objectives", None)
    if known is not None and not of_task(registered.task_named(task_name), known):
        raise UserError(_no_part(task_name, known))


def _no_part(task_name, known):
    return (
        f"task {task_name!r} has none of the objectives of the model, which are "
        f"{', '.join(known)}: its features, or its own preprocessor "
        "(data.objectives.marked), say another."
    )
