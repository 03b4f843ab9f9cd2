"""SeqIO sources of labelled images: a folder for each class, or a file of labels.

Classes are those of a class list, `class_lists.py` says how, and have the ids that it
gives; with a hierarchy the ancestors of a label are labels as well. Records have
`labels` (ids, ascending) and, as `references`, the names of those.
"""

import collections
import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.data import annotations, class_lists
from vit22b_transfer.data.image_folders import tell_others
from vit22b_transfer.data.indexed_source import IndexedSource
from vit22b_transfer.data.records import (
    BadRecords,
    PathLike,
    Record,
    printable,
    resolve_path,
)
from vit22b_transfer.data.sources import IMAGE_SUFFIXES

_NO_LABELS = "image without labels"
_UNKNOWN = "unknown class"
_BAD = -1  # among the ids of an image: a label that is none
# Longer ones are no ids of a list that a person has.
_NUMBER = re.compile(r"-?[0-9]{1,18}")


@dataclasses.dataclass(frozen=True)
class LabelFiles:
    """A file of labels and the folder that its file names are relative to."""

    labels: PathLike
    images: PathLike


class LabelledSource(IndexedSource):
    """What both have in common: classes, and records of labelled images.

    classes: a class list, or its names themselves by id (a tuple).
    """

    def __init__(
        self,
        split_to_files: Mapping[str, Any],
        *,
        classes: PathLike | tuple[str, ...],
        hierarchy: PathLike | None = None,
        on_bad_record: str = "error",
        paths_outside: bool = False,
    ):
        self._classes, self._hierarchy = classes, hierarchy
        super().__init__(
            split_to_files, on_bad_record=on_bad_record, paths_outside=paths_outside
        )

    def classes(self) -> class_lists.Classes:
        """The class list and its hierarchy, read anew."""
        if isinstance(self._classes, tuple):
            return class_lists.Classes(self._classes, {})
        return class_lists.read(self._classes, self._hierarchy)

    def _record(self, path, image_id, ids, classes):
        labels = classes.with_ancestors(ids)
        names = tuple(classes.names[number] for number in labels)
        return Record(path, image_id, references=names, labels=labels)

    def _unknown(self, name, classes):
        shown = printable(name)[:200]
        listed = "the list" if isinstance(self._classes, tuple) else self._classes
        return f"{shown!r} is not in {listed}; {classes.nearest(name)}"

    def _warn_of_missing_classes(self, split, records, classes):
        """Says which classes have no image: a folder may be gone."""
        seen = collections.Counter(n for record in records for n in record.labels)
        missing = [name for n, name in enumerate(classes.names) if n not in seen]
        if records and missing:
            shown = ", ".join(printable(name)[:60] for name in missing[:5])
            logging.getLogger(__name__).warning(
                "split %r: %d of %d classes have no image (%s%s)",
                split,
                len(missing),
                len(classes.names),
                shown,
                ", ..." if len(missing) > 5 else "",
            )


class ClassFolderSource(LabelledSource):
    """A folder per split, with a folder of images for each class in it.

    Images may lie deeper in the folder of their class. They are in the order of their
    paths relative to the split's folder, which are their ids. What is no image is left
    out, counted and logged. An image beside the class folders has no label, one in a
    folder of another name an unknown class: both are bad records.
    """

    def _origin(self, files: PathLike) -> str:
        return str(files)

    def _read(self, split, files, bad):
        classes, folder = self.classes(), self._folder(files)
        records, others = [], []
        for directory, names in folder.walk():
            inside = os.path.relpath(directory, folder.root)
            class_name = inside.split(os.sep)[0]
            number = classes.id_of(os.fsencode(class_name).decode(errors="replace"))
            for name in names:
                if not name.lower().endswith(IMAGE_SUFFIXES):
                    others.append(os.path.join(directory, name))
                    continue
                path = os.path.join(directory, name)
                image_id = os.path.relpath(path, folder.root)
                image_id = os.fsencode(image_id).decode(errors="backslashreplace")
                if inside == os.curdir:
                    bad.add(_NO_LABELS, f"{image_id} lies in no folder of a class")
                elif number is None:
                    said = self._unknown(class_name, classes)
                    bad.add(_UNKNOWN, f"{image_id}: folder {said}")
                else:
                    records.append(self._record(path, image_id, [number], classes))
        tell_others(folder.root, IMAGE_SUFFIXES, others)
        self._warn_of_missing_classes(split, records, classes)
        return sorted(records, key=lambda record: record.image_id)


class LabelFileSource(LabelledSource):
    """An image folder with a `.jsonl` or `.csv` file of labels.

    - `.jsonl`: `{"file_name": "a.jpg", "labels": ["cat", "pet"]}`, or `"label": "cat"`
      for one; a text is a class of the list, a number an id.
    - `.csv`: a header with `file_name` and either `label` (a name) or `label_id`.

    Several lines may name the same file: its labels are all of them, and one that is
    bad makes the image a bad record. Records are in the
    order in which files are first named.
    """

    def _resolved(self, files: LabelFiles) -> LabelFiles:
        return LabelFiles(resolve_path(files.labels), resolve_path(files.images))

    def _origin(self, files: LabelFiles) -> str:
        return str(files.labels)

    def _read(self, split, files, bad):
        classes, folder = self.classes(), self._folder(files.images)
        ids: dict[str, set[int]] = {}
        names: dict[str, str] = {}
        for where, file_name, labels in _labelled_lines(files.labels, bad):
            path, problem = folder.find(file_name)
            if path is None:
                bad.add(problem, f"{where}: {file_name!r} is not in {folder.root}")
                continue
            if not labels:
                bad.add(_NO_LABELS, f"{where}: {file_name}")
                continue
            found = [self._id_of(label, where, classes, bad) for label in labels]
            given = {number for number in found if number is not None}
            # An image with a bad label is none: it would be learned without it.
            if len(given) < len(set(found)):
                given = {_BAD}
            names.setdefault(path, file_name)
            ids.setdefault(path, set()).update(given)
        records = [
            self._record(path, names[path], given, classes)
            for path, given in ids.items()
            if _BAD not in given
        ]
        self._warn_of_missing_classes(split, records, classes)
        return records

    def _id_of(self, label, where, classes, bad):
        """The id of a label; None if it is bad, which is told."""
        if isinstance(label, str):
            number = classes.id_of(label.strip())
            if number is None:
                said = self._unknown(label.strip(), classes)
                bad.add(_UNKNOWN, f"{where}: {said}")
            return number
        if 0 <= label < len(classes.names):
            return label
        bad.add(
            "label out of range",
            f"{where}: {str(label)[:60]}; the ids of {self._classes} are 0 to "
            f"{len(classes.names) - 1}",
        )
        return None


def _labelled_lines(path, bad: BadRecords) -> Iterator[tuple[str, str, list]]:
    """(where, file name, names and ids) of each line."""
    readers = {".jsonl": _jsonl_lines, ".csv": _csv_lines}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"{path} has suffix {path.suffix!r}; labels beside an image folder are "
            f"read from {', '.join(readers)}."
        )
    return readers[path.suffix.lower()](path, bad)


def _jsonl_lines(path, bad):
    for where, entry in annotations.jsonl_entries(path):
        several = isinstance(entry, dict) and "labels" in entry
        problem = annotations.missing_field(
            entry,
            file_name=str,
            **{"labels": list} if several else {"label": (str, int)},
        )
        labels = [] if problem else entry["labels"] if several else [entry["label"]]
        for label in labels:
            if problem := problem or _wrong_label(label):
                break
        if problem:
            bad.add("malformed entry", f"{where}: {problem}")
        else:
            yield where, entry["file_name"], labels


def _wrong_label(label):
    if type(label) is int:
        return ""
    problem = annotations.wrong_text(label)
    return f"labels: {problem}" if problem else ""


def _csv_lines(path, bad):
    columns = ("label", "label_id")
    for where, name, column, cell in annotations.csv_cells(path, bad, columns):
        cell = cell.strip()
        if column == "label_id" and cell:
            if not _NUMBER.fullmatch(cell):
                shown = printable(cell)[:60]
                bad.add("malformed entry", f"{where}: label_id {shown!r} is no number")
                continue
            yield where, name, [int(cell)]
        else:
            yield where, name, [cell] if cell else []
