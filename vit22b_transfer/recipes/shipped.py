"""The recipes and tasks that come with the package, found behind the user's own."""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterable
from types import ModuleType

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TASKS = "tasks"


def folder() -> str:
    """The folder that holds the shipped `gin_configs` and `tasks`.

    It is inside an installed package; in a clone, the repository itself.
    """
    installed = os.path.join(_PACKAGE, "shipped")
    return installed if os.path.isdir(installed) else os.path.dirname(_PACKAGE)


def search_paths() -> tuple[str, str]:
    """Where gin files are looked for: the current directory, then what is shipped."""
    return ("", folder())


class TasksFinder:
    """Finds the package `tasks` in all folders of that name, the shipped one last.

    `import tasks.coco` is the user's `tasks/coco.py` if there is one, else the shipped,
    whether or not their folder has an `__init__.py`. An entry at the end of `sys.path`
    would not do: a folder without `__init__.py` would be hidden by the shipped one, a
    folder with it would hide the shipped one, and so would any installed `tasks`.
    """

    @classmethod
    def find_spec(
        cls,
        name: str,
        path: Iterable[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """The specification of `tasks`, None for any other module."""
        if name != TASKS:
            return None
        parents = [*(entry or os.getcwd() for entry in sys.path), folder()]
        found = [os.path.join(parent, TASKS) for parent in dict.fromkeys(parents)]
        found = [candidate for candidate in found if os.path.isdir(candidate)]
        first = os.path.join(found[0], "__init__.py")
        if os.path.isfile(first):
            return importlib.util.spec_from_file_location(
                name, first, submodule_search_locations=found
            )
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = found
        return spec


def offer_tasks() -> None:
    """Lets Python find the shipped tasks behind the user's own."""
    if TasksFinder not in sys.meta_path:
        sys.meta_path.insert(0, TasksFinder)
