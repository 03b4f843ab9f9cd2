"""What the body of a request says: an image, a question, whether attention is wanted.

Multipart forms, as `curl -F image=@cat.jpg` and the page send them, and JSON with the
image in base64. Nothing of a body is ever taken for a path or an address; of a file's
name not even that it is there.
"""

import base64
import binascii
import dataclasses
import difflib
import io
from collections.abc import Iterable
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files
from vit22b_transfer.host.file_errors import brief

# Of a question in bytes; how many parts a form has; how much of it is looked at at a
# time, which has to be less than the first.
_MOST_TEXT, _MOST_PARTS, _PIECE = 1 << 16, 8, 1 << 14
_FIELDS = {"image", "question", "attention"}


class Refused(Exception):
    """A request that gets an error: its status, and one sentence of what to do."""

    def __init__(self, status: int, sentence: str, *, retry_after: int | None = None):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Form:
    """A request. question: None where none is asked."""

    image: bytes
    question: str | None
    attention: bool


def read(content_type: str, body: bytes, *, asked: bool) -> Form:
    """The request in a body.

    asked: whether there must be a question; else there must be none.

    Raises:
      Refused: 415 for a body of another type, 400 for one that is malformed, lacks
        something or has something unknown.
    """
    from werkzeug.http import parse_options_header

    kind, options = parse_options_header(content_type)
    if kind == "application/json":
        given = _of_json(body)
    elif kind == "multipart/form-data" and options.get("boundary"):
        given = _of_multipart(body, options["boundary"])
    else:
        raise Refused(
            415,
            f"the body is {brief(kind) or 'of no type'}; send multipart/form-data, as "
            "curl -F image=@FILE does, or application/json with the image in base64.",
        )
    fields = _FIELDS if asked else _FIELDS - {"question"}
    _check_names(given, fields, "of answers" if asked else "of captions")
    for name in sorted({"image", "question"} & fields):
        if name not in given:
            raise Refused(400, f"there is no {name}; send one in the field {name!r}.")
    attention = given.get("attention", False)
    if not isinstance(attention, bool):
        raise Refused(400, "attention is true or false.")
    return Form(given["image"], given.get("question"), attention)


def _check_names(given: Iterable[str], fields: set[str], what: str) -> None:
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name[:100], fields, n=1, cutoff=0.0)
            raise Refused(
                400,
                f"there is no field {brief(name)} {what}; did you mean {near[0]}? "
                f"Fields are {', '.join(sorted(fields))}.",
            )


def _of_json(body: bytes) -> dict[str, Any]:
    try:
        given = json_files.parse(body, "the body", unique_names=True)
    except UserError as error:
        raise Refused(400, str(error)) from error
    if not isinstance(given, dict):
        raise Refused(400, "the body is JSON, but no object; send fields by name.")
    for name in given.keys() & {"image", "question"}:
        if not isinstance(given[name], str):
            raise Refused(400, f"the field {name!r} is to be a text.")
    if "image" in given:
        try:
            given["image"] = base64.b64decode(given["image"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refused(400, f"the image is no base64: {error}.") from error
    return given


def _of_multipart(body: bytes, boundary: str) -> dict[str, Any]:
    from werkzeug.exceptions import HTTPException
    from werkzeug.formparser import MultiPartParser

    parser = MultiPartParser(
        # Never a file on the disk: the body is in memory, and bounded.
        stream_factory=lambda *of, **named: io.BytesIO(),
        max_form_memory_size=_MOST_TEXT,
        max_form_parts=_MOST_PARTS,
        buffer_size=_PIECE,
    )
    try:
        texts, files = parser.parse(io.BytesIO(body), boundary.encode(), len(body))
    except (HTTPException, ValueError) as error:
        raise Refused(
            400,
            f"the form is malformed, has more than {_MOST_PARTS} parts, or a text of "
            f"more than {_MOST_TEXT} bytes.",
        ) from error
    given: dict[str, Any] = {}
    for name, value in [*texts.items(multi=True), *files.items(multi=True)]:
        name = name or ""
        if name in given:
            raise Refused(400, f"the field {brief(name)} is there twice.")
        given[name] = value
    if "image" in given and isinstance(given["image"], str):
        raise Refused(400, "the field 'image' is to be a file: -F image=@FILE.")
    for name in given.keys() & {"question", "attention"}:
        if not isinstance(given[name], str):
            raise Refused(400, f"the field {name!r} is to be a text, not a file.")
    if "image" in given:
        given["image"] = given["image"].read()
    if "attention" in given:
        said = {"true": True, "false": False}
        given["attention"] = said.get(given["attention"], given["attention"])
    return given
