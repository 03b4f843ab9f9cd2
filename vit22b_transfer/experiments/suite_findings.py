"""What experiments return, as numbers and charts of the suite's rows."""

from collections.abc import Sequence
from typing import Any

from vit22b_transfer.experiments.outcomes import Outcome
from vit22b_transfer.experiments.suite_results import Chart, Curve, Finding, Number


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
