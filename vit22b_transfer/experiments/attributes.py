"""Attributes of images, yes or no, from a CSV file as CelebA's.

A header with any name for the first column, which has file names, and the names of the
attributes; a row per image. An attribute is 1 for yes and -1, or 0, for no: one of the
two in all its rows. A column `partition`, as CelebA's, says which part an image is in:
0 train, 1 validation, 2 test. It may stand in no file: then images are shared out.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from vit22b_transfer import UserError
from vit22b_transfer.data import text_files
from vit22b_transfer.host.file_errors import brief

PARTITION = "partition"
PARTS = ("train", "validation", "test")
# CelebA's file has 202,599 rows of 40 attributes in 25 MB.
_MOST_BYTES = 512 << 20
_LONGEST_FIELD = 300
_VALUES = {"1": 1, "-1": -1, "0": 0}


@dataclasses.dataclass(frozen=True)
class Attributes:
    """What a file says of images: rows by file name, columns by attribute.

    yes: of each attribute and row. parts: 0, 1 or 2 of each row; None if there is no
    column of them.
    """

    path: str
    rows: Mapping[str, int]
    yes: Mapping[str, Bool[np.ndarray, " rows"]]
    parts: Int[np.ndarray, " rows"] | None

    def of(self, attribute: str, rows: Int[np.ndarray, " some"]) -> np.ndarray:
        """Whether the images of these rows have an attribute; UserError if unknown."""
        return self.yes[self.known(attribute)][rows]

    def known(self, attribute: str) -> str:
        """The attribute; UserError with the nearest ones if there is none such."""
        if attribute not in self.yes:
            near = difflib.get_close_matches(attribute, self.yes, n=3, cutoff=0.0)
            raise UserError(
                f"{self.path} has no attribute {attribute!r}; nearest: "
                f"{', '.join(map(brief, near))}."
            )
        return attribute

    def rows_of(self, images: Sequence[str]) -> Int[np.ndarray, " images"]:
        """The row of each image, -1 where there is none.

        An image goes by its path below the folder, or by its file name alone.
        """
        names = [
            name if name in self.rows else name.rpartition("/")[2] for name in images
        ]
        return np.array([self.rows.get(name, -1) for name in names], np.int64)


def read(path: str) -> Attributes:
    """The attributes in a file.

    Raises:
      UserError: naming the line; if it cannot be read, is larger than 512 MiB, names a
        column or an image twice, has a row of another length, a value that is no -1, 0
        or 1, or an attribute with both -1 and 0.
    """
    file = pathlib.Path(path)
    if file.is_file() and file.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path} has more than {_MOST_BYTES} bytes; split it.")
    table = text_files.csv_rows(file)
    number, header = next(table)
    names = [name.strip() for name in header]
    if len(names) < 2 or len({*names[1:]}) < len(names) - 1 or "" in names[1:]:
        raise UserError(
            f"{path}, line {number}: the header is to have a name for the files and "
            f"for each attribute, all different, but is {brief(','.join(names))!r}."
        )
    rows: dict[str, int] = {}
    values: list[list[int]] = []
    for number, row in table:
        if len(row) != len(names) or max(map(len, row)) > _LONGEST_FIELD:
            raise UserError(
                f"{path}, line {number}: {len(row)} fields, the header has "
                f"{len(names)}, and a field has {_LONGEST_FIELD} characters at most."
            )
        name = row[0].strip()
        if rows.setdefault(name, len(values)) != len(values):
            raise UserError(f"{path}, line {number}: {brief(name)} is there twice.")
        values.append([_value(path, number, cell) for cell in row[1:]])
    if not values:
        raise UserError(f"{path} has a header alone; there is no image in it.")
    found = np.array(values, np.int8)
    yes, parts = {}, None
    for column, name in enumerate(names[1:]):
        own = found[:, column]
        if name == PARTITION:
            parts = own.astype(np.int64)
            if parts.min() < 0:
                raise UserError(f"{path}: a {PARTITION} is 0, 1 or 2, but one is -1.")
            continue
        if (own == 2).any() or {-1, 0} <= {*own.tolist()}:
            raise UserError(
                f"{path}: attribute {brief(name)} has the values "
                f"{sorted({*own.tolist()})}; it is to have 1 for yes, and either -1 or "
                "0 for no. What is not known has no place here: take those rows out."
            )
        yes[name] = own == 1
    return Attributes(path, rows, yes, parts)


def shared_out(count: int, shares: Sequence[float], seed: int) -> np.ndarray:
    """0, 1 or 2 for each of so many images, by chance; shares of train and validation.

    Raises:
      UserError: if a part would be empty.
    """
    order = np.random.default_rng(seed).permutation(count)
    cuts = np.round(np.cumsum(shares) * count).astype(int)
    if len(shares) != 2 or not 0 < cuts[0] < cuts[-1] < count:
        raise UserError(
            f"shares={tuple(shares)} of {count} images leave a part without any: give "
            "those of train and validation, and some for test."
        )
    parts = np.full(count, 2)
    parts[order[: cuts[0]]], parts[order[cuts[0] : cuts[1]]] = 0, 1
    return parts


def _value(path, number, cell):
    text = cell.strip()
    value = 2 if text == "2" else _VALUES.get(text)
    if value is None:
        raise UserError(
            f"{path}, line {number}: {brief(text)!r} is no attribute, which is -1, 0 "
            "or 1."
        )
    return value
