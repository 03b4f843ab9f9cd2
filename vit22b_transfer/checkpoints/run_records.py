"""What a checkpoint's record of its run says, by type.

The record is JSON beside the arrays; what of it is read later is looked at here, so
that nobody else needs to.
"""

import math
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files
from vit22b_transfer.host.file_errors import brief

# A record takes a few KB.
_BYTES = 16 << 20
_NUMBERS = (int, float)


def read(file: str, advice: str) -> dict[str, Any]:
    """The record in a file.

    advice: a sentence for the end of an error.

    Raises:
      UserError: if it is no JSON object, or a part of it is of another type.
    """
    record = json_files.read_object(file, advice=advice, limit=_BYTES)
    for name, said in record.items():
        if name in _RECORDED and not _RECORDED[name](said):
            raise UserError(f"{file} says {name} = {brief(said)}. {advice}")
    return record


def _is_lora(said: Any) -> bool:
    return said == {} or _has(said, alpha=_NUMBERS)


def _is_tower(said: Any) -> bool:
    return _has(said, checkpoint=(str,), digest=(str,))


def _are_vocabularies(said: Any) -> bool:
    kinds = {"class": (str,), "size": (int,), "sha256": (str,)}
    return isinstance(said, dict) and all(_has(x, **kinds) for x in said.values())


def _is_window(said: Any) -> bool:
    """Sums, and how many there are of each."""
    if not isinstance(said, dict):
        return False
    values = [x if isinstance(x, list) else [x] for x in said.values()]
    return all(type(number) in _NUMBERS for value in values for number in value)


def _are_measured(said: Any) -> bool:
    """Values of metrics."""
    return isinstance(said, dict) and all(
        type(value) in _NUMBERS and math.isfinite(value) for value in said.values()
    )


def _are_names(said: Any) -> bool:
    """What is still to be measured; before there were several, only whether."""
    return said is True or (
        isinstance(said, list) and all(isinstance(name, str) for name in said)
    )


def _are_settings(said: Any) -> bool:
    kinds = (str, bool, type(None), *_NUMBERS)
    return isinstance(said, dict) and all(type(x) in kinds for x in said.values())


def _has(said: Any, **kinds: tuple[type, ...]) -> bool:
    """Whether a part of a record has values of these types."""
    return isinstance(said, dict) and all(
        type(said.get(name)) in kinds[name] for name in kinds
    )


_RECORDED = {
    "evaluation_unfinished": _are_names,
    "lora": _is_lora,
    "measured": _are_measured,
    "settings": _are_settings,
    "tower": _is_tower,
    "vocabularies": _are_vocabularies,
    "window": _is_window,
}
