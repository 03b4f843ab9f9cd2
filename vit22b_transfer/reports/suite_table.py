"""The suite's table on a terminal."""

from collections.abc import Sequence

import rich.console

from vit22b_transfer.experiments import outcomes
from vit22b_transfer.experiments.suite_results import FAILED, Line
from vit22b_transfer.host import file_errors, progress, tables
from vit22b_transfer.reports import beside

_REASON = 400


def show(
    towers: Sequence[Sequence[Line]], *, console: rich.console.Console | None = None
) -> None:
    """Prints a table of the lines of each tower, and below it why rows have no number.

    console: of the table; what is said beside it goes to the plain one.
    """
    by_row = [{line.row: line for line in lines} for lines in towers]
    entries = beside.entries(by_row)
    # Short enough for 80 columns: further numbers of a row stand below its name.
    names = [
        f"{entry.row.number:>2}  {entry.title}" if entry.first else f"    {entry.name}"
        for entry in entries
    ]
    columns, marked = {}, False
    for place, lines in enumerate(by_row):
        cells, spans = [], []
        for entry in entries:
            line, number = lines.get(entry.row.number), entry.numbers[place]
            mark = " *" if number is not None and beside.few(number) else ""
            marked |= bool(mark)
            if number is None:
                cells.append(beside.state(line, entry.name))
            else:
                span = f" ({beside.interval(number)}{mark})" if len(by_row) > 1 else ""
                cells.append(f"{beside.shown(number)} {number.unit}".strip() + span)
            spans.append("" if number is None else beside.interval(number) + mark)
        tower = _name(lines, place) if len(by_row) > 1 else "ours"
        columns[tower] = cells
        if len(by_row) == 1:
            columns["95 % interval"] = spans
    columns["ViT-22B"] = [beside.paper(entry) for entry in entries]
    tables.print_table(console or rich.console.Console(), names, columns, heading="row")
    said = progress.console() if console is None else console
    if marked:
        said.print(f"*: of fewer than {outcomes.FEW} examples", markup=False)
    if any(not e.row.sure and e.paper is not None for e in entries):
        said.print("?: from memory, not confirmed against the paper", markup=False)
    for place, lines in enumerate(by_row):
        whose = f"{_name(lines, place)}: " if len(by_row) > 1 else ""
        for number, line in sorted(lines.items()):
            if line.reason:
                word = "failed" if line.status == FAILED else "not run"
                word = "without" if line.status == "done" else word
                reason = file_errors.brief(line.reason, _REASON)
                said.print(f"{whose}row {number} {word}: {reason}", markup=False)


def _name(lines: dict[int, Line], place: int) -> str:
    """A tower's name, short enough for a column and different from the others'."""
    first = next(iter(lines.values()), None)
    name = "" if first is None else first.tower.get("name", "")
    last = name.rstrip("/").rpartition("/")[2]
    return f"{place + 1}: {file_errors.brief(last, 40)}"
