"""Results in the formats of the official servers of COCO captions and VQAv2.

COCO: `[{"image_id": int, "caption": str}, ...]`, an entry for each image of the split
(cocodataset.org, "Results format"). VQAv2: `[{"question_id": int, "answer": str},
...]`, one for each question (visualqa.org, "Results format"). The servers take a whole
split and no other fields.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.data.records import quoted
from vit22b_transfer.host import whole_files

# Format -> the field of an entry with its id, which lines have as well, and its text.
FORMATS = {"coco": ("image_id", "caption"), "vqa": ("question_id", "answer")}
# Servers read ids as 64-bit integers at most.
_MOST = 2**63 - 1


def entries(
    lines: Iterable[Mapping[str, Any]], kind: str, where: str
) -> tuple[list[dict[str, Any]], int]:
    """The entries of a results file, and how many have an empty text for want of one.

    An image that could not be read has an entry with an empty text, as servers refuse a
    file without one. lines: all of a file, in order. kind: of `FORMATS`.

    Raises:
      UserError: for an id that is no number or is there twice, or a prediction that is
        no text.
    """
    field, text = FORMATS[kind]
    found: dict[int, dict[str, Any]] = {}
    unread = 0
    for line in lines:
        given = line.get(field, "")
        digits = str(given)
        if not (digits.isascii() and digits.isdigit() and int(digits[:20]) <= _MOST):
            raise UserError(
                f"{where}: the {field} of example {line['index']} is "
                f"{quoted(digits)}; servers take a whole number."
            )
        number = int(digits[:20])
        if number in found:
            raise UserError(
                f"{where}: {field} {number} is there twice; servers take one {text} of "
                "each."
            )
        said = "" if "error" in line else line["prediction"]
        unread += "error" in line
        if not isinstance(said, str):
            raise UserError(
                f"{where}: the prediction of example {line['index']} is no text, so no "
                f"{text}."
            )
        found[number] = {field: number, text: said.strip()}
    return list(found.values()), unread


def write(
    lines: Iterable[Mapping[str, Any]], kind: str, where: str, path: str
) -> tuple[int, int]:
    """Writes a results file; (its entries, those with an empty text: see `entries`).

    Raises:
      UserError: as `entries`; or if `path` does not end in .json.
    """
    if not path.endswith(".json"):
        raise UserError(f"{path}: servers take a file whose name ends in .json.")
    made, unread = entries(lines, kind, where)
    with whole_files.replacing(path) as file:
        json.dump(made, file)
    return len(made), unread
