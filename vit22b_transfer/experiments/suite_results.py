"""What the suite knows of a row: numbers with intervals, charts, pictures, as JSON.

Lines of `suite.jsonl` are read back to go on and to compare towers; they may come from
a stranger, so that every field is checked and no file outside their folder is named.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.host import file_errors, json_files

RESULTS_FILE = "suite.jsonl"
DONE, SKIPPED, FAILED = "done", "skipped", "failed"
STATES = (DONE, SKIPPED, FAILED)
_MOST_BYTES = 64 << 20
# Of texts, and of numbers, charts, lines and points in a row.
_MOST_TEXT, _MOST_ITEMS, _MOST_POINTS = 100_000, 2_000, 5_000
_ADVICE = "Is it a suite.jsonl of `vit22b suite`? Move it away to start anew."


@dataclasses.dataclass(frozen=True)
class Number:
    """One number of a row, in the paper's unit.

    low, high: the ends of its 95 % interval; None where none is defined. paper: what
    ViT-22B has; None if nothing is known that compares. count: images that it is of.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    unit: str = ""
    paper: float | None = None
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points (x, y) of a chart, in the order in which they are joined.

    spans: (low, high) of each y; empty if they have none.
    """

    name: str
    points: Sequence[Sequence[float]]
    spans: Sequence[Sequence[float]] = ()


@dataclasses.dataclass(frozen=True)
class Chart:
    """A line chart; with `bars`, a bar for each point of the one curve.

    ticks: names of the points of bars, in their order.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = False
    bars: bool = False
    ticks: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file, relative to the folder of `suite.jsonl`."""

    title: str
    file: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """What running a part of a row gives. notes: what was counted on the way."""

    numbers: Sequence[Number]
    charts: Sequence[Chart] = ()
    pictures: Sequence[Picture] = ()
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of `suite.jsonl`.

    key: of tower, data and protocol together; a line of the same key is not made again.
    tower: name and fingerprint of its weights. data: digests by layout. protocol: value
    by parameter. seconds: that the row took. failed: what went wrong with a part of it,
    by the name of the part's numbers.
    """

    row: int
    name: str
    status: str
    key: str
    tower: Mapping[str, str]
    reason: str = ""
    numbers: Sequence[Number] = ()
    charts: Sequence[Chart] = ()
    pictures: Sequence[Picture] = ()
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    protocol: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    commands: Sequence[str] = ()
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As `read_lines` takes it."""
        return dataclasses.asdict(self)


def read_lines(folder: str) -> list[Line]:
    """All lines of the `suite.jsonl` in a folder; none if it is not there.

    Raises:
      UserError: naming the line, for anything that the suite does not write.
    """
    path = os.path.join(folder, RESULTS_FILE)
    if not os.path.lexists(path):
        return []
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {_ADVICE}") from None
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path} has more than {_MOST_BYTES} bytes. {_ADVICE}")
    lines = []
    for number, text in enumerate(content.split(b"\n"), 1):
        if text.strip():
            value = json_files.parse(text, path, line=number, advice=_ADVICE)
            where = f"{path}, line {number}"
            try:
                lines.append(_read(Line, value))
            except _Wrong as error:
                raise UserError(f"{where}: {error}. {_ADVICE}") from None
    return lines


class _Wrong(Exception):
    pass


def _read(kind: Any, value: Any) -> Any:
    """A dataclass of JSON; what it lacks has its default."""
    if not isinstance(value, dict):
        raise _Wrong(f"{file_errors.brief(value, 80)} is no object")
    readers, found = _READERS[kind], {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            try:
                found[field.name] = readers[field.name](value[field.name])
            except _Wrong as error:
                raise _Wrong(f"{field.name}: {error}") from None
        elif (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise _Wrong(f"{field.name} is missing")
    return kind(**found)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise _Wrong(f"{file_errors.brief(value, 80)} is no text of a usual length")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Wrong(f"{file_errors.brief(value, 80)} is no number")
    if abs(value) > 1e30 or not math.isfinite(value):
        raise _Wrong(f"{file_errors.brief(value, 80)} is not finite")
    return float(value)


def _perhaps(value: Any) -> float | None:
    return None if value is None else _number(value)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 10**12:
        raise _Wrong(f"{file_errors.brief(value, 80)} is no count")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(f"{file_errors.brief(value, 80)} is neither true nor false")
    return value


def _state(value: Any) -> str:
    if value not in STATES:
        raise _Wrong(f"{file_errors.brief(value, 80)} is none of {', '.join(STATES)}")
    return value


def _inside(value: Any) -> str:
    """A path that stays in its folder, by its text."""
    path = os.path.normpath(_text(value))
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir or "\0" in path:
        raise _Wrong(f"{file_errors.brief(value, 80)} leaves the folder")
    return path


def _several(reader: Any, most: int = _MOST_ITEMS) -> Any:
    def read(value: Any) -> tuple:
        if not isinstance(value, list) or len(value) > most:
            raise _Wrong(f"{file_errors.brief(value, 80)} is no list of at most {most}")
        return tuple(map(reader, value))

    return read


def _named(reader: Any) -> Any:
    def read(value: Any) -> dict:
        if not isinstance(value, dict) or len(value) > _MOST_ITEMS:
            raise _Wrong(f"{file_errors.brief(value, 80)} is no object of a usual size")
        return {_text(name): reader(item) for name, item in value.items()}

    return read


def _pair(value: Any) -> tuple:
    if not isinstance(value, list) or len(value) != 2:
        raise _Wrong(f"{file_errors.brief(value, 80)} is no pair")
    return tuple(map(_number, value))


def _of(kind: Any) -> Any:
    return lambda value: _read(kind, value)


_PAIRS = _several(_pair, _MOST_POINTS)
_READERS: dict[Any, dict[str, Any]] = {
    Number: {
        "name": _text,
        "value": _number,
        "low": _perhaps,
        "high": _perhaps,
        "unit": _text,
        "paper": _perhaps,
        "count": _whole,
    },
    Curve: {"name": _text, "points": _PAIRS, "spans": _PAIRS},
    Chart: {
        "title": _text,
        "x": _text,
        "y": _text,
        "curves": _several(_of(Curve), 100),
        "log_x": _flag,
        "bars": _flag,
        "ticks": _several(_text),
    },
    Picture: {"title": _text, "file": _inside},
    Line: {
        "row": _whole,
        "name": _text,
        "status": _state,
        "key": _text,
        "tower": _named(_text),
        "reason": _text,
        "numbers": _several(_of(Number)),
        "charts": _several(_of(Chart), 100),
        "pictures": _several(_of(Picture)),
        "data": _named(_text),
        "protocol": _named(_named(_text)),
        "commands": _several(_text),
        "notes": _named(_text),
        "seconds": _number,
        "failed": _named(_text),
    },
}


def newest(lines: Iterable[Line], fingerprint: str | None = None) -> dict[int, Line]:
    """The last line of each row of one tower, by default that of the last line."""
    lines = list(lines)
    if fingerprint is None and lines:
        fingerprint = lines[-1].tower.get("fingerprint", "")
    return {
        line.row: line
        for line in lines
        if line.tower.get("fingerprint", "") == fingerprint
    }


def as_texts(notes: Mapping[str, Any]) -> dict[str, str]:
    """Values of any kind as texts, those of no text as JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in notes.items()
    }
