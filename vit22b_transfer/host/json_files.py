"""JSON from outside: whatever it holds, the error names the file and the place."""

import collections
import json
import os
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import brief

PathLike = str | os.PathLike


def parse(
    text: str | bytes,
    path: PathLike,
    *,
    line: int | None = None,
    advice: str = "",
    unique_names: bool = False,
) -> Any:
    """The value of a JSON text out of a file; bytes are UTF-8.

    line: where in the file a text of one line stands, from 1.
    advice: a sentence for the end of the message, such as what to do about the file.
    unique_names: an object that has a name twice is malformed too; otherwise the last
      one counts.

    Raises:
      UserError: if it is malformed, nested too deeply or holds an endless number.
    """
    where, advice = os.fspath(path), advice and f" {advice}"
    if line is not None:
        where = f"{where}, line {line}"
    try:
        if isinstance(text, bytes):
            text = text.decode()
        return json.loads(text, object_pairs_hook=_unique if unique_names else None)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if line is None:
            place = f"line {error.lineno}, {place}"
        raise UserError(
            f"{where}, {place}: malformed JSON: {error.msg}.{advice}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start}).{advice}"
        ) from error
    except RecursionError as error:
        raise UserError(
            f"{where}: malformed JSON: lists or objects are nested too deeply.{advice}"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{where}: malformed JSON: {error}.{advice}") from error


def read(path: PathLike, *, advice: str = "", limit: int | None = None) -> Any:
    """The value in a JSON file.

    limit: of the file's size in bytes; its value takes up to 25 times that in memory.

    Raises:
      UserError: if it cannot be opened or is larger than `limit`, or as `parse`.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(-1 if limit is None else limit + 1)
    except OSError as error:
        after = advice and f" {advice}"
        raise UserError(
            f"{os.fspath(path)} cannot be read: {error.strerror}.{after}"
        ) from error
    if limit is not None and len(content) > limit:
        after = advice and f" {advice}"
        raise UserError(
            f"{os.fspath(path)} has more than {limit} bytes, too many for what it is "
            f"by its name.{after}"
        )
    # Files written on Windows may start with a byte order mark.
    return parse(content.removeprefix(b"\xef\xbb\xbf"), path, advice=advice)


def read_object(
    path: PathLike, *, advice: str = "", limit: int | None = None
) -> dict[str, Any]:
    """The JSON object in a file; any other value is a UserError too. As `read`."""
    value = read(path, advice=advice, limit=limit)
    if not isinstance(value, dict):
        after = advice and f" {advice}"
        raise UserError(
            f"{os.fspath(path)} holds no JSON object but {brief(value)}.{after}"
        )
    return value


def _unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = max(counts, key=lambda name: counts[name])
        raise ValueError(f"{twice[:200]} is there twice")
    return found
