"""How like a human observer a model decides: shape bias, consistency of errors.

Measures of Geirhos et al. 2019 (arXiv 1811.12231, shape bias), 2020 (arXiv 2006.16736,
error consistency) and 2021 (arXiv 2106.07411, the benchmark of 17 data sets, whose
averages are kept here).
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool

from vit22b_transfer import UserError
from vit22b_transfer.data.records import printable
from vit22b_transfer.evaluation.human_responses import (
    Responses,
    condition_key,
    image_id,
)

# The data sets, and of each the conditions that are left out of all averages: those
# that do not change the picture, and those too hard for anyone. Of the sets without
# any, conditions are no part of the design, and are not told apart.
EXCLUDED: Mapping[str, tuple[str, ...]] = {
    "edge": (),
    "silhouette": (),
    "cue-conflict": (),
    "colour": ("cr",),
    "contrast": ("c100", "c03", "c01"),
    "high-pass": ("inf", "0.55", "0.45", "0.4"),
    "low-pass": ("0", "15", "40"),
    "phase-scrambling": ("0", "150", "180"),
    "power-equalisation": ("0",),
    "false-colour": ("True",),
    "rotation": ("0",),
    "eidolonI": ("1-10-10", "64-10-10", "128-10-10"),
    "eidolonII": ("1-3-10", "32-3-10", "64-3-10", "128-3-10"),
    "eidolonIII": ("1-0-10", "16-0-10", "32-0-10", "64-0-10", "128-0-10"),
    "uniform-noise": ("0.0", "0.6", "0.9"),
    "sketch": (),
    "stylized": (),
}
MEASURES: tuple[str, ...] = (
    "accuracy_difference",
    "observed_consistency",
    "error_consistency",
)


class Consistency(NamedTuple):
    """Of two observers' right and wrong answers, `observed` and `expected` in [0, 1].

    `error` is at most 1, 0 if they agree as often as by chance.
    """

    observed: float
    expected: float
    error: float


class ShapeBias(NamedTuple):
    """Answers to pictures with a shape of one class and a texture of another.

    `bias` is shape / (shape + texture), in [0, 1], NaN if both are 0; `neither` counts
    answers of a third class and none at all.
    """

    shape: int
    texture: int
    neither: int
    bias: float


def consistency(
    first: Bool[np.ndarray, " trials"], second: Bool[np.ndarray, " trials"]
) -> Consistency:
    """How consistently two observers are right on the same pictures.

    first, second: whether each answered each picture right.

    Observed is the share on which both are right or both wrong, expected that of two
    independent observers of their accuracies, error consistency Cohen's kappa of the
    two: (observed - expected) / (1 - expected), and 1 if they always agree.

    Raises:
      UserError: without trials.
    """
    if not len(first) or len(first) != len(second):
        raise UserError(
            f"consistency needs the same trials of both observers, one at least, but "
            f"there are {len(first)} and {len(second)}."
        )
    a, b = np.mean(first), np.mean(second)
    observed = float(np.mean(first == second))
    expected = float(a * b + (1 - a) * (1 - b))
    error = 1.0 if observed == 1 else (observed - expected) / (1 - expected)
    return Consistency(observed, expected, error)


def texture_class(image: str) -> str:
    """The texture's class by the name of a picture: bird of `..._dog10-bird2.png`."""
    name = image.split("_")[-1].split(".")[0].split("-")[-1]
    return "".join(char for char in name if not char.isdigit())


def shape_bias(responses: Responses) -> ShapeBias:
    """Shape bias over the trials whose shape and texture are of two classes."""
    shape = texture = neither = 0
    for answer, category, image in zip(
        responses.answers, responses.categories, responses.images, strict=True
    ):
        other = texture_class(image)
        if other == category:
            continue
        shape += answer == category
        texture += answer == other
        neither += answer not in (category, other)
    decided = shape + texture
    bias = shape / decided if decided else float("nan")
    return ShapeBias(shape, texture, neither, bias)


def shape_bias_by_category(responses: Responses) -> dict[str, ShapeBias]:
    """`shape_bias` of the trials of each shape class, by name."""
    return {
        name: shape_bias(responses.where(c == name for c in responses.categories))
        for name in sorted(set(responses.categories))
    }


def kept(responses: Responses, data_set: str) -> tuple[Responses, int]:
    """The trials of a data set that count, and how many are left out.

    Raises:
      UserError: if the data set is none of the 17, or nothing is kept.
    """
    excluded = _excluded(data_set)
    result = responses.where(
        condition_key(condition) not in excluded for condition in responses.conditions
    )
    if not len(result):
        found = printable(", ".join(sorted(set(responses.conditions))))[:200]
        raise UserError(
            f"none of the {len(responses)} trials of {data_set} is in a condition that "
            f"counts; found: {found}."
        )
    return result, len(responses) - len(result)


def accuracy(responses: Responses, data_set: str) -> float:
    """Accuracy in [0, 1] over all trials that count, of all observers together."""
    return float(np.mean(kept(responses, data_set)[0].correct()))


def compared(model: Responses, human: Responses, data_set: str) -> dict[str, float]:
    """`MEASURES` of two observers on one data set: the mean over its conditions.

    `accuracy_difference` is the square of the difference of the accuracies.

    Raises:
      UserError: as `kept`; if one has several observers, or conditions or pictures that
        the other has not, or a picture twice in a condition.
    """
    sides = [by_condition(one, data_set) for one in (model, human)]
    if set(sides[0]) != set(sides[1]):
        raise UserError(
            f"{data_set}: the observers saw other conditions, {sorted(sides[0])[:8]} "
            f"and {sorted(sides[1])[:8]}; give both the whole data set."
        )
    rows = []
    for condition, first in sides[0].items():
        second = sides[1][condition]
        if set(first) != set(second):
            only = sorted(set(first) ^ set(second))
            raise UserError(
                f"{data_set}, condition {condition!r}: {len(only)} pictures were seen "
                f"by one observer alone, such as {only[0]!r}; give both the whole set."
            )
        a = np.array([first[name] for name in first])
        b = np.array([second[name] for name in first])
        found = consistency(a, b)
        rows.append(((np.mean(a) - np.mean(b)) ** 2, found.observed, found.error))
    return dict(zip(MEASURES, np.mean(rows, axis=0).tolist(), strict=True))


def alignment(
    models: Mapping[str, Responses], humans: Mapping[str, Responses]
) -> dict[str, float]:
    """A model's `MEASURES` and `ood_accuracy` over data sets, as the benchmark prints.

    The measures are a mean over conditions, then over human observers, then over data
    sets; the accuracy is over all trials of a data set that count, then over data sets.
    Of cue-conflict, `shape_bias` is told, too.

    models, humans: the trials of each data set; those of the humans have several
      observers.

    Raises:
      UserError: as `compared`; without data sets, or with others on one side.
    """
    if not models or set(models) != set(humans):
        raise UserError(
            f"the model has answered {sorted(models)}, the humans {sorted(humans)}; "
            "give the same data sets of both, one at least."
        )
    rows = {}
    for name, model in models.items():
        people = humans[name]
        pairs = [
            list(compared(model, people.of(person), name).values())
            for person in sorted(set(people.observers))
        ]
        rows[name] = [*np.mean(pairs, axis=0), accuracy(model, name)]
    return _means(rows, models)


def humans_alone(humans: Mapping[str, Responses]) -> dict[str, float]:
    """What `alignment` tells of a model, of humans: each pair of observers once.

    Accuracy and shape bias are those of all their trials together.

    Raises:
      UserError: as `alignment`; if a data set has one observer.
    """
    rows = {}
    for name, people in humans.items():
        names = sorted(set(people.observers))
        if len(names) < 2:
            raise UserError(f"{name} has {len(names)} observers; a pair needs two.")
        each = [people.of(person) for person in names]
        pairs = [
            list(compared(first, second, name).values())
            for number, first in enumerate(each)
            for second in each[number + 1 :]
        ]
        rows[name] = [*np.mean(pairs, axis=0), accuracy(people, name)]
    if not rows:
        raise UserError("there is no data set; give one at least.")
    return _means(rows, humans)


def mean_ranks(results: Sequence[Mapping[str, float]]) -> list[float]:
    """For each model the mean of its ranks from 1 in `MEASURES`; lower is better.

    Models with equal values share the mean of their ranks.

    results: of `alignment`; a smaller difference and larger consistencies are better.
    """
    columns = [
        [sign * one[name] for one in results]
        for name, sign in zip(MEASURES, (1, -1, -1), strict=True)
    ]
    return np.mean([scipy.stats.rankdata(c) for c in columns], axis=0).tolist()


def _means(rows, data_sets) -> dict[str, float]:
    means = np.mean(list(rows.values()), axis=0).tolist()
    result = dict(zip((*MEASURES, "ood_accuracy"), means, strict=True))
    if "cue-conflict" in data_sets:
        result["shape_bias"] = shape_bias(data_sets["cue-conflict"]).bias
    return result


def _excluded(data_set):
    if data_set not in EXCLUDED:
        near = difflib.get_close_matches(data_set, EXCLUDED, n=1, cutoff=0.0)
        raise UserError(
            f"{data_set!r} is none of the data sets {', '.join(EXCLUDED)}; the nearest "
            f"is {near[0]!r}."
        )
    return {condition_key(c) for c in EXCLUDED[data_set]}


def by_condition(responses: Responses, data_set: str) -> dict[str, dict[str, bool]]:
    """Of one observer's trials that count: condition -> image id -> whether right.

    A data set without excluded conditions has one, "".

    Raises:
      UserError: as `kept`; for several observers, or a picture twice in a condition.
    """
    if len(observers := set(responses.observers)) != 1:
        raise UserError(
            f"{data_set}: {len(observers)} observers stand where one is compared; take "
            "the trials of one."
        )
    counted, _ = kept(responses, data_set)
    result: dict[str, dict[str, bool]] = {}
    for condition, image, right in zip(
        counted.conditions, counted.images, counted.correct(), strict=True
    ):
        key = condition_key(condition) if EXCLUDED[data_set] else ""
        own = result.setdefault(key, {})
        name = image_id(image)
        if name in own:
            raise UserError(
                f"{data_set}, condition {condition!r}: {min(observers)!r} has answered "
                f"the picture {name!r} twice; give each trial once."
            )
        own[name] = right
    return result
