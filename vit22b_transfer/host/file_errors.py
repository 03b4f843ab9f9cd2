"""What other people's parsers raise, as errors that name the file and the place."""

import contextlib
import reprlib
from collections.abc import Iterator
from typing import Any

from vit22b_transfer import UserError

# Characters of a value from outside that a message shows.
_SHOWN = 200
# Characters of what a parser says: it may name the file by a long path.
_TOLD = 600
# Of lists and objects, their beginning.
_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlist, _REPR.maxdict = 100, 100, 8, 8


def brief(value: Any, length: int = _SHOWN) -> str:
    """A value from outside as a message shows it: one line, not long.

    A text is shown as it is, without quotes.
    """
    text = value if isinstance(value, str) else _REPR.repr(value)
    if not text.isprintable():
        text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= length else f"{text[: length - 3]}..."


def quoted(value: Any) -> str:
    """`brief`, with quotes around a text."""
    return brief(repr(value[:_SHOWN])) if isinstance(value, str) else brief(value)


@contextlib.contextmanager
def damaged(
    where: str,
    advice: str,
    kinds: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Iterator[None]:
    """Turns what a parser raises into a UserError: "WHERE: what was wrong. ADVICE".

    To be put around the parser's call alone: whatever is raised in there is taken for
    damage of the file.

    where: the file, and the place in it.
    kinds: what is turned; others are left as they are, such as what a device raises
      while arrays are read onto it.

    Raises:
      UserError: for any of `kinds`. Those that are UserErrors already are left as they
        are, and so is want of memory.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except kinds as error:
        raise UserError(f"{where} cannot be read: {told(error)}. {advice}") from error


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts `where` before the message of a UserError that does not hold it."""
    try:
        yield
    except UserError as error:
        if where in str(error):
            raise
        raise UserError(f"{where}: {error}") from error


def told(error: BaseException) -> str:
    """An exception's own words in a line, without tensorstore's specification."""
    if isinstance(error, KeyError):
        return f"{brief(str(error))} is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = str(error)
    for mark in (" [tensorstore_spec=", " [source locations=", "\n"):
        text = text.split(mark)[0]
    return brief(text.rstrip("."), _TOLD) or type(error).__name__
