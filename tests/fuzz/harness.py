"""Readers of files under damage: what they raise, their time and their memory.

A file `readers_<what>.py` beside this one has a function `readers() -> list[Reader]`;
it is found by its name. To add a reader, add a `Reader` there: `make_files(folder)`
writes a small valid example of all the files into an empty folder, `read(folder)` reads
them as the package would. Reading what is valid must raise nothing.

Cases run in a child process, which has a limit of memory, one case after the other: so
a case costs no more than its reading. A case that ends the process or takes too long is
reported, and the next goes on in a new process. Each is decided by (seed, reader,
number) alone and can be run again by these.
"""

import collections
import dataclasses
import fnmatch
import importlib
import json
import os
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
TESTS = HERE.parent
SECONDS = 10.0  # of processor time
PATIENCE = 120.0  # of wall time, after which a case is stopped
# A case may take this much more than the process that runs it; the files are tiny.
MORE_BYTES = 1 << 30
# Where an allocation fails rather than the machine.
_LIMIT_BYTES = 2 * MORE_BYTES
# Until the peak is this far above what is in use, it is not measured anew.
_PEAK_BYTES = 32 << 20
_START_SECONDS = 300.0
# Kinds of outcomes that are none of ours.
FAULTS = ("raw", "unnamed", "memory", "slow", "died")


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader and files for it.

    name: of the command line and the table.
    make_files: writes valid files into an empty folder.
    read: reads them; only `vit22b_transfer.UserError`, whose message holds the path of
      the folder, the name of a file in it or one of `names`, may be raised.
    share: how many cases it gets, relative to the others; below one if it is slow.
    names: what else a message may say of where the fault is.
    damage: pattern of the files that are damaged, by their path in the folder.
    """

    name: str
    make_files: Callable[[str], Any]
    read: Callable[[str], Any]
    share: float = 1.0
    names: Sequence[str] = ()
    damage: str = "*"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case.

    kind: `read` (the damage was none), `refused`, or a fault: `raw` (any exception but
      a UserError), `unnamed` (the error names no file), `memory`, `slow`, `died`.
    """

    reader: str
    number: int
    kind: str
    text: str = ""
    seconds: float = 0.0
    nbytes: int = 0


# --- In the child process ---


def modules() -> list[str]:
    """The files of readers."""
    return sorted(path.stem for path in HERE.glob("readers_*.py"))


def readers(module: str) -> list[Reader]:
    """The readers of one file."""
    for folder in (HERE, TESTS):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(module).readers()


class Case:
    """A reader's folder, which a case damages and then has again as it was."""

    def __init__(self, reader: Reader, folder: str):
        self.reader, self.folder = reader, folder
        os.makedirs(folder)
        reader.make_files(folder)
        self.files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
        self.listed = set(os.listdir(folder))
        reader.read(folder)  # what is valid is read; also, late imports are made
        self._tidy()

    def changes(self, seed: int, number: int) -> dict[str, bytes | None]:
        """The files that a case changes, None for one that it removes."""
        import mutations

        rng = Random(f"{seed}/{self.reader.name}/{number}")
        chosen = fnmatch.filter(self.files, self.reader.damage)
        return mutations.mutated_files({n: self.files[n] for n in chosen}, rng)

    def run(self, seed: int, number: int) -> Outcome:
        """Damages, reads and repairs the folder."""
        changes = self.changes(seed, number)
        for name, content in changes.items():
            path = os.path.join(self.folder, name)
            if content is None:
                os.remove(path)
            else:
                Path(path).write_bytes(content)
        used, start = _memory("VmRSS"), time.process_time()
        kind, text = self._read(changes)
        seconds = time.process_time() - start
        nbytes = max(0, _memory("VmHWM") - used)
        if nbytes > _PEAK_BYTES:
            _forget_peak()
        for name in changes:
            Path(self.folder, name).write_bytes(self.files[name])
        self._tidy()
        if nbytes > MORE_BYTES:
            kind, text = "memory", f"{nbytes >> 20} MiB; {kind}: {text}"
        elif seconds > SECONDS:
            kind, text = "slow", f"{seconds:.1f} s; {kind}: {text}"
        name = self.reader.name
        return Outcome(name, number, kind, text, round(seconds, 4), nbytes)

    def _tidy(self) -> None:
        """Removes what a reading left in the folder."""
        for name in set(os.listdir(self.folder)) - self.listed:
            path = os.path.join(self.folder, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)

    def _read(self, changes) -> tuple[str, str]:
        from vit22b_transfer import UserError

        try:
            self.reader.read(self.folder)
        except UserError as error:
            message = str(error)
            known = [self.folder, *changes, *self.reader.names]
            known += [os.path.basename(name) for name in self.files]
            named = any(name in message for name in known)
            return ("refused" if named else "unnamed"), message[:600]
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in where if "vit22b_transfer" in frame.filename]
            at = [
                f"{Path(f.filename).name}:{f.lineno}" for f in (*ours[-2:], where[-1])
            ]
            return "raw", f"{type(error).__name__} at {', '.join(at)}: {error}"[:600]
        return "read", ""


def _memory(name: str) -> int:
    """Bytes of this process that Linux says in /proc; 0 elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _forget_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def child(plan: Sequence[tuple[str, str, int, int]], seed: int, report: int) -> None:
    """Runs cases; a line of JSON for each into the file descriptor `report`.

    plan: (module, reader, first case, how many).
    """
    with os.fdopen(report, "w", encoding="utf-8", buffering=1) as lines:
        with tempfile.TemporaryDirectory(prefix="fuzz_") as root:
            for module, name, first, count in plan:
                found = {reader.name: reader for reader in readers(module)}
                case = Case(found[name], os.path.join(root, name))
                _forget_peak()
                limit = _memory("VmData") + _LIMIT_BYTES
                if limit > _LIMIT_BYTES:
                    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
                    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
                for number in range(first, first + count):
                    lines.write(json.dumps([name, number]) + "\n")
                    outcome = case.run(seed, number)
                    lines.write(json.dumps(dataclasses.astuple(outcome)) + "\n")


# --- In the parent ---


def run(
    plan: Sequence[tuple[str, str, int, int]], seed: int, seconds: float = PATIENCE
) -> Iterator[Outcome]:
    """The outcome of every case of a plan (see `child`), in its order."""
    left = [list(part) for part in plan]

    def count_one():
        left[0][2] += 1
        left[0][3] -= 1
        if not left[0][3]:
            left.pop(0)

    while left:
        process = _Child(left, seed, seconds)
        for outcome in process:
            yield outcome
            count_one()
        if not left:
            return
        if process.started is None:
            raise RuntimeError(f"no case of {left[0]} was begun:\n{process.said}")
        kind, text = "died", f"exit code {process.code}: {process.said[-500:]}"
        if process.code is None:
            kind, text = "slow", f"over {seconds:.0f} s"
        yield Outcome(left[0][1], left[0][2], kind, text, seconds * (kind == "slow"))
        count_one()


class _Child:
    """One child process: the outcomes that it reports until it ends.

    started: the case that was begun and has no outcome. code: the exit code, None if it
    was stopped. said: what it wrote to its standard error.
    """

    def __init__(self, plan, seed: int, seconds: float):
        self.plan, self.seed, self.seconds = plan, seed, seconds
        self.started, self.code, self.said = None, None, ""

    def __iter__(self) -> Iterator[Outcome]:
        reading, writing = os.pipe()
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "run.py"), "--child"]
                + [json.dumps([self.plan, self.seed, writing])],
                pass_fds=[writing],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
            )
            os.close(writing)
            try:
                yield from self._outcomes(reading)
                self.code = process.wait(5)
            except (TimeoutError, subprocess.TimeoutExpired):
                self.code = None
            finally:
                process.kill()
                process.wait()
                os.close(reading)
            errors.seek(0)
            self.said = errors.read().decode("utf-8", "replace")

    def _outcomes(self, reading: int) -> Iterator[Outcome]:
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            rest = b""
            while True:
                limit = _START_SECONDS if self.started is None else self.seconds
                if not selector.select(limit):
                    raise TimeoutError
                data = os.read(reading, 1 << 20)
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    content = json.loads(line)
                    if len(content) == 2:
                        self.started = content
                        continue
                    self.started = None
                    yield Outcome(*content)


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a line for each reader, and one for all."""
    by_reader: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_reader.setdefault(outcome.reader, []).append(outcome)
    if len(by_reader) > 1:
        by_reader["all"] = list(outcomes)
    rows = [
        "| reader | cases | read | refused | raw | unnamed | slowest s | most MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, part in by_reader.items():
        kinds = collections.Counter(outcome.kind for outcome in part)
        raw = sum(kinds[kind] for kind in FAULTS) - kinds["unnamed"]
        slowest = max(outcome.seconds for outcome in part)
        most = max(outcome.nbytes for outcome in part) / 2**20
        rows.append(
            f"| {name} | {len(part)} | {kinds['read']} | {kinds['refused']} | {raw} | "
            f"{kinds['unnamed']} | {slowest:.2f} | {most:.0f} |"
        )
    return "\n".join(rows)
