"""One file of predictions from many independent jobs, each with a part of its batches.

A shard is a process that shares nothing with the others but the folder. It looks which
batches are in no part yet, makes every n-th of those, and merges if it was the last.
Started again, with the same number of shards or another, or without any, what is there
is never made again.
"""

import collections
import contextlib
import glob
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator

from vit22b_transfer import UserError
from vit22b_transfer.host import locks
from vit22b_transfer.inference.prediction_files import (
    LineWriter,
    PredictionFiles,
    index_of,
    merged,
)

# Seconds to wait for others that hold the lock of the whole file for a moment only.
_WAITS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
Writer = Callable[[], contextlib.AbstractContextManager[LineWriter]]


class ShardFiles:
    """What shards leave beside a file of predictions until it is complete."""

    def __init__(self, files: PredictionFiles):
        self._files = files

    def check_none_writes(self) -> None:
        """Raises UserError if a shard writes; hold the lock of the whole file."""
        pattern = f"{glob.escape(self._files.path)}.shard-*-of-*.lock"
        for lock in glob.glob(pattern):
            with locks.held(lock.removesuffix(".lock")):
                pass

    @contextlib.contextmanager
    def entered(self, index: int, count: int) -> Iterator[Writer]:
        """This process is shard `index` of `count` while it is entered.

        What is given opens a writer of a new part: nothing is written over.

        Raises:
          UserError: if it is being written by another process, or the whole file is.
        """
        place = f"{self._files.path}.shard-{index:05d}-of-{count:05d}"
        # First its own lock: who takes the whole file's looks at those of shards.
        with locks.held(place):
            with _held_soon(self._files.path):
                if self._files.record() is None:
                    self._files.begin()
            yield lambda: _writer(place)

    def missing(self, block: int, total: int) -> list[int]:
        """Numbers of the batches of `block` examples that are not in the parts."""
        there: collections.Counter[int] = collections.Counter()
        for index, _ in itertools.groupby(merged(self._files.parts()), index_of):
            there[index // block] += 1
        return [
            number
            for number in range(-(-total // block))
            if there[number] < min(block, total - number * block)
        ]

    def num_written(self) -> int:
        """Different examples in all parts."""
        return sum(1 for _ in itertools.groupby(merged(self._files.parts()), index_of))

    def merge(self, total: int) -> dict[str, int] | None:
        """The summary of the merged file; None if some of `total` examples lack.

        Of those who try at once the first does it.
        """
        with _held_soon(self._files.path):
            if self._files.is_complete():
                self._files.remove_left()
                return self._files.summary()
            if self.num_written() < total:
                return None
            return self._files.merge(of_hosts=False)


def merge_file(path: str) -> dict[str, int]:
    """Merges what shards wrote of the file at `path`; its summary.

    Raises:
      UserError: if it was not begun, or examples are missing.
    """
    path = os.path.abspath(os.path.expanduser(path))
    record = PredictionFiles(path, {}).record()
    if record is None:
        raise UserError(f"{path} was not begun: there is no {path}.run.json.")
    known = record["fingerprint"]
    about = record.get("made_with")
    files = PredictionFiles(
        path, known, about=about if isinstance(about, dict) else None
    )
    total = known.get("max_examples", known.get("num_examples"))
    if type(total) is not int:
        raise UserError(f"{path}.run.json does not say how many examples there are.")
    shards = ShardFiles(files)
    summary = shards.merge(total)
    if summary is None:
        raise UserError(
            f"{shards.num_written()} of {total} examples of {path} are there: start "
            "the shards that did not end again."
        )
    return summary


@contextlib.contextmanager
def _writer(place: str) -> Iterator[LineWriter]:
    """A writer of a part that is not there yet."""
    paths = (f"{place}.{number:03d}" for number in range(1000))
    free = [path for path in paths if not os.path.exists(path)]
    if not free:
        raise UserError(
            f"{place} was begun 1000 times and never ended; find out why, or start it "
            "with another number of shards."
        )
    with open(free[0], "xb") as file:
        yield LineWriter(file)


@contextlib.contextmanager
def _held_soon(place: str) -> Iterator[None]:
    """`locks.held`, waiting for others that hold it for a moment only."""
    with contextlib.ExitStack() as stack:
        for wait in _WAITS:
            try:
                stack.enter_context(locks.held(place))
                break
            except UserError:
                time.sleep(wait * random.uniform(0.5, 1.5))
        else:
            stack.enter_context(locks.held(place))
        yield
