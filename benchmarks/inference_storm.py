"""kill -9 at random moments over the inference of one split, resumed in other ways.

Claim: whatever is killed whenever, and resumed on 1 or 8 devices, by 1 or 2 processes
or as 3 shards: every example is there once and in order, and the bytes are those of an
uninterrupted run; without --deterministic, where the number of devices is the same.

A tiny model samples captions of drawn scenes. Half of the kills come at any moment of
a run, half after it has written something. Prints a row of a table for each storm, and
every session to the standard error.

    python benchmarks/inference_storm.py [--kills 200] [--examples 2000]
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time

import storm_processes
from storm_processes import child, do, flags

# How a file is made: devices of each process, processes of one job, shards.
KINDS = {
    "1 device": (1, 1, 1),
    "8 devices": (8, 1, 1),
    "2 processes of 4 devices": (4, 2, 1),
    "3 shards": (1, 1, 3),
}
# Kinds that take turns, whether --deterministic, and the share of all kills.
STORMS = {
    "--deterministic, all kinds": (list(KINDS), True, 0.5),
    "1 device": (["1 device", "3 shards"], False, 0.2),
    "8 devices": (["8 devices", "2 processes of 4 devices"], False, 0.2),
    "all kinds": (list(KINDS), False, 0.1),
}
# Seconds after which a process that does not end is a failure.
LIMIT = 300


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storm", choices=STORMS, help="only this one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="inference_storm_") as folder:
        work = pathlib.Path(folder)
        sizes = {"train": 16, "validation": 16, "test": options.examples}
        storm_processes.prepare(work, 1, sizes)
        do(work / "train.txt", lambda: _command(_train(work), 1))
        print("| storm | kills | after a first line | files | sessions | equal |")
        print("|---|---|---|---|---|---|")
        for name, (kinds, deterministic, share) in STORMS.items():
            if options.storm in (None, name):
                kills = round(options.kills * (1 if options.storm else share))
                storm = Storm(work, kinds, deterministic, options)
                print(f"| {name} | {storm.run(kills)} |", flush=True)


def _train(work):
    values = {"MODEL_DIR": str(work / "model"), "TRAIN_STEPS": 2}
    return ["train", *_recipe(work, values)]


def _recipe(work, values, *files):
    names = [work / "recipe.gin", "gin_configs/meshes/data_parallel.gin", *files]
    return [
        *(f"--gin_file={name}" for name in names),
        *(f"--gin.{name}={value!r}" for name, value in values.items()),
    ]


def _command(arguments, devices, **variables):
    """Runs a command in this process, with variables of its environment."""
    os.environ |= {"XLA_FLAGS": flags(devices)} | variables
    from vit22b_transfer import cli

    if code := cli.main(arguments):
        sys.exit(code)


@dataclasses.dataclass
class Process:
    """A child, the moment at which it is killed, and how it ended."""

    pid: int
    output: pathlib.Path
    kill_at: float | None = None
    ended: str = ""


class Storm:
    """Runs of one file after another until as many processes were killed as wanted."""

    def __init__(self, work, kinds, deterministic, options):
        self.work, self.kinds, self.deterministic = work, kinds, deterministic
        self.draw = random.Random(options.seed)
        self.num_examples = options.examples
        self.out = work / "out" / "predictions.jsonl"
        self.counts = collections.Counter()

    def run(self, wanted):
        """The row of the table; an AssertionError for what is lost or differs."""
        expected, seconds, equal = {}, {}, 0
        for kind in self.kinds:
            for _ in range(2):  # the second one compiles nothing any more
                self._clear()
                seconds[kind] = self._session(kind)
            expected[kind] = self._content()
        if self.deterministic:
            first, *others = expected.values()
            assert all(first[0] == other[0] for other in others), "kinds differ"
        order = itertools.cycle(self.kinds)
        while self.counts["killed"] < wanted:
            self._clear()
            used = set()
            while not self._is_complete():
                kind = next(order)
                used.add(kind)
                left = wanted - self.counts["killed"]
                self._session(kind, seconds[kind] if left > 0 else None, left)
                self.counts["sessions"] += 1
            if len(list(self.out.parent.iterdir())) > 2:
                # Killed between its last two steps: the next start removes the parts.
                self._session(self.draw.choice(self.kinds))
            content, lines = self._content()
            same = self.deterministic or _devices(self.kinds) == 1
            for known, reference in (expected[kind] for kind in sorted(used)):
                if same:
                    assert content == known, f"bytes differ after {used}"
                _check_close(lines, reference)
            self.counts["files"] += 1
            equal += same
        counts = self.counts
        told = f"{equal} to the bit" if equal else "but for rounding"
        return (
            f"{counts['killed']} | {counts['late']} | {counts['files']} | "
            f"{counts['sessions']} | {told}"
        )

    def _clear(self):
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()

    def _session(self, kind, seconds=None, left=0):
        """Starts all processes of a kind, waits for them: (whole, productive) seconds.

        seconds: those of an uninterrupted one, in the midst of which it is killed;
          None: it is not. left: how many processes may be killed.
        """
        devices, processes, shards = KINDS[kind]
        began, first_line = time.monotonic(), None
        started = time.time()
        size = self.draw.choice([8, 16]) if self.deterministic else 8
        address = f"127.0.0.1:{_free_port()}"
        children = [
            self._start(devices, number, processes, shards, size, address)
            for number in range(processes * shards)
        ]
        late = self.draw.random() < 0.5
        whole, productive = seconds or (0.0, 0.0)
        moments = [
            self.draw.uniform(0, productive / 2 if late else whole)
            for _ in range(shards)
        ]
        if seconds and not late:
            self._set_moments(children, moments, began, left)
        try:
            while any(not one.ended for one in children):
                now = time.monotonic()
                assert now - began < LIMIT, [one.output.read_text() for one in children]
                if first_line is None and self._has_lines_since(started):
                    first_line = now
                    if seconds and late:
                        self._set_moments(children, moments, now, left)
                for one in children:
                    self._look(one, now, late)
                time.sleep(0.002)
        finally:
            for one in children:
                if not one.ended:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(one.pid, signal.SIGKILL)
        killed = any(one.ended == "killed" for one in children)
        for one in children:
            # One process of a job ends by itself where the other was killed.
            fine = one.ended in ("killed", "well") or (killed and processes > 1)
            assert fine, one.output.read_text()
        end = time.monotonic()
        ends = ", ".join(one.ended for one in children)
        print(f"{kind}: {end - began:.1f} s, {ends}", file=sys.stderr, flush=True)
        return end - began, end - (first_line or end)

    def _set_moments(self, children, moments, start, left):
        """Of one job all processes are killed about at once, shards each at its own."""
        for number, one in enumerate(children[:left]):
            moment = moments[number % len(moments)]
            if len(moments) == 1:
                moment += self.draw.uniform(0, 0.2) * number
            one.kill_at = start + moment

    def _look(self, one, now, late):
        """Notes the end of a process, or kills it."""
        if one.ended:
            return
        found, status = os.waitpid(one.pid, os.WNOHANG)
        if found:
            one.ended = "well" if status == 0 else "badly"
        elif one.kill_at is not None and now >= one.kill_at:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
            one.ended = "killed"
            self.counts["killed"] += 1
            self.counts["late"] += late

    def _start(self, devices, number, processes, shards, size, address):
        values = {"MODEL_DIR": str(self.work / "model"), "OUTPUT": str(self.out)}
        values |= {"BATCH_SIZE": size}
        files = ["gin_configs/models/sample.gin"]
        arguments = ["infer", *_recipe(self.work, values, *files)]
        variables = {}
        if self.deterministic:
            arguments.append("--deterministic")
        if shards > 1:
            arguments.append(f"--shard={number}/{shards}")
        if processes > 1:
            arguments.append("--distributed")
            variables = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        output = self.work / f"session_{number}.txt"
        pid = child(output, lambda: _command(arguments, devices, **variables))
        return Process(pid, output)

    def _has_lines_since(self, started):
        """Whether a process of this session has written lines."""
        for path in self.out.parent.glob(f"{self.out.name}.*-of-*"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                if found.st_size and found.st_mtime >= started:
                    return True
        return False

    def _is_complete(self):
        record = self.out.with_name(f"{self.out.name}.run.json")
        return record.exists() and "summary" in json.loads(record.read_text())

    def _content(self):
        """The bytes of the file and its lines, checked: all there, once, in order."""
        # One killed after its last line, but before it was done, leaves its lock file.
        lock = f"{self.out.name}.lock"
        left = sorted(p.name for p in self.out.parent.iterdir() if p.name != lock)
        assert left == [self.out.name, f"{self.out.name}.run.json"], left
        content = self.out.read_bytes()
        lines = [json.loads(line) for line in content.splitlines()]
        found = [line["index"] for line in lines]
        assert found == list(range(self.num_examples)), "lost, twice or out of order"
        assert len({line["image_id"] for line in lines}) == self.num_examples
        return content, lines


def _devices(kinds):
    """How many different numbers of devices the kinds have."""
    return len({KINDS[kind][0] * KINDS[kind][1] for kind in kinds})


def _check_close(lines, reference):
    """Examples are the same; scores too, but for rounding, where the texts are."""
    for line, known in zip(lines, reference, strict=True):
        assert line["image_id"] == known["image_id"]
        if line["prediction"] == known["prediction"]:
            assert abs(line["score"] - known["score"]) < 1e-3
    texts = [
        line["prediction"] == known["prediction"]
        for line, known in zip(lines, reference, strict=True)
    ]
    assert sum(texts) >= 0.99 * len(texts), "other texts"


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main()
