"""Text files of strangers, whole and in lines. A line ends with \\n or \\r\\n only.

`str.splitlines` ends one at eleven characters, which captions may hold: U+2028, U+0085,
form feeds.
"""

import pathlib
import re
from collections.abc import Iterator

from vit22b_transfer import UserError
from vit22b_transfer.data.records import MissingFilesError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A quoted field (with what white space follows it) or a plain one, and its end.
_FIELD = re.compile(
    r"""(?:"(?P<quoted>(?:[^"]++|"")*+)"[ \t]*+|(?P<plain>(?!")[^,\n]*+))"""
    r"""(?P<end>,|\r?\n|\Z)"""
)


def read_bytes(path: pathlib.Path) -> bytes:
    """The content of a file without a byte order mark, which Windows may write.

    Raises:
      UserError: if it is no file (a MissingFilesError), cannot be read, or holds
        nothing but white space.
    """
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise MissingFilesError(f"{path} {kind}; an annotation file is expected there.")
    try:
        content = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not content.strip():
        raise UserError(f"{path} is empty; an annotation file is expected there.")
    return content


def read_text(path: pathlib.Path) -> str:
    """The text of a file as it stands there; UserError as `read_bytes`, or no UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from error


def lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of all lines that are not blank.

    Raises:
      UserError: as `read_text`, or if the lines end with \\r alone.
    """
    text = _with_line_ends(read_text(path), path)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def csv_rows(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of all rows of a CSV file that are not blank.

    Fields may be quoted and then span lines, which end with \\n in them.

    Raises:
      UserError: as `lines`; or naming the line of a quote that is not closed where its
        field ends, so that it takes in the fields and rows behind it.
    """
    text = _with_line_ends(read_text(path), path)
    row, place, number, first = [], 0, 1, 1
    while place < len(text):
        field = _FIELD.match(text, place)
        if field is None:
            raise UserError(
                f"{path}, line {number}: the quote that opens a field here is not "
                'closed at the end of the field. Close it, or write "" for a quote '
                "that belongs to the text of a quoted field."
            )
        if field["quoted"] is None:
            value = field["plain"]
            row.append(value if field["end"] == "," else value.removesuffix("\r"))
        else:
            row.append(field["quoted"].replace('""', '"').replace("\r\n", "\n"))
        number += text.count("\n", *field.span())
        place = field.end()
        if field["end"] == ",":
            if place < len(text):
                continue
            row.append("")
        if len(row) > 1 or row[0].strip():
            yield first, row
        row, first = [], number


def _with_line_ends(text, path):
    if "\n" not in text and "\r" in text.strip():
        raise UserError(
            f"{path}: its lines end with \\r alone, as on old Macs; write it anew with "
            "\\n or \\r\\n."
        )
    return text
