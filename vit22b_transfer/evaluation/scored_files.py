"""A file of predictions judged without its model: metrics, intervals, slices."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console
from jaxtyping import Int

from vit22b_transfer import UserError
from vit22b_transfer.data.question_kinds import KINDS
from vit22b_transfer.evaluation import (
    evaluate,
    example_numbers,
    label_metrics,
    question_slices,
    text_metrics,
    vqa_metrics,
)
from vit22b_transfer.evaluation.example_numbers import ExampleNumbers, mean_of
from vit22b_transfer.evaluation.intervals import Interval
from vit22b_transfer.host import json_files, tables, whole_files
from vit22b_transfer.inference.prediction_files import read_lines

# Of a file's record, in bytes.
_MAX_RECORD = 1 << 20
CLUSTERED = "± clustered"
Numbers = Mapping[str, ExampleNumbers]


class Judged(NamedTuple):
    """The scored lines of a file, and the numbers of each that metrics are made of.

    metrics: of the whole, as the task has them. numbers: of those metrics that can be
      scored in parts; the others have no interval. images: which lines are of one.
    """

    path: str
    task: str
    split: str
    lines: list[dict[str, Any]]
    metrics: dict[str, float | str]
    numbers: dict[str, ExampleNumbers]
    images: Int[np.ndarray, " lines"]
    num_bad_images: int
    num_empty: int


class Slice(NamedTuple):
    """The metrics of the lines with one value of a field; None: no interval."""

    field: str
    value: str
    count: int
    metrics: dict[str, tuple[float, Interval | None]]


class Report(NamedTuple):
    """Intervals of the whole by metric, clustered standard errors, and slices."""

    judged: Judged
    intervals: dict[str, Interval]
    clustered: dict[str, float]
    slices: list[Slice]


# Of a task's metrics, which one stands for the whole: the first that it has.
_MAIN = ("cider_d", "vqa_accuracy", "accuracy", "exact_match", "anls")


def main_metric(numbers: Mapping[str, ExampleNumbers]) -> str:
    """The metric by which examples are better or worse; it is a mean over them.

    Raises:
      UserError: if there is none.
    """
    for name in (*_MAIN, *numbers):
        if name in numbers and numbers[name].statistic is None:
            return name
    raise UserError(
        "the task has no metric that scores each example by itself, so that none is "
        "better or worse than another."
    )


def of_record(path: str) -> tuple[str, str]:
    """(task, split) that the record beside a file names; "" where none does."""
    record = f"{path}.run.json"
    if not os.path.isfile(record):
        return "", ""
    said = json_files.read_object(record, limit=_MAX_RECORD).get("fingerprint")
    said = said if isinstance(said, dict) else {}
    task, split = said.get("task", ""), said.get("split", "")
    if not (isinstance(task, str) and isinstance(split, str)):
        raise UserError(f"{record} names no task and split. Give --task and --split.")
    return task, split


def judge(path: str, task: str, split: str = "") -> Judged:
    """Scores a file by a registered task; no model and no image is read.

    Raises:
      UserError: as `evaluate.score_file`.
    """
    return judge_lines(read_lines(path), path, task, split)


def judge_lines(
    lines: Iterable[dict[str, Any]], path: str, task: str, split: str = ""
) -> Judged:
    """As `judge`, of lines of the file `path`; their indices may have gaps."""
    from vit22b_transfer.data import task_metrics

    read = evaluate.collected(lines, path, task)
    metrics = evaluate.score_lines(read.lines, path, task).metrics
    targets, outputs = task_metrics.postprocessed(task, read.examples, read.predictions)
    aux = task_metrics.as_arrays(read.aux)
    numbers: dict[str, ExampleNumbers] = {}
    plain, with_aux = task_metrics.functions(task)
    for function in plain:
        if made := _NUMBERS.get(function):
            numbers |= made(targets, outputs)
    for function in with_aux:
        if function in _OF_LABELS:
            numbers |= label_metrics.hit_numbers(targets, outputs, aux)
    names = [str(line.get("image_id", f"\0{line['index']}")) for line in read.lines]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return Judged(
        path,
        task,
        split,
        read.lines,
        metrics,
        numbers,
        np.array([places[name] for name in names]),
        read.num_bad_images,
        read.num_empty,
    )


def report(judged: Judged, fields: Sequence[str] | None = None) -> Report:
    """Intervals of all metrics that are made of examples, and of slices by `fields`.

    fields: of lines or of their metadata; None: those of `KINDS` that lines have.

    Raises:
      UserError: for a field that no line has, or one that is no text or number.
    """
    whole = {
        name: found
        for name, numbers in judged.numbers.items()
        if (found := example_numbers.interval(numbers, judged.images))
    }
    clustered = {
        name: error
        for name, numbers in judged.numbers.items()
        if (error := example_numbers.clustered_error(numbers, judged.images))
        is not None
    }
    slices = []
    for field in KINDS if fields is None else fields:
        values = [_field(line, field) for line in judged.lines]
        groups = question_slices.grouped(values)
        if not groups and fields is not None:
            first = judged.lines[0]
            known = ", ".join([*first, *first.get("metadata", {})])
            raise UserError(
                f"no line of {judged.path} has a field {field!r}; the first has "
                f"{known}."
            )
        for value, places in groups.items():
            found = {}
            for name, numbers in judged.numbers.items():
                part = numbers.of(places)
                found[name] = (
                    part.value(),
                    example_numbers.interval(part, judged.images[places]),
                )
            slices.append(Slice(field, value, len(places), found))
    return Report(judged, whole, clustered, slices)


def as_json(made: Report) -> dict[str, Any]:
    """All of a report, as JSON has it."""
    judged = made.judged
    metrics = {}
    for name, value in judged.metrics.items():
        metrics[name] = {"value": value} | _interval_json(made.intervals.get(name))
        if name in made.clustered:
            metrics[name]["clustered_error"] = made.clustered[name]
    slices = []
    for part in made.slices:
        found = {
            name: {"value": _number(value)} | _interval_json(interval)
            for name, (value, interval) in part.metrics.items()
        }
        told = {"field": part.field, "value": part.value, "count": part.count}
        slices.append(told | {"metrics": found})
    return {
        "predictions": judged.path,
        "task": judged.task,
        "split": judged.split,
        "num_scored": len(judged.lines),
        "num_images": len(np.unique(judged.images)),
        "num_bad_images": judged.num_bad_images,
        "num_empty": judged.num_empty,
        "metrics": metrics,
        "slices": slices,
    }


def write(made: Report, path: str) -> None:
    """Writes a report as JSON."""
    with whole_files.replacing(path) as file:
        json.dump(as_json(made), file, indent=2, allow_nan=False)
        file.write("\n")


def show(made: Report, console: rich.console.Console) -> None:
    """Prints the metrics with their intervals, and a table of slices."""
    judged = made.judged
    sliced = {name for name in judged.metrics if "=" in name and "/" in name}
    names = [name for name in judged.metrics if name not in sliced or not made.slices]
    columns: dict[str, list[str]] = {
        "value": [],
        "95 % interval": [],
        CLUSTERED: [],
    }
    for name in names:
        value = judged.metrics[name]
        columns["value"].append(value if isinstance(value, str) else f"{value:.4f}")
        columns["95 % interval"].append(told(made.intervals.get(name)))
        error = made.clustered.get(name)
        columns[CLUSTERED].append("" if error is None else f"{error:.4f}")
    tables.print_table(console, names, columns, heading="metric")
    if made.slices:
        main = main_metric(judged.numbers)
        rows = [f"{s.field}={s.value}" for s in made.slices]
        found = [s.metrics[main] for s in made.slices]
        columns = {
            "examples": [str(s.count) for s in made.slices],
            main: [f"{value:.4f}" for value, _ in found],
            "95 % interval": [told(one) for _, one in found],
        }
        tables.print_table(console, rows, columns, heading="slice")
    console.print(
        f"{len(judged.lines)} scored, of {len(np.unique(judged.images))} images; "
        f"{judged.num_bad_images} images not read; {judged.num_empty} empty "
        "predictions",
        markup=False,
        highlight=False,
    )
    console.print(
        "Intervals: bootstrap over images, BCa; CIDEr with the document frequencies of "
        "all references.",
        markup=False,
        highlight=False,
    )


def told(found: Interval | None) -> str:
    """`[0.31, 0.53]`, with the method if it is not BCa; "" of None.

    Where all resamples are equal, as all examples are, there is nothing to tell.
    """
    if found is None:
        return ""
    if found.low == found.high:
        return "all equal"
    method = "" if found.method == "BCa" else f" {found.method}"
    return f"[{found.low:.4f}, {found.high:.4f}]{method}"


def _interval_json(found: Interval | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "low": found.low,
        "high": found.high,
        "standard_error": found.standard_error,
        "method": found.method,
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _field(line: Mapping[str, Any], name: str) -> str:
    metadata = line.get("metadata", {})
    value = metadata.get(name, line.get(name, "") if name != "metadata" else "")
    if not isinstance(value, str | int | float):
        raise UserError(
            f"field {name!r} of example {line['index']} is a {type(value).__name__}; "
            "slices are by texts or numbers."
        )
    return str(value)


def _vqa(targets: Any, predictions: Any) -> Numbers:
    scores = vqa_metrics.vqa_accuracy_scores(targets, predictions).scores
    return {"vqa_accuracy": mean_of(scores), **_exact(targets, predictions)}


def _exact(targets: Any, predictions: Any) -> Numbers:
    scores = vqa_metrics.exact_match_scores(targets, predictions).scores
    return {"exact_match": mean_of(scores)}


def _anls(targets: Any, predictions: Any) -> Numbers:
    return {"anls": mean_of(vqa_metrics.anls_scores(targets, predictions).scores)}


# The metric functions whose metrics are made of examples; a user's own is not here, and
# has no interval.
_NUMBERS: dict[Callable[..., Any], Callable[[Any, Any], Numbers]] = {
    text_metrics.captioning: text_metrics.captioning_numbers,
    vqa_metrics.vqa: _vqa,
    vqa_metrics.exact_match: _exact,
    vqa_metrics.anls: _anls,
}
_OF_LABELS = (label_metrics.single_label, label_metrics.multi_label)
