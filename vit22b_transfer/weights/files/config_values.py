"""JSON files beside weights, and what they say by type: a whole number, a flag, a part.

Of each value the message says what it is called, what was found and what is expected.
The file is named by who opens it (`file_errors.naming`).
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files
from vit22b_transfer.host.file_errors import brief, quoted
from vit22b_transfer.weights.files.stored_tensors import GET_AGAIN

Config = Mapping[str, Any]

# A published config takes a few KB, with the labels of 21,000 classes 1 MB; the index
# of the largest published model, 92,000 tensors in 163 shards, takes 9 MB.
_JSON_BYTES = 16 << 20
# No published config nests deeper than 8.
_DEPTH = 64
# Ten times the widest MLP and the largest vocabulary there are.
MOST = 2**22
# Ten times the deepest published transformer.
MOST_LAYERS = 1_000
_LARGEST = 1e30
_MISSING = object()


# --- Files ---


def read_json(directory: str, name: str) -> dict[str, Any]:
    """A JSON file of a source's directory; empty if there is none.

    Raises:
      UserError: if it is not a JSON object, has more than 16 MiB, is nested too deeply,
        or holds text that UTF-8 cannot.
    """
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
        return {}
    value = json_files.read_object(path, advice=GET_AGAIN, limit=_JSON_BYTES)
    check_text(value, path)
    return value


def check_text(value: Any, path: str) -> None:
    """Raises UserError for nesting and text that no file beside weights has.

    Half of a surrogate pair can be neither printed nor the name of a file.
    """
    level = [value]
    for _ in range(_DEPTH):
        below: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                _check_halves(part, path)
                below.extend(part.values())
            elif isinstance(part, list):
                below.extend(part)
            elif isinstance(part, str):
                _check_halves((part,), path)
        if not below:
            return
        level = below
    raise UserError(f"{path} nests more than {_DEPTH} deep. {GET_AGAIN}")


def _check_halves(texts: Collection[str], path: str) -> None:
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{path} holds {brief(ascii(text))}, half of a character. "
                    + GET_AGAIN
                ) from error


# --- Values ---


def size(
    config: Config,
    name: str,
    default: Any = _MISSING,
    *,
    least: int = 1,
    most: int = MOST,
) -> int:
    """The whole number `config[name]`, from `least` to `most`.

    default: where it is missing or null; without one that is an error.
    """
    value = _found(config, name, default)
    if type(value) is not int or not least <= value <= most:
        raise _wrong(name, value, f"a whole number from {least} to {most}")
    return value


def number(
    config: Config, name: str, default: Any = _MISSING, *, least: float = -_LARGEST
) -> float:
    """The finite number `config[name]`, not below `least`."""
    value = _found(config, name, default)
    if type(value) not in (int, float) or not least <= value <= _LARGEST:
        lowest = "" if least == -_LARGEST else f" from {least}"
        raise _wrong(name, value, f"a finite number{lowest}")
    return float(value)


def flag(config: Config, name: str, default: Any = _MISSING) -> bool:
    """`config[name]`, which is true or false."""
    value = _found(config, name, default)
    if type(value) is not bool:
        raise _wrong(name, value, "true or false")
    return value


def text(config: Config, name: str, default: Any = _MISSING) -> str:
    """The text `config[name]`, of one line of at most 200 characters."""
    value = _found(config, name, default)
    if type(value) is not str or len(value) > 200 or not value.isprintable():
        raise _wrong(name, value, "a text of one line")
    return value


def part(config: Config, name: str) -> Config:
    """The object `config[name]`; empty if it is missing or null."""
    value = _found(config, name, {})
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "an object")
    return value


def pair(config: Config, name: str, default: Any = _MISSING) -> tuple[int, int]:
    """(height, width) of `config[name]`, a whole number for both or a list of two."""
    value = _found(config, name, default)
    both: Any = (value, value)
    if isinstance(value, list | tuple) and len(value) == 2:
        both = value
    if not all(type(side) is int and 1 <= side <= MOST for side in both):
        kind = f"whole number from 1 to {MOST}"
        raise _wrong(name, value, f"a {kind}, or a list of two of them")
    return both[0], both[1]


def numbers(
    config: Config, name: str, default: Sequence[float], *, least: float = -_LARGEST
) -> tuple[float, ...]:
    """The finite numbers of the list `config[name]`, as many as in `default`."""
    value = _found(config, name, default)
    count = len(default)
    if (
        not isinstance(value, list | tuple)
        or len(value) != count
        or not all(type(x) in (int, float) and least <= x <= _LARGEST for x in value)
    ):
        lowest = "" if least == -_LARGEST else f" from {least}"
        raise _wrong(name, value, f"a list of {count} finite numbers{lowest}")
    return tuple(map(float, value))


def texts(config: Config, name: str, count: int) -> tuple[str, ...]:
    """The texts of the list `config[name]`, `count` of them."""
    value = _found(config, name, _MISSING)
    if (
        not isinstance(value, list)
        or len(value) != count
        or not all(isinstance(x, str) for x in value)
    ):
        raise _wrong(name, value, f"a list of {count} texts")
    return tuple(value)


def like(config: Config, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values that `defaults` names, each of the type that it has there.

    A pair may be one number, and a whole number is none of a flag's.
    """
    return {name: _like(config, name, default) for name, default in defaults.items()}


def _like(config: Config, name: str, default: Any) -> Any:
    if name in ("image_size", "patch_size"):
        return pair(config, name, default)
    if isinstance(default, bool):
        return flag(config, name, default)
    if isinstance(default, int):
        most = MOST_LAYERS if name.endswith("layers") else MOST
        least = 0 if name == "num_register_tokens" else 1
        return size(config, name, default, least=least, most=most)
    if isinstance(default, float):
        return number(config, name, default, least=0.0)
    assert isinstance(default, str), name
    return text(config, name, default)


def _found(config: Config, name: str, default: Any) -> Any:
    value = config.get(name)
    if value is not None:
        return value
    if default is _MISSING:
        raise UserError(f"the config lacks {name}. Fetch it again.")
    return default


def _wrong(name: str, value: Any, expected: str) -> UserError:
    kind = {dict: "an object", list: "a list", str: "a text", bool: "a flag"}.get(
        type(value), "a number"
    )
    if isinstance(value, float) and not math.isfinite(value):
        kind = "not finite"
    return UserError(
        f"the config says {name} = {quoted(value)}, which is {kind}; expected "
        f"is {expected}. Fetch the files again, all of one model."
    )
