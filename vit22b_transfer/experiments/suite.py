"""The paper's table on one tower: rows run in order, each written when it is done.

A row's line in `suite.jsonl` has a key made of the tower's weights, the data and the
protocol. A row whose key is there as done is not run again, so that stopped work goes
on with the rows that are missing; anything else is run, and its line put behind the
others. Nothing that stands in the file is removed.
"""

import dataclasses
import hashlib
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.experiments import head_training, probe
from vit22b_transfer.experiments import suite_results as results
from vit22b_transfer.experiments.suite_parts import Part
from vit22b_transfer.experiments.suite_results import Line
from vit22b_transfer.experiments.suite_rows import Row
from vit22b_transfer.experiments.surveys import Found, Survey
from vit22b_transfer.host import file_errors, locks, whole_files

NOT_BUILT = "not built yet"


@dataclasses.dataclass(frozen=True)
class Tower:
    """What is judged. fingerprint: hash of its weights.

    texts: whether its checkpoint has a text tower as well. side: the least side of what
    it is shown, in pixels.
    """

    name: str
    fingerprint: str
    texts: bool
    side: int = 224

    def facts(self) -> dict[str, str]:
        """As a line of results has it."""
        return {"name": self.name, "fingerprint": self.fingerprint}


@dataclasses.dataclass(frozen=True)
class Job:
    """A part of a row on the layouts that are there. name: of its numbers."""

    part: Part
    name: str
    layouts: tuple[Found, ...]

    def told(self, problem: str) -> str:
        """A problem behind what it is of."""
        return f"{self.name or self.layouts[0].name}: {problem}"

    def data(self) -> dict[str, str]:
        """The digest of each layout."""
        return {layout.name: layout.digest for layout in self.layouts}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A job whose recipe is read. protocol: value by parameter, without paths.

    command: gives what a user would type to run it alone; a head that it asks is
    learned for that. run: what does it, and the folder that its pictures are named
    from.
    """

    protocol: Mapping[str, str]
    command: Callable[[], str]
    run: Callable[[], tuple[Any, str]]


# Reads the recipe of a job.
Prepare = Callable[[Job], Prepared]


def jobs(row: Row, survey: Survey, tower: Tower) -> tuple[list[Job], list[str]]:
    """What can be run of a row, and why the rest cannot."""
    if not row.parts:
        return [], [row.elsewhere or NOT_BUILT]
    found, missing = [], []
    for part in row.parts:
        first, *others = part.layouts
        there = [survey.named(name) for name in others]
        lacking = [n for n, some in zip(others, there, strict=True) if not some]
        firsts = survey.named(first)
        if part.texts and not tower.texts:
            missing.append("the tower is none of a model of pairs")
        elif tower.side < part.least_side:
            missing.append(
                f"{part.name}: needs pictures of {part.least_side} pixels, the tower "
                f"sees {tower.side}"
            )
        elif firsts and (gone := [p for p in part.needs if p not in firsts[0].paths]):
            missing.append(f"{part.name or first}: no {', '.join(gone)} in {first}")
        elif not firsts or lacking:
            missing += [survey.why_not(n) for n in ([] if firsts else [first])]
            missing += [survey.why_not(name) for name in lacking]
        else:
            rest = tuple(some[0] for some in there)
            for layout in firsts:
                own = layout.name.partition("/")[2]
                name = part.name.replace("*", own) if own else part.name
                found.append(Job(part, name, (layout, *rest)))
    return found, [*dict.fromkeys(missing)]


def run(
    rows: Sequence[Row],
    survey: Survey,
    tower: Tower,
    prepare: Prepare,
    out: str,
    console: rich.console.Console,
    *,
    show_faults: bool = False,
    written: Callable[[], object] = lambda: None,
) -> list[Line]:
    """A line for each of the rows, in their order; those run now are written to `out`.

    A row that fails has its error for a reason, and the others go on. show_faults:
    whether the place of an error is printed. written: called behind each line that is
    new in the file.
    """
    folder = whole_files.writable_directory(out, "output directory")
    with locks.held(folder):
        known = results.read_lines(folder)
        done = {line.key: line for line in known if line.status == results.DONE}
        last = results.newest(known, tower.fingerprint)
        found = []
        for number, row in enumerate(rows, 1):
            said = f"[{number}/{len(rows)}] row {row.number}: {row.name}"
            said += f", {row.data}" if row.data else ""
            console.print(f"\n{said}", markup=False)
            line = _row(row, survey, tower, prepare, folder, console, done, show_faults)
            found.append(line)
            if line.key not in done and not _is_same(line, last.get(row.number)):
                path = os.path.join(folder, results.RESULTS_FILE)
                probe.append_lines(path, [line.as_json()])
                written()
    return found


def _row(
    row, survey, tower, prepare, folder, console, done, show_faults
) -> results.Line:
    """The line of a row: one that is there, or of what is run now."""
    began = time.monotonic()
    todo, missing = jobs(row, survey, tower)
    reason = "; ".join(missing)
    name = f"{row.name}, {row.data}" if row.data else row.name
    blank = Line(row.number, name, results.SKIPPED, "", tower.facts(), reason)
    if not todo:
        console.print(f"  not run: {reason}", markup=False)
        return blank
    if missing:
        console.print(f"  without: {reason}", markup=False)
    findings, ready = [], []
    failed: dict[str, str] = {}
    for job in todo:
        try:
            ready.append((job, prepare(job)))
        except UserError as error:
            failed[job.name] = job.told(file_errors.told(error))
    data = {key: text for job in todo for key, text in job.data().items()}
    protocol = {job.name: dict(one.protocol) for job, one in ready}
    facts = [row.number, tower.fingerprint, data, protocol]
    text = json.dumps(facts, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    if key in done and not failed:
        console.print("  done before", markup=False)
        return dataclasses.replace(done[key], reason=reason)
    commands: list[str] = []
    for job, one in ready:
        told = (findings, commands)
        if problem := _attempt(job, one, told, folder, show_faults, console):
            failed[job.name] = job.told(problem)
    for problem in failed.values():
        console.print(f"  failed: {problem}", markup=False)
    seconds = time.monotonic() - began
    console.print(f"  {seconds:.1f} s", markup=False)
    return dataclasses.replace(
        blank,
        status=results.FAILED if failed else results.DONE,
        key=key,
        reason="; ".join([*failed.values(), *missing]),
        numbers=tuple(_beside(row, n) for one in findings for n in one.numbers),
        charts=tuple(chart for one in findings for chart in one.charts),
        pictures=tuple(picture for one in findings for picture in one.pictures),
        data=data,
        protocol=protocol,
        commands=tuple(commands),
        notes=results.as_texts({k: v for one in findings for k, v in one.notes.items()})
        | _odd(todo),
        seconds=round(seconds, 1),
        failed=failed,
    )


def _attempt(job, prepared, told, folder, show_faults, console) -> str:
    """Runs a job, adds its finding and command; its error in a line, or ""."""
    findings, commands = told
    try:
        commands.append(prepared.command())
        shown = commands[-1].replace("\n", "\n  ")
        # Whatever the width: a line that is broken could not be typed.
        console.print(f"  {shown}", markup=False, highlight=False, soft_wrap=True)
        result, place = prepared.run()
        found = job.part.finding(result, job.name)
        pictures = [_inside(picture, place, folder) for picture in found.pictures]
        findings.append(dataclasses.replace(found, pictures=pictures))
    except head_training.StoppedError:
        raise  # a signal is for the whole suite, which goes on there the next time
    except Exception as error:  # a fault of ours must not cost the rows behind it
        if show_faults:
            console.print(traceback.format_exc(), markup=False)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return f"{kind}{file_errors.told(error)}"
    return ""


def _beside(row: Row, number: results.Number) -> results.Number:
    """A number with the paper's."""
    return dataclasses.replace(number, paper=row.paper.get(number.name))


def _inside(picture: results.Picture, place: str, folder: str) -> results.Picture:
    """A picture whose file is named from the folder of results."""
    path = os.path.abspath(os.path.join(place, picture.file))
    return dataclasses.replace(picture, file=os.path.relpath(path, folder))


def _odd(todo: Sequence[Job]) -> dict[str, str]:
    """What is odd in the layouts of a row."""
    layouts = {layout.name: layout for job in todo for layout in job.layouts}
    return {
        f"{name}: {note}": str(count)
        for name, layout in layouts.items()
        for note, count in layout.notes.items()
    }


def _is_same(line: Line, other: Line | None) -> bool:
    """Whether a line that is there says the same: nothing is run for it."""
    return (
        other is not None
        and line.status == results.SKIPPED
        and line.as_json() == other.as_json()
    )
