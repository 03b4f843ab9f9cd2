"""A record of a data set, and what becomes of a bad one: an error, or counted."""

import dataclasses
import difflib
import logging
import os
import pathlib
import re
import threading
from collections.abc import Iterator, Sequence

from vit22b_transfer import UserError

PathLike = str | os.PathLike

_SHOWN_ITEMS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One example before its image is read.

    `target` is the text to learn ("" if unknown), `references` all the texts that a
    prediction is scored against; `question` and `question_id` may be "".
    `image_paths` are all images of an example with several, `image_path` the first.
    """

    image_path: str
    image_id: str
    question_id: str = ""
    question: str = ""
    target: str = ""
    references: tuple[str, ...] = ()
    image_paths: tuple[str, ...] = ()


class Tally:
    """Bad items by reason; each item counts once, however often it is met."""

    def __init__(self):
        self._items: dict[str, dict[str, None]] = {}
        self._lock = threading.Lock()

    def add(self, reason: str, item: str) -> bool:
        """Counts the item; whether it is the first one with this reason."""
        with self._lock:
            items = self._items.setdefault(reason, {})
            items[item] = None
            return len(items) == 1

    def counts(self) -> dict[str, int]:
        """The number of distinct items for each reason."""
        with self._lock:
            return {reason: len(items) for reason, items in self._items.items()}

    def summary(self) -> str:
        """The counts in words, with the first few items of each reason; "" if none."""
        with self._lock:
            parts = []
            for reason, items in self._items.items():
                shown = "; ".join(list(items)[:_SHOWN_ITEMS])
                more = ", ..." if len(items) > _SHOWN_ITEMS else ""
                parts.append(f"{len(items)} x {reason} ({shown}{more})")
            return ", ".join(parts)


class BadRecords:
    """Applies `on_bad_record` to each problem: 'error' raises, 'skip' counts."""

    def __init__(self, on_bad_record: str, origin: str):
        self.tally = Tally()
        self._skip = on_bad_record == "skip"
        self._origin = origin

    def add(self, reason: str, detail: str) -> None:
        """Raises UserError naming the item, or counts it, as the policy says."""
        if not self._skip:
            raise UserError(
                f"{self._origin}: {reason}: {detail}. Correct the data, or give the "
                "source on_bad_record='skip' to leave out such records and count them."
            )
        self.tally.add(reason, detail)

    def log(self) -> None:
        """Warns once about everything that was skipped."""
        if self.tally.counts():
            logging.getLogger(__name__).warning(
                "%s: skipped %s", self._origin, self.tally.summary()
            )


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
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise UserError(
            f"path {os.fspath(path)!r} needs the environment variable {unset[1]}, "
            "which is not set; set it to the directory or file that you want to use."
        )
    return pathlib.Path(expanded).absolute()


class ImageFolder:
    """The files of a directory tree, listed once per directory.

    paths_outside: whether file names may lead out of it, by `..` or from the root.
    """

    def __init__(self, root: pathlib.Path, *, paths_outside: bool = False):
        if not root.is_dir():
            raise UserError(f"{root} is not a directory; an image folder is expected.")
        self.root = root
        self._paths_outside = paths_outside
        self._names: dict[str, set[str]] = {}

    def find(self, file_name: str) -> tuple[str | None, str]:
        """(path, "") of a file given relative to the root, or (None, the problem)."""
        if "\0" in file_name:
            return None, "file name with a NUL character"
        inside = os.path.normpath(file_name)
        leaves = os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir
        if leaves and not self._paths_outside:
            return None, "file name that leaves the image folder (see paths_outside)"
        directory, name = os.path.split(os.path.join(self.root, inside))
        if directory not in self._names:
            try:
                self._names[directory] = set(os.listdir(directory))
            except OSError:
                self._names[directory] = set()
        if file_name.strip() and name in self._names[directory]:
            return os.path.join(directory, name), ""
        return None, "missing image file"

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """(directory, its files) of the tree; links are followed, each folder once."""
        seen = set()
        for directory, folders, names in os.walk(self.root, followlinks=True):
            status = os.stat(directory)
            identity = status.st_dev, status.st_ino
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            yield directory, names
