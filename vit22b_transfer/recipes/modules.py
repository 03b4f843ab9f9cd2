"""Modules of the user's, such as tasks: imported, or in a line what is wrong."""

import importlib
import os
import sys
import traceback
from types import ModuleType

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import brief

# Characters of what a module raises that are shown.
_SHOWN = 600


class ModuleError(UserError):
    """A module that cannot be imported."""


def imported(name: str) -> ModuleType:
    """The module called `name`.

    Raises:
      ModuleError: if there is none, or it raises anything, even the end of the process;
        with the line where. A UserError of its own is left as it is.
    """
    try:
        return importlib.import_module(name)
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:
        missing = getattr(error, "name", None)
        parents = {
            ".".join(name.split(".")[: n + 1]) for n in range(name.count(".") + 1)
        }
        if isinstance(error, ModuleNotFoundError) and missing in parents:
            raise ModuleError(
                f"there is no module {brief(name)} in {os.getcwd()} or on Python's "
                "path. A file tasks/mine.py there is the module tasks.mine."
            ) from error
        what = brief(" ".join(f"{type(error).__name__}: {error}".split()), _SHOWN)
        raise ModuleError(
            f"module {brief(name)} cannot be imported: {what}{_place(error)}"
        ) from error


def _place(error: BaseException) -> str:
    """The line of a module at which an import ended; "" if none of one was run."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if frame.name == "<module>"]
    lines = [frame for frame in lines if frame.filename != sys.argv[0]]
    if isinstance(error, SyntaxError) or not lines:
        return ""  # its text says where
    return f" ({brief(lines[-1].filename)}, line {lines[-1].lineno})"
