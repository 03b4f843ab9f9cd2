"""What experiments return, as numbers and charts of the suite's rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from vit22b_transfer.experiments.outcomes import Measured, Outcome
from vit22b_transfer.experiments.suite_results import (
    Chart,
    Curve,
    Finding,
    Number,
    Picture,
)

# Lines of JSON as `measured.report` gives them.
Lines = Sequence[Mapping[str, Any]]


def accuracy(outcomes: Sequence[Outcome], name: str) -> Finding:
    """Top-1 accuracies in %; the others, such as the best five, with their metric."""
    numbers, notes = [], {}
    for outcome in outcomes:
        metric = outcome.metric.removeprefix("accuracy").strip("_").replace("_", " ")
        numbers.append(share(f"{name}, {metric}" if metric else name, outcome))
        notes |= outcome.notes
        chosen = ("rate", "strength", "held_out_accuracy")
        notes |= {k: v for k, v in outcome.settings.items() if k in chosen}
    return Finding(numbers, notes=notes)


def few_shot(outcomes: Sequence[Outcome], name: str) -> Finding:
    """Accuracies in % by number of shots, and their curve."""
    numbers, points, spans, notes = [], [], [], {}
    for outcome in outcomes:
        shots = outcome.settings["shots"]
        features = outcome.settings.get("features", ())
        several = f", {'+'.join(features)}" if len(_sets(outcomes)) > 1 else ""
        number = share(f"{name}{several}, {shots} shots", outcome)
        numbers.append(number)
        if features == outcomes[0].settings.get("features", ()):
            points.append([float(shots), number.value])
            spans.append([number.low, number.high])
        for note, count in outcome.notes.items():
            notes[f"{note}, {shots} shots"] = count
    title = f"{name}: accuracy by images of each class"
    chart = Chart(
        title, "images per class", "%", [Curve(name, points, spans)], log_x=True
    )
    return Finding(numbers, [chart], notes=notes)


def share(name: str, outcome: Outcome) -> Number:
    """An outcome in %."""
    low, high = outcome.interval
    return Number(
        name,
        100 * outcome.value,
        100 * low,
        100 * high,
        "%",
        count=len(outcome.scores),
    )


def _sets(outcomes: Sequence[Outcome]) -> set[Any]:
    return {tuple(outcome.settings.get("features", ())) for outcome in outcomes}


def dense(found: Sequence[Measured], name: str, shown: Mapping[str, str]) -> Finding:
    """Numbers of segmentation, depth or video, with pictures.

    shown: of each metric that is told what its number is called, "" for `name` alone,
    and "%" behind it where it is a share that is told in %.
    """
    numbers, pictures, notes = [], [], {}
    for one in found:
        notes |= one.notes
        pictures += [Picture(name, path) for path in one.pictures]
        if one.metric in shown:
            facts = {"value": one.value, "interval": one.interval}
            facts["count"] = one.images
            number = _number(name, shown[one.metric], facts)
            numbers.append(number)
    return Finding(numbers, pictures=pictures, notes=notes)


def measured(lines: Lines, name: str, shown: Mapping[str, str]) -> Finding:
    """Numbers of a trust measure, with its pictures; `shown` as of `dense`.

    Of a metric with settings it is `metric/value of a setting`: `ece/before`.
    """
    numbers = []
    for line in lines:
        metric, settings = line["metric"], line["settings"]
        keys = [f"{metric}/{value}" for value in settings.values()]
        if not settings or "data_sets" in settings:
            keys.append(metric)
        numbers += [
            _number(name, shown[key], line)
            for key in keys
            if key in shown and line["value"] is not None
        ]
    return Finding(numbers, pictures=_pictures(lines, name), notes=_notes(lines))


def shape_bias(lines: Lines, name: str) -> Finding:
    """The shape bias in %, and that of each category as bars.

    Raises:
      UserError: if cue-conflict is none of the data sets.
    """
    from vit22b_transfer import UserError

    biases = {
        line["settings"]["category"]: line
        for line in lines
        if line["metric"] == "shape_bias" and line["value"] is not None
    }
    if "all" not in biases:
        raise UserError(
            "there is no picture of cue-conflict that is answered by shape or texture. "
            "Put them into stimuli/cue-conflict."
        )
    whole = biases.pop("all")
    number = _number(name, "%", whole)
    title = f"{name} by category"
    chart = _bars(title, {key: one for key, one in biases.items()})
    return Finding([number], [chart], _pictures(lines, name), _notes(lines))


def parity(lines: Lines, name: str) -> Finding:
    """Accuracy by the limit of demographic parity, as a curve; both ends as numbers."""
    limits = [line for line in lines if line["metric"] == "accuracy_at_limit"]
    limits.sort(key=lambda line: line["settings"]["limit"])
    points = [[x["settings"]["limit"], 100 * x["value"]] for x in limits]
    spans = [[100 * end for end in line["interval"]] for line in limits]
    curve = Curve(name, points, spans)
    title = f"{name}: accuracy by limit of demographic parity"
    ends = limits[:1] + limits[-1:] if len(limits) > 1 else limits
    numbers = []
    for line in ends:
        label = f"limit {line['settings']['limit']:.3g}%"
        numbers.append(_number(name, label, line))
    chart = Chart(title, "limit", "%", [curve])
    return Finding(numbers, [chart], _pictures(lines, name), _notes(lines))


def subgroups(lines: Lines, name: str, metric: str) -> Finding:
    """A metric of each subgroup in %; of accuracies their gap, of others by chance."""
    numbers, own = [], {}
    for line in lines:
        group = line["settings"].get("subgroup")
        if line["metric"] == metric and group is not None and line["value"] is not None:
            own[group] = line
            label = f"{group}%"
        elif line["metric"] == f"{metric}_gap" and line["value"] is not None:
            label = "gap%"
        elif line["metric"] == f"{metric}_by_chance":
            label = f"{group}, chance%"
        else:
            continue
        numbers.append(_number(name, label, line))
    chart = _bars(f"{name}: {metric} of subgroups", own)
    return Finding(numbers, [chart], notes=_notes(lines))


def _bars(title: str, lines: Mapping[str, Mapping[str, Any]]) -> Chart:
    """A bar in % for each line."""
    spans = [
        [100 * end for end in line["interval"] or (line["value"],) * 2]
        for line in lines.values()
    ]
    points = [[float(n), 100 * one["value"]] for n, one in enumerate(lines.values())]
    curve = Curve(title, points, spans)
    return Chart(title, "", "%", [curve], bars=True, ticks=[*lines])


def _number(name: str, label: str, line: Mapping[str, Any]) -> Number:
    """A line's `value`, `interval` and `count`; `label` as in `dense`."""
    value, interval = line["value"], line["interval"]
    times = 100.0 if label.endswith("%") else 1.0
    label = label.removesuffix("%").strip()
    whole = ", ".join(part for part in (name, label) if part)
    low, high = (None, None) if interval is None else (times * x for x in interval)
    unit = "%" if times > 1 else ""
    return Number(whole, times * value, low, high, unit, count=line["count"])


def _pictures(lines: Lines, name: str) -> list[Picture]:
    files = dict.fromkeys(file for line in lines for file in line.get("pictures", ()))
    return [Picture(name, file) for file in files]


def _notes(lines: Lines) -> dict[str, Any]:
    return {key: value for line in lines for key, value in line["notes"].items()}
