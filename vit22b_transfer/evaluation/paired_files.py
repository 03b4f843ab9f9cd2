"""Two files of predictions on the same examples: which is better, and is it chance?"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.data.records import quoted
from vit22b_transfer.evaluation import example_numbers, intervals, scored_files
from vit22b_transfer.evaluation.intervals import Difference, Exact
from vit22b_transfer.evaluation.scored_files import Judged
from vit22b_transfer.host import tables
from vit22b_transfer.inference.prediction_files import read_lines

# A difference that is worth showing, in points: a hundredth of the metric's unit.
EFFECT = 0.5
_Key = tuple[str, str, int]


class Change(NamedTuple):
    """One metric of both, and their difference; all as the metric has them, not x 100.

    exact: McNemar's test, of metrics that have an example right or wrong. needed: how
      many images would show a difference of `EFFECT` points, with 80 % power at 5 %.
    """

    metric: str
    first: float
    second: float
    difference: Difference | None
    exact: Exact | None
    needed: int | None


class Flip(NamedTuple):
    """An example, its two lines, and how much better the first is."""

    first: Mapping[str, Any]
    second: Mapping[str, Any]
    gap: float


class Paired(NamedTuple):
    """Both files on the examples that they share; what was left out is counted.

    unread: examples whose image one of the two could not read. flips: examples that
      differ by the main metric, the largest gap first.
    """

    first: Judged
    second: Judged
    only_first: int
    only_second: int
    unread: int
    main: str
    changes: list[Change]
    flips: list[Flip]


def pair(
    first: str, second: str, task: str, *, split: str = "", common: bool = False
) -> Paired:
    """Compares two files of predictions of one task.

    Examples are the same by their question, or by image and prompt.

    common: whether examples that one file alone has are left out and counted.

    Raises:
      UserError: if the files have other examples and not `common`, or other references
        of one; as `scored_files.judge`.
    """
    ours, theirs = _keyed(first), _keyed(second)
    shared = [key for key in ours if key in theirs]
    only_first, only_second = len(ours) - len(shared), len(theirs) - len(shared)
    if not shared:
        raise UserError(f"{first} and {second} have no example in common.")
    if (only_first or only_second) and not common:
        odd = next(
            key for key in [*ours, *theirs] if key not in ours or key not in theirs
        )
        raise UserError(
            f"{first} and {second} are not of the same examples: {only_first} are in "
            f"the first alone, {only_second} in the second, {len(shared)} in both; one "
            f"is {quoted(odd[0])}. With --common those in both are compared."
        )
    read = [
        key for key in shared if "error" not in ours[key] and "error" not in theirs[key]
    ]
    for key in read:
        for name in ("references", "target"):
            if ours[key].get(name) != theirs[key].get(name):
                raise UserError(
                    f"example {ours[key]['index']} of {first} and "
                    f"{theirs[key]['index']} of {second} have other {name}: the two "
                    "are not of one split."
                )
    one = scored_files.judge_lines((ours[key] for key in read), first, task, split)
    other = scored_files.judge_lines((theirs[key] for key in read), second, task, split)
    changes = [
        _change(name, one, other) for name in one.numbers if name in other.numbers
    ]
    main = scored_files.main_metric(one.numbers)
    gaps = one.numbers[main].rows[:, 0] - other.numbers[main].rows[:, 0]
    order = np.argsort(-np.abs(np.nan_to_num(gaps)), kind="stable")
    flips = [
        Flip(one.lines[place], other.lines[place], float(gaps[place]))
        for place in order
        if gaps[place] and not np.isnan(gaps[place])
    ]
    left_out = len(shared) - len(read)
    return Paired(one, other, only_first, only_second, left_out, main, changes, flips)


def sentence(change: Change) -> str:
    """`A is better by 1.3 cider_d [0.4, 2.2]`, or that no difference is shown."""
    if change.difference is None:
        return f"{change.metric}: fewer than two images, so no interval"
    found = change.difference.interval
    gap, low, high = 100 * found.value, 100 * found.low, 100 * found.high
    if low <= 0 <= high:
        return (
            f"no difference of {change.metric} is shown: A - B = {gap:.1f} "
            f"[{low:.1f}, {high:.1f}]"
        )
    if gap < 0:
        gap, low, high = -gap, -high, -low
    better = "A" if found.value > 0 else "B"
    return f"{better} is better by {gap:.1f} {change.metric} [{low:.1f}, {high:.1f}]"


def main_change(paired: Paired) -> Change:
    """That of the main metric."""
    return next(c for c in paired.changes if c.metric == paired.main)


def left_out(paired: Paired) -> str:
    """What was not compared, "" if nothing."""
    parts = {
        "in A alone": paired.only_first,
        "in B alone": paired.only_second,
        "not read by one of the two": paired.unread,
    }
    said = ", ".join(f"{count} {what}" for what, count in parts.items() if count)
    return f"left out: {said}" if said else ""


def rows(paired: Paired) -> tuple[list[str], dict[str, list[str]]]:
    """The names of metrics, and columns of a table of them; values are times 100."""
    columns: dict[str, list[str]] = {
        name: []
        for name in ("A", "B", "A - B", "95 %", "McNemar p", f"images for {EFFECT:g}")
    }
    for change in paired.changes:
        low = high = gap = math.nan
        if change.difference is not None:
            found = change.difference.interval
            gap, low, high = found.value, found.low, found.high
        exact = "" if change.exact is None else f"{change.exact.probability:.3g}"
        needed = "" if change.needed is None else f"{change.needed:,}"
        cells = [f"{100 * value:.2f}" for value in (change.first, change.second, gap)]
        cells += [f"[{100 * low:.2f}, {100 * high:.2f}]", exact, needed]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    return [change.metric for change in paired.changes], columns


def show(paired: Paired, console: rich.console.Console) -> None:
    """Prints the comparison."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"A: {paired.first.path}")
    say(f"B: {paired.second.path}")
    say(sentence(main_change(paired)))
    names, columns = rows(paired)
    tables.print_table(console, names, columns, heading="metric x 100")
    better = sum(flip.gap > 0 for flip in paired.flips)
    images = len(np.unique(paired.first.images))
    say(
        f"{len(paired.first.lines)} examples of {images} images; by {paired.main} A is "
        f"better on {better}, B on {len(paired.flips) - better}"
    )
    if said := left_out(paired):
        say(said)
    say(
        "Intervals: paired bootstrap over images, BCa. McNemar takes examples as "
        "independent; with several of an image believe the interval."
    )


def _change(name: str, one: Judged, other: Judged) -> Change:
    ours, theirs = one.numbers[name], other.numbers[name]
    found = example_numbers.difference(ours, theirs, one.images)
    exact = needed = None
    if ours.statistic is None:
        rows = np.concatenate([ours.rows, theirs.rows], axis=1)
        rows = rows[~np.isnan(rows).any(axis=1)]
        # Of a metric that is 0 everywhere it is not known what it counts.
        if np.any(rows) and np.isin(rows, (0.0, 1.0)).all():
            exact = intervals.mcnemar(rows[:, 0] > 0, rows[:, 1] > 0)
    if found is not None and found.interval.standard_error > 0:
        images = len(np.unique(one.images))
        deviation = found.interval.standard_error * math.sqrt(images)
        needed = intervals.needed_examples(EFFECT / 100, deviation)
    return Change(name, ours.value(), theirs.value(), found, exact, needed)


def _keyed(path: str) -> dict[_Key, dict[str, Any]]:
    """The lines by what makes them the same example in two files."""
    found: dict[_Key, dict[str, Any]] = {}
    met: dict[tuple[str, str], int] = {}
    for line in read_lines(path):
        asked, image = line.get("question_id", ""), line.get("image_id", "")
        if asked != "":
            name = (str(asked), "")
        elif image != "":
            name = (str(image), str(line.get("prompt", "")))
        else:
            name = (f"index {line['index']}", "")
        met[name] = met.get(name, -1) + 1
        found[(name[0], name[1], met[name])] = line
    return found


def differing(first: Iterable[str], second: Iterable[str]) -> list[str]:
    """`- ` and `+ ` lines by which two recipes differ; comments aside."""
    import difflib

    ours, theirs = (
        [line.rstrip() for line in lines if line.strip() and not line.startswith("#")]
        for lines in (first, second)
    )
    found = difflib.unified_diff(ours, theirs, "A", "B", lineterm="", n=0)
    return [line for line in found if not line.startswith(("---", "+++", "@@"))]
