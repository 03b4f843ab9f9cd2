"""JSON from outside: whatever it holds, the error names the file and the place."""

import json
import os
from typing import Any

from vit22b_transfer import UserError

PathLike = str | os.PathLike


def parse(
    text: str | bytes, path: PathLike, *, line: int | None = None, advice: str = ""
) -> Any:
    """The value of a JSON text out of a file; bytes are UTF-8.

    line: where in the file a text of one line stands, from 1.
    advice: a sentence for the end of the message, such as what to do about the file.

    Raises:
      UserError: if it is malformed, nested too deeply or holds an endless number.
    """
    where, advice = os.fspath(path), advice and f" {advice}"
    if line is not None:
        where = f"{where}, line {line}"
    try:
        if isinstance(text, bytes):
            text = text.decode()
        return json.loads(text)
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


def read(path: PathLike, *, advice: str = "") -> Any:
    """The value in a JSON file.

    Raises:
      UserError: if it cannot be opened, or as `parse`.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        after = advice and f" {advice}"
        raise UserError(
            f"{os.fspath(path)} cannot be read: {error.strerror}.{after}"
        ) from error
    # Files written on Windows may start with a byte order mark.
    return parse(content.removeprefix(b"\xef\xbb\xbf"), path, advice=advice)


def read_object(path: PathLike, *, advice: str = "") -> dict[str, Any]:
    """The JSON object in a file; any other value is a UserError too."""
    value = read(path, advice=advice)
    if not isinstance(value, dict):
        after = advice and f" {advice}"
        raise UserError(
            f"{os.fspath(path)} holds no JSON object but {_brief(value)}.{after}"
        )
    return value


def _brief(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
