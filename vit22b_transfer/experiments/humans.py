"""A kept head beside human observers, on the sets of the model-vs-human benchmark.

The head's classes are made the sixteen (`evaluation.sixteen_classes`), its decisions
are written in the benchmark's format, and compared with people's, if there are any.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import (
    class_probabilities,
    human_alignment,
    human_responses,
    intervals,
    sixteen_classes,
)
from vit22b_transfer.evaluation.human_responses import Responses
from vit22b_transfer.evaluation.intervals import Interval
from vit22b_transfer.experiments import measure_pictures, measured
from vit22b_transfer.experiments.features import Split
from vit22b_transfer.experiments.judged import Judge, Judged
from vit22b_transfer.host import json_files, whole_files
from vit22b_transfer.host.file_errors import brief

_CUES = "cue-conflict"
_MOST_BYTES = 1 << 20
# Files of one data set; the benchmark's have up to ten observers' sessions.
_MOST_FILES = 1_000


def alignment(
    judge: Judge,
    images: Split,
    *,
    observer: str,
    humans: str | None = None,
    sixteen: str | None = None,
    resamples: int = 1_000,
) -> list[dict]:
    """Accuracy, shape bias and, beside people, the benchmark's consistencies.

    Told of each data set `accuracy`, over all there are `ood_accuracy`; of cue-conflict
    the `shape_bias`, that of each category, and a picture of these; with `humans` the
    `accuracy_difference`, `observed_consistency` and `error_consistency` of each set
    and over all. Decisions go into a CSV file of each set, beside the results.

    images: an unlabelled split, whose first folders are data sets by the benchmark's
      names (`human_alignment.EXCLUDED`). Class and condition are in a picture's name,
      `contrast/0001_cop_s01_c30_oven_10_n03041632_7380.png`; or it lies in a folder
      called by its class, `cue-conflict/airplane/airplane1-bicycle2.png`, without
      condition.
    observer: what the head is called in the files: letters, digits, `-`, `.`, `_`.
    humans: a folder with a folder of each data set, in which are the benchmark's CSV
      files of people, `*subject*.csv`; files of other observers are not read.
    sixteen: a JSON file with an object of the sixteen names, each with a list of ids of
      the head's classes. Not needed of ILSVRC's 1000 classes, or of these sixteen.

    Raises:
      UserError: if a picture says no class; if a set is none of the benchmark's; as
        `human_responses.read` and `human_alignment.alignment`.
    """
    if not re.fullmatch(r"[\w.-]{1,100}", observer):
        raise UserError(
            f"observer={observer[:200]!r} names files: letters, digits, -, . and _."
        )
    head, names = judge.before(images)
    classes = (head.class_names, head.classes)
    checked(names, classes, humans=humans, sixteen=sixteen)
    split = judge.of(images, labelled=False)
    every = responses(split, observer, _sixteen(classes, sixteen))
    sets = _sets(split.ids)
    models, paths = {}, []
    folder = whole_files.writable_directory(judge.output_dir, "output directory")
    notes: dict[str, Any] = dict(split.notes)
    for name in sorted({*sets}):
        own = every.where(one == name for one in sets)
        _, left_out = human_alignment.kept(own, name)  # refuses a set of another name
        models[name] = own
        if left_out:
            notes[f"{name}: trials in conditions that do not count"] = left_out
    people = None if humans is None else _people(humans, list(models))
    for name, own in models.items():
        paths.append(os.path.join(folder, f"{name}_{observer}_session-1.csv"))
        human_responses.write(paths[-1], own)
    findings, pictures = _alone(models, resamples), []
    if _CUES in models:
        own, picture = _biases(models[_CUES], people, observer, folder)
        findings += own
        pictures.append(picture)
    if people is not None:
        findings += _beside(models, people, resamples)
    return measured.report(
        "human_alignment",
        findings,
        protocol={
            "sixteen": sixteen or "by the head's classes",
            "humans": humans,
            "observer": observer,
            "resamples": resamples,
        },
        facts=judge.facts(images=images) | {"classes": 16, "responses": paths},
        notes=notes,
        output_dir=judge.output_dir,
        pictures=pictures,
    )


def checked(
    names: Sequence[str],
    classes: tuple[Sequence[str] | None, int],
    *,
    humans: str | None,
    sixteen: str | None,
) -> None:
    """Looks at all that `alignment` reads beside pictures, which takes no tower.

    names: of the pictures; without any nothing but the sixteen is looked at. classes:
      names of the head's, if it has any, and their number.

    Raises:
      UserError: as `alignment`.
    """
    _sixteen(classes, sixteen)
    told = [_condition_and_class(name) for name in names]
    conditions, categories = (tuple(one[n] for one in told) for n in (0, 1))
    images = tuple(name.rpartition("/")[2] for name in names)
    # Answers that are all right stand for those that are not there yet.
    every = Responses(
        ("head",) * len(names), categories, categories, conditions, images
    )
    sets = _sets(names)
    models = {
        name: every.where(one == name for one in sets) for name in sorted({*sets})
    }
    for name, own in models.items():
        human_alignment.kept(own, name)
    if humans is not None and models:
        human_alignment.alignment(models, _people(humans, list(models)))


def _sets(names: Sequence[str]) -> list[str]:
    """The data set of each picture: its first folder; UserError if it lies in none."""
    for name in names:
        if "/" not in name:
            raise UserError(
                f"the picture {brief(name)!r} lies in no folder of a data set, as "
                "cue-conflict/airplane/airplane1-bicycle2.png does."
            )
    return [name.partition("/")[0] for name in names]


def responses(
    found: Judged, observer: str, indices: Mapping[str, Sequence[int]]
) -> Responses:
    """The decisions of a head as trials, in the order of the split.

    indices: ids of the head's classes for each of the sixteen.

    Raises:
      UserError: naming a picture that says no class.
    """
    shares = class_probabilities.softmax(found.logits)
    answers = sixteen_classes.decisions(shares, indices)
    told = [_condition_and_class(image) for image in found.ids]
    return Responses(
        (observer,) * len(answers),
        answers,
        tuple(category for _, category in told),
        tuple(condition for condition, _ in told),
        tuple(image.rpartition("/")[2] for image in found.ids),
    )


def _condition_and_class(image: str) -> tuple[str, str]:
    """(condition, class) of a picture by its name, or by its folder."""
    folder, _, name = image.rpartition("/")
    try:
        return human_responses.stimulus(name)
    except UserError:
        category = folder.rpartition("/")[2]
        if category in sixteen_classes.NAMES:
            return "0", category
        raise


def _sixteen(
    classes: tuple[Sequence[str] | None, int], path: str | None
) -> Mapping[str, Sequence[int]]:
    """Ids of the head's classes for each of the sixteen; `classes` as of `checked`."""
    (listed, count), names = classes, sixteen_classes.NAMES
    if path is not None:
        told = json_files.read_object(path, limit=_MOST_BYTES)
        missing = [name for name in names if name not in told]
        added = [brief(name, 60) for name in told if name not in names]
        wrong = [
            name
            for name, own in told.items()
            if not isinstance(own, list)
            or not all(type(n) is int and 0 <= n < count for n in own)
            or not own
        ]
        if missing or added or wrong:
            said = {"missing": missing, "unknown": added, "wrong lists": wrong}
            shown = "; ".join(
                f"{what}: {', '.join(brief(name, 60) for name in some[:4])}"
                for what, some in said.items()
                if some
            )
            raise UserError(
                f"{path} is to have, for each of {', '.join(names)}, a list of one or "
                f"more class ids from 0 to {count - 1}; {shown}."
            )
        return {name: told[name] for name in names}
    if listed is not None and set(listed) == set(names):
        return {name: [listed.index(name)] for name in names}
    if count == 1000:
        return sixteen_classes.IMAGENET
    raise UserError(
        f"the head has {count} classes: neither ILSVRC's 1000 nor the sixteen. "
        "Set `sixteen` to a JSON file that says which ids stand for which."
    )


def _people(folder: str, data_sets: Sequence[str]) -> dict[str, Responses]:
    """The trials of all human observers of each data set."""
    result = {}
    for name in data_sets:
        own = pathlib.Path(folder, name)
        paths = sorted(own.glob("*subject*.csv")) if own.is_dir() else []
        if not 0 < len(paths) <= _MOST_FILES:
            raise UserError(
                f"{own} has {len(paths)} files *subject*.csv of human observers; one "
                f"to {_MOST_FILES} are expected, as in the benchmark's raw-data."
            )
        result[name] = human_responses.read(paths)
    return result


def _alone(models: Mapping[str, Responses], resamples) -> list[measured.Finding]:
    """What needs no human observer."""
    rights = {
        name: np.array(human_alignment.kept(own, name)[0].correct())
        for name, own in models.items()
    }
    found = [
        measured.share("accuracy", right, {"data_set": name})
        for name, right in rights.items()
    ]

    def measure(*rows):
        means = [
            right[row].mean() for right, row in zip(rights.values(), rows, strict=True)
        ]
        return {"ood_accuracy": float(np.mean(means))}

    counts = [len(right) for right in rights.values()]
    settings = {"data_sets": len(rights)}
    if min(counts) < 2:
        value = measure(*map(np.arange, counts))["ood_accuracy"]
        return [*found, measured.Finding("ood_accuracy", value, settings=settings)]
    told = intervals.resampled(measure, counts, resamples=resamples)
    mean = measured.resampled(
        "ood_accuracy", told["ood_accuracy"], sum(counts), settings
    )
    return [*found, mean]


def _biases(
    model: Responses,
    people: Mapping[str, Responses] | None,
    observer,
    folder,
) -> tuple[list[measured.Finding], str]:
    """The shape bias, that of each category, and the file of their picture."""
    findings = []
    of_category = human_alignment.shape_bias_by_category(model)
    for name, bias in {"all": human_alignment.shape_bias(model), **of_category}.items():
        some = bias.shape + bias.texture
        settings = {
            "category": name,
            "shape": bias.shape,
            "texture": bias.texture,
            "neither": bias.neither,
        }
        if some:
            shapes = np.arange(some) < bias.shape
            findings.append(measured.share("shape_bias", shapes, settings))
        else:
            findings.append(
                measured.Finding("shape_bias", float("nan"), settings=settings)
            )
    shares = {observer: [bias.bias for bias in of_category.values()]}
    if people is not None:
        told = human_alignment.shape_bias_by_category(people[_CUES])
        none = human_alignment.ShapeBias(0, 0, 0, float("nan"))
        shares["humans"] = [told.get(name, none).bias for name in of_category]
    path = os.path.join(folder, "shape_bias.png")
    title = "shape bias: shape / (shape + texture) of each shape category"
    return findings, measure_pictures.rows_of_shares(
        path, title, list(of_category), shares
    )


def _beside(
    models: Mapping[str, Responses], people: Mapping[str, Responses], resamples
) -> list[measured.Finding]:
    """The benchmark's measures of each data set and of all.

    Intervals are over the pictures of each condition; the observers stay.
    """
    whole = human_alignment.alignment(models, people)  # which checks all of them
    pairs = [
        (name, *pair)
        for name, own in models.items()
        for pair in _pairs(own, people[name], name)
    ]

    def measure(*rows):
        of_set: dict[str, list] = {name: [] for name in models}
        for (name, model, human), row in zip(pairs, rows, strict=True):
            of_set[name].append(_consistencies(model[row], human[:, row]))
        means = {name: np.mean(own, axis=0) for name, own in of_set.items()}
        result = {}
        for number, metric in enumerate(human_alignment.MEASURES):
            values = {name: float(own[number]) for name, own in means.items()}
            result |= {f"{name}/{metric}": value for name, value in values.items()}
            result[f"/{metric}"] = float(np.mean(list(values.values())))
        return result

    counts = [len(model) for _, model, _ in pairs]
    if min(counts) < 2:
        told = measure(*map(np.arange, counts))
        told = {n: Interval(x, np.nan, np.nan, np.nan, "") for n, x in told.items()}
    else:
        told = intervals.resampled(measure, counts, resamples=resamples)
    found = []
    for name, interval in told.items():
        data_set, _, metric = name.partition("/")
        settings = {"data_set": data_set} if data_set else {"data_sets": len(models)}
        if not data_set:
            interval = interval._replace(value=whole[metric])
        images = sum(
            count
            for count, pair in zip(counts, pairs, strict=True)
            if data_set in ("", pair[0])
        )
        found.append(measured.resampled(metric, interval, images, settings))
    return found


def _pairs(
    model: Responses, people: Responses, name: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each condition whether the model was right, and a row for each person."""
    own = human_alignment.by_condition(model, name)
    persons = [
        human_alignment.by_condition(people.of(person), name)
        for person in sorted(set(people.observers))
    ]
    return [
        (
            np.array([right for right in of_image.values()]),
            np.array([[one[key][image] for image in of_image] for one in persons]),
        )
        for key, of_image in own.items()
    ]


def _consistencies(
    model: Bool[np.ndarray, " images"], people: Bool[np.ndarray, "people images"]
) -> Float[np.ndarray, " measures"]:
    """`human_alignment.MEASURES` on one condition, the mean over people."""
    first, second = model.mean(), people.mean(axis=1)
    observed = np.mean(people == model, axis=1)
    expected = first * second + (1 - first) * (1 - second)
    always = observed == 1
    kappa = (observed - expected) / np.where(always, 1.0, 1 - expected)
    kappa = np.where(always, 1.0, kappa)
    return np.array([np.mean((first - second) ** 2), observed.mean(), kappa.mean()])
