"""Commands as a user's shell would run them, but in this process.

bash itself reads the lines, with a `vit22b` that only writes down how it was called;
then each call is made here. A child process for each would spend ten seconds on its
imports.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import seqio

from vit22b_transfer import cli

ROOT = str(Path(__file__).parent.parent)

# A call is a folder: its arguments, its environment, its directory. What the lines that
# follow need is done at once: a folder to go to, a path to put in a variable.
_RECORDER = """#!/bin/sh
if [ "$1" = init ] || [ "$1 $2" = "config path" ]; then
  PYTHONPATH="$ROOT" exec "$PYTHON" -m vit22b_transfer.cli "$@"
fi
call="$CALLS/$(ls "$CALLS" | wc -l)"
mkdir "$call"
printf '%s\\0' "$@" > "$call/arguments"
env -0 > "$call/environment"
pwd > "$call/directory"
"""


def recorded_calls(commands: str, folder: Path, **variables: str) -> list:
    """Directory, environment, arguments of each `vit22b` that is not done at once."""
    recorded = []
    with tempfile.TemporaryDirectory() as binaries, tempfile.TemporaryDirectory() as at:
        command = Path(binaries, "vit22b")
        command.write_text(_RECORDER)
        command.chmod(0o755)
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "CALLS": at, "ROOT": ROOT, "PYTHON": sys.executable}
        bash = ["bash", "-euo", "pipefail", "-c", commands]
        subprocess.run(bash, cwd=folder, env=os.environ | variables | own, check=True)
        for call in sorted(Path(at).iterdir(), key=lambda call: int(call.name)):
            directory = (call / "directory").read_text().removesuffix("\n")
            entries = (call / "environment").read_text().split("\0")[:-1]
            arguments = (call / "arguments").read_text().split("\0")[:-1]
            environment = dict(entry.split("=", 1) for entry in entries)
            recorded.append((directory, environment, arguments))
    assert recorded, f"no vit22b in: {commands}"
    return recorded


_ONE_DEVICE = """
from __gin__ import dynamic_registration
from vit22b_transfer.partitioning import rules
rules.Partitioning:
  data = 1
  model = 1
"""


def use_one_device(folder: Path) -> None:
    """Recipes that are run in the folder use one of this process's eight devices."""
    mesh = folder / "gin_configs" / "meshes" / "data_parallel.gin"
    mesh.parent.mkdir(parents=True)
    mesh.write_text(_ONE_DEVICE)


def run_in_process(
    commands: str,
    folder: Path,
    *,
    edit: Callable[[], object] = lambda: None,
    **variables: str,
) -> None:
    """Runs the lines in the folder; every `vit22b` of theirs must succeed.

    Tasks that it registers are forgotten, so that others can have their names. `edit`
    is called behind what is done at once, such as `vit22b init`.
    """
    calls = recorded_calls(commands, folder, **variables)
    edit()
    with no_tasks():
        for directory, environment, arguments in calls:
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(directory)
            code = cli.main(arguments)
            assert code == 0, f"exit code {code}: vit22b {' '.join(arguments)}"


@contextlib.contextmanager
def no_tasks() -> Iterator[None]:
    """Context that starts without any task registered; after it all is as it was."""
    directory, environment = os.getcwd(), dict(os.environ)
    path, finders = list(sys.path), list(sys.meta_path)
    modules = _pop_task_modules()
    registries = (seqio.TaskRegistry, seqio.MixtureRegistry)
    registered = [_pop_providers(registry) for registry in registries]
    try:
        yield
    finally:
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:], sys.meta_path[:] = path, finders
        _pop_task_modules()
        sys.modules.update(modules)
        for registry, providers in zip(registries, registered, strict=True):
            _pop_providers(registry)
            for name, provider in providers.items():
                registry.add_provider(name, provider)


def _pop_task_modules() -> dict:
    names = [name for name in sys.modules if name.partition(".")[0] == "tasks"]
    return {name: sys.modules.pop(name) for name in names}


def _pop_providers(registry) -> dict:
    providers = {name: registry.get(name) for name in registry.names()}
    for name in providers:
        registry.remove(name)
    return providers
