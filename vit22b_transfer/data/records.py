"""A record of a data set, and what becomes of a bad one: an error, or counted."""

import dataclasses
import difflib
import logging
import os
import pathlib
import re
import threading
from collections.abc import Sequence

from vit22b_transfer import UserError

PathLike = str | os.PathLike
BAD_RECORD_POLICIES = ("error", "skip")

_SHOWN_ITEMS = 5
_SHOWN_LENGTH = 400
_QUOTED_LENGTH = 200
# Where a user says that bad records or images are to be left out.
OWN_TASK = (
    "in the task's file: copy one of the package's, such as tasks/my_captions.py, into "
    "./tasks"
)
SKIPPING = f"give the source on_bad_record='skip' ({OWN_TASK})"


def skipping_advice(reader: str) -> str:
    """How what a recipe names leaves out bad records."""
    return f"set --gin.{reader}.on_bad_record=\"'skip'\""


class MissingFilesError(UserError):
    """A file, a folder, or the variable that names it is not there."""


class MissingSplitError(UserError):
    """A split of a task has no files; `split` is its name."""

    def __init__(self, problem: str, task: str, split: str, splits: Sequence[str]):
        super().__init__(
            f"{problem} Split {split!r} of task {task!r} is read from there; its "
            f"splits are {', '.join(sorted(splits))}."
        )
        self.split = split


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One example before its image is read.

    `target` is the text to learn ("" if unknown), `references` all the texts that a
    prediction is scored against; `question` and `question_id` may be "".
    `image_paths` are all images of an example with several, `image_path` the first.
    `answer_type` and `question_type` are what VQAv2's annotations say of a question.
    `labels` are ids of classes; their names are then the references.
    `image_problem` says why there is no image, of a record that keeps its place.
    """

    image_path: str
    image_id: str
    question_id: str = ""
    question: str = ""
    target: str = ""
    references: tuple[str, ...] = ()
    image_paths: tuple[str, ...] = ()
    answer_type: str = ""
    question_type: str = ""
    labels: tuple[int, ...] = ()
    image_problem: str = ""


def printable(text: str) -> str:
    """The text with an escape for all that is no printable character; on one line.

    Control characters, the ends of lines, and halves of characters, which stand for the
    bytes of a file name that is no UTF-8: `\\n`, `\\x1b`, `\\udce9`.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def half_character(text: str) -> str:
    """What is wrong with a text that UTF-8 cannot hold; "" if it can."""
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = printable(text[error.start])
        return f"is no Unicode text ({half} at character {error.start + 1})"
    return ""


class Tally:
    """Bad items by reason; each item counts once, however often it is met."""

    def __init__(self):
        self._items: dict[str, dict[str, None]] = {}
        self._lock = threading.Lock()

    def add(self, reason: str, item: str) -> bool:
        """Counts the item; whether it is the first ever met with this reason."""
        with self._lock:
            items = self._items.setdefault(reason, {})
            is_first = not items
            items[item] = None
            return is_first

    def counts(self) -> dict[str, int]:
        """The number of distinct items for each reason."""
        with self._lock:
            return {reason: len(items) for reason, items in self._items.items()}

    def summary(self) -> str:
        """The counts in words, with the first few items of each reason; "" if none."""
        with self._lock:
            parts = []
            for reason, items in self._items.items():
                shown = "; ".join(map(_shortened, list(items)[:_SHOWN_ITEMS]))
                more = ", ..." if len(items) > _SHOWN_ITEMS else ""
                parts.append(f"{len(items)} x {reason} ({shown}{more})")
            return ", ".join(parts)


class BadRecords:
    """Applies `on_bad_record` to each problem: 'error' raises, 'skip' counts.

    advice: how to leave out and count such records, in an error.
    """

    def __init__(self, on_bad_record: str, origin: str, advice: str = SKIPPING):
        check_choice("on_bad_record", on_bad_record, BAD_RECORD_POLICIES)
        self.tally = Tally()
        self._skip = on_bad_record == "skip"
        self._origin, self._advice = origin, advice

    def add(self, reason: str, detail: str) -> None:
        """Raises UserError naming the item, or counts it, as the policy says.

        The detail may hold what is not printable: it is escaped.
        """
        detail = printable(detail)
        if not self._skip:
            raise UserError(
                f"{self._origin}: {reason}: {_shortened(detail)}. Correct the data, or "
                f"{self._advice} to leave out such records and count them."
            )
        self.tally.add(reason, detail)

    def log(self) -> None:
        """Warns once about everything that was skipped."""
        if self.tally.counts():
            logging.getLogger(__name__).warning(
                "%s: skipped %s", self._origin, self.tally.summary()
            )


def _shortened(text):
    """A stranger's text may be of any length."""
    return text if len(text) <= _SHOWN_LENGTH else f"{text[: _SHOWN_LENGTH - 3]}..."


def quoted(text: str) -> str:
    """A stranger's text in quotes, for a message: escaped; a long one is cut off."""
    if len(text) <= _QUOTED_LENGTH:
        return repr(text)
    return f"{text[:_QUOTED_LENGTH]!r}... ({len(text):,} characters)"


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """UserError unless `value` is one of `choices`; names the nearest."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(
            f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}."
            f"{hint}"
        )


def resolve_path(path: PathLike) -> pathlib.Path:
    """The absolute path, with `~` and environment variables filled in."""
    expanded = os.path.expanduser(os.path.expandvars(os.fspath(path)))
    if problem := half_character(expanded):
        raise UserError(
            f"the path {printable(expanded)} {problem}; rename the file or folder."
        )
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise MissingFilesError(
            f"path {os.fspath(path)!r} needs the environment variable {unset[1]}, "
            "which is not set; set it to the directory or file that you want to use."
        )
    return pathlib.Path(expanded).absolute()
