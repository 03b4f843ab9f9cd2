"""Answers of observers, human or model, to pictures of the sixteen classes.

Files are CSV as in the public model-vs-human benchmark (Geirhos et al. 2021), a row per
trial: `subj, session, trial, rt, object_response, category, condition, imagename`, in
any case and order. A row's answer may be `na`: none in time, which counts as wrong.
"""

import csv
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

from vit22b_transfer import UserError
from vit22b_transfer.data import text_files
from vit22b_transfer.data.records import PathLike, printable
from vit22b_transfer.evaluation.sixteen_classes import NAMES
from vit22b_transfer.host import whole_files

NO_ANSWER = "na"
_COLUMNS = "subj session trial rt object_response category condition imagename".split()
_READ = ("subj", "object_response", "category", "condition", "imagename")
# The benchmark's files have about 1,000 rows in 100 kB.
_MOST_BYTES = 64 * 2**20
_LONGEST_FIELD = 300


@dataclasses.dataclass(frozen=True)
class Responses:
    """Trials, each with its observer, answer, right class, condition and picture.

    Conditions are as written (compare them by `condition_key`), `images` file names.
    """

    observers: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.observers)

    def where(self, kept: Iterable[bool]) -> "Responses":
        """The trials that are marked, in their order."""
        numbers = [number for number, keep in enumerate(kept) if keep]
        return Responses(
            *(tuple(column[n] for n in numbers) for column in self._columns())
        )

    def of(self, observer: str) -> "Responses":
        """The trials of one observer."""
        return self.where(name == observer for name in self.observers)

    def joined(self, other: "Responses") -> "Responses":
        """These trials, then the others."""
        pairs = zip(self._columns(), other._columns(), strict=True)
        return Responses(*(first + second for first, second in pairs))

    def correct(self) -> tuple[bool, ...]:
        """Whether each answer is the right class."""
        return tuple(
            answer == category
            for answer, category in zip(self.answers, self.categories, strict=True)
        )

    def unanswered(self) -> int:
        """How many trials have no answer."""
        return self.answers.count(NO_ANSWER)

    def _columns(self):
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def condition_key(condition: str) -> str:
    """One form of a condition, however it is written.

    Numbers are one if they are equal (`0.00`, `0.0` and `0`; `1` and `1.0`), and case
    does not matter (`true`, `True`): files of one benchmark differ in both.
    """
    text = condition.strip().lower()
    try:
        return repr(float(text) + 0.0)  # -0.0 is 0.0
    except ValueError:
        return text


def image_id(image: str) -> str:
    """What is the same of a picture for all observers: its name without the trial's.

    Of the parts between `_` the last one; the last two if the first of them starts with
    `n0`, which is a picture of ImageNet; the whole name without a `_`.
    """
    parts = image.split("_")
    if len(parts) > 1 and parts[-2].startswith("n0"):
        return "_".join(parts[-2:])
    return parts[-1]


def stimulus(image: str) -> tuple[str, str]:
    """(condition, right class) by the name of a picture of the benchmark.

    They are its fourth and fifth part between `_`, in `0001_cop_s01_c30_oven_...`. Sets
    without conditions (edge, sketch, ...) lie in a folder for each class instead, and
    their names do not say it.

    Raises:
      UserError: if the name has fewer parts, or its fifth is no class.
    """
    parts = image.split("_")
    if len(parts) < 6 or parts[4] not in NAMES:
        raise UserError(
            f"{printable(image)[:200]!r} does not say condition and class, as "
            "0001_cop_s01_c30_oven_10_n03041632_7380.png does; take them from the "
            "folder that the picture lies in."
        )
    return parts[3], parts[4]


def read(paths: Sequence[PathLike]) -> Responses:
    """The trials of all files, in their order.

    Raises:
      UserError: naming file and line; if a file cannot be read, is larger than 64 MiB,
        lacks a column or has one twice; if a row has more or fewer fields than the
        header, one of more than 300 characters, no observer or picture, or a class
        that is none of the sixteen.
    """
    if not paths:
        raise UserError("there is no file of responses; name one at least.")
    rows = []
    for path in map(pathlib.Path, paths):
        rows += _rows(path)
    return Responses(*map(tuple, zip(*rows, strict=True)))


def write(path: PathLike, responses: Responses) -> None:
    """A file as `read` takes it: one session, trials from 1, no response time.

    The public benchmark expects the name DATA-SET_OBSERVER_session-1.csv.

    Raises:
      UserError: if the file cannot be written.
    """
    rows = zip(*responses._columns(), strict=True)
    try:
        with whole_files.replacing(str(path)) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(_COLUMNS)
            for trial, (observer, *told) in enumerate(rows, start=1):
                table.writerow([observer, 1, trial, "NaN", *told])
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def _rows(path):
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # What is wrong, the reader says.
    if size > _MOST_BYTES:
        raise UserError(
            f"{path} has {size} bytes, more than the {_MOST_BYTES} that a file of "
            "responses may have; split it, or check that it is one."
        )
    table = text_files.csv_rows(path)
    number, header = next(table)
    header = [name.strip().lower() for name in header]
    missing = [name for name in _READ if name not in header]
    if missing or len(set(header)) != len(header):
        found = printable(", ".join(header))[:200]
        raise UserError(
            f"{path}, line {number}: the header is to have each of "
            f"{', '.join(_READ)} once, but has: {found}."
        )
    places = [header.index(name) for name in _READ]
    rows = [
        _checked_row(path, number, row, len(header), places) for number, row in table
    ]
    if not rows:
        raise UserError(f"{path} has a header alone; there is no trial in it.")
    return rows


def _checked_row(path, number, row, columns, places):
    if len(row) != columns:
        raise UserError(
            f"{path}, line {number}: {len(row)} fields, but the header has {columns}."
        )
    if max(map(len, row)) > _LONGEST_FIELD:
        raise UserError(
            f"{path}, line {number}: a field of {max(map(len, row))} characters; the "
            f"longest may have {_LONGEST_FIELD}."
        )
    observer, answer, category, condition, image = (row[n].strip() for n in places)
    answer, category = answer.lower(), category.lower()
    if not observer or not image:
        raise UserError(f"{path}, line {number}: the observer or the picture is empty.")
    if category not in NAMES or answer not in (*NAMES, NO_ANSWER):
        wrong = answer if category in NAMES else category
        raise UserError(
            f"{path}, line {number}: {printable(wrong)!r} is none of the classes "
            f"{', '.join(NAMES)}, and an answer may be {NO_ANSWER}."
        )
    return observer, answer, category, condition, image
