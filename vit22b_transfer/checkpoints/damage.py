"""Checkpoints that cannot be read: one error for whatever their readers raise."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import tensorstore

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files

_MAX_LENGTH = 500


class UnreadableCheckpointError(UserError):
    """A checkpoint whose files are damaged, cut off, or not there any more."""


@contextlib.contextmanager
def said(path: str) -> Iterator[None]:
    """Turns what reading raises into an error that names the checkpoint and the place.

    Raises:
      UnreadableCheckpointError: in place of any other exception, but for those of a
        lack of memory and `UserError`s, which say themselves what is wrong.
    """
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise UnreadableCheckpointError(
            f"checkpoint {path} cannot be read; it is damaged or not whole: "
            f"{_reason(error)}"
        ) from error


def check_index(path: str) -> None:
    """Reads which arrays there are, of a checkpoint with Orbax's index.

    Done before Orbax reads arrays: the file that is damaged is then the one named.
    """
    folder = os.path.join(path, "state")
    if os.path.isfile(os.path.join(folder, "manifest.ocdbt")):
        with said(path):
            spec = {"driver": "ocdbt", "base": f"file://{folder}/"}
            tensorstore.KvStore.open(spec).result().list().result()


def read_record(file: str, path: str) -> dict[str, Any]:
    """The JSON record of a run in the checkpoint `path`; empty without a file.

    Raises:
      UnreadableCheckpointError: naming the file, if it is not what runs write.
    """
    if not os.path.isfile(file):
        return {}
    advice = (
        "Restore it, or remove that file: the arrays are then read for themselves, and "
        "what the checkpoint was trained with is not compared."
    )
    try:
        record = json_files.read_object(file, advice=advice)
    except UserError as error:
        raise UnreadableCheckpointError(f"checkpoint {path}: {error}") from error
    if strange := _strange_field(record):
        raise UnreadableCheckpointError(
            f"checkpoint {path}: in {file} the field {strange} is not what a run "
            f"writes. {advice}"
        )
    return record


def _strange_field(record: Mapping[str, Any]) -> str:
    for name in ("window", "vocabularies", "lora", "tower"):
        if not isinstance(record.get(name, {}), dict):
            return name
    for name, vocabulary in record.get("vocabularies", {}).items():
        fields = {"class": str, "size": int, "sha256": str}
        if not _has(vocabulary, fields):
            return f"vocabularies.{name}"
    if record.get("lora") and not _has(record["lora"], {"alpha": int | float}):
        return "lora"
    if "tower" in record and not _has(
        record["tower"], {"checkpoint": str, "digest": str}
    ):
        return "tower"
    return ""


def _has(value: Any, fields: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), kind) for name, kind in fields.items()
    )


def _reason(error: BaseException) -> str:
    """What the innermost error says, in a line, without the reader's own settings."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    if not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}"
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."
