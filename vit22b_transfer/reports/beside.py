"""Results of one tower or several beside the paper's, in the paper's order."""

import dataclasses
from collections.abc import Mapping, Sequence

from vit22b_transfer.experiments import outcomes
from vit22b_transfer.experiments import suite_results as results
from vit22b_transfer.experiments.suite_results import Line, Number
from vit22b_transfer.experiments.suite_rows import ROWS, Row


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the table.

    name: of the number, "" for a row without one. numbers: of each tower, None where it
    has none. paper: ViT-22B's number. first: whether it is the first of its row.
    """

    row: Row
    name: str
    numbers: Sequence[Number | None]
    paper: float | None
    unit: str
    first: bool

    @property
    def title(self) -> str:
        """What the line is of, such as "few-shot, pets, 5 shots"."""
        return f"{self.row.name}, {self.name}" if self.name else self.row.name

    @property
    def whole_title(self) -> str:
        """The same; of a row without a number with its data."""
        return (
            self.title
            if self.name or not self.row.data
            else (f"{self.title}, {self.row.data}")
        )


def entries(towers: Sequence[Mapping[int, Line]]) -> list[Entry]:
    """A line for each number that a tower or the paper has; one for a row without."""
    found = []
    for row in ROWS:
        if not any(row.number in lines for lines in towers):
            continue
        own = [
            {number.name: number for number in lines[row.number].numbers}
            if row.number in lines
            else {}
            for lines in towers
        ]
        names = dict.fromkeys(name for numbers in own for name in numbers)
        names |= dict.fromkeys(row.paper)
        for lines in towers:
            failed = lines[row.number].failed if row.number in lines else {}
            for part in failed:
                if part and not any(_is_of(name, part) for name in names):
                    names[part] = None
        for place, name in enumerate(names or [""]):
            numbers = [some.get(name) for some in own]
            known = [number for number in numbers if number is not None]
            unit = known[0].unit if known else row.unit
            paper = row.paper.get(name)
            found.append(Entry(row, name, numbers, paper, unit, place == 0))
    return found


def state(line: Line | None, name: str = "") -> str:
    """Why a line of the table has no number, in a word or two; `name` is the number's.

    Of a row of several parts one may have failed and another lack its data.
    """
    if line is None:
        return "not chosen"
    if line.status == results.SKIPPED:
        return "not run"
    if line.failed and not any(_is_of(name, part) for part in line.failed):
        return "-"
    return "failed" if line.status == results.FAILED else "-"


def _is_of(name: str, part: str) -> bool:
    """Whether a number is one of a part, by their names."""
    return not part or name == part or name.startswith(f"{part}, ")


def shown(number: Number) -> str:
    """A number as it is printed, without its unit."""
    return _rounded(number.value, number.unit)


def interval(number: Number) -> str:
    """Its interval, such as "88.1 to 90.2"; "none" if it has none."""
    if number.low is None or number.high is None:
        return "none"
    low, high = (_rounded(x, number.unit) for x in (number.low, number.high))
    return f"{low} to {high}"


def few(number: Number) -> bool:
    """Whether it is of so few examples that it says little; not where none are told."""
    return 0 < number.count < outcomes.FEW


def paper(entry: Entry) -> str:
    """ViT-22B's number; with a "?" if it is known from memory alone."""
    if entry.paper is None:
        return ""
    text = f"{entry.paper:g}"
    return text if entry.row.sure else f"{text} ?"


def _rounded(value: float, unit: str) -> str:
    digits = 1 if unit == "%" else 3 if abs(value) < 100 else 0
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no minus before zero


def scale(entry: Entry) -> tuple[float, float]:
    """What intervals are drawn in: 0 to 100 %, else what covers all of them."""
    if entry.unit == "%":
        return 0.0, 100.0
    ends = [0.0] if entry.paper is None else [0.0, entry.paper]
    known = [number for number in entry.numbers if number is not None]
    ends += [end for n in known for end in (n.low, n.value, n.high) if end is not None]
    return min(ends), max(ends)
