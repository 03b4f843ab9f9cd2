"""A training loop held up between its blocks of steps, to time others beside it."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import interleave
import numpy as np
from interleave import Sample


class HeldUp:
    """Batches that, between blocks of the loop's steps, time a run of each other.

    The loop waits for the device when it logs, right before it asks for the batch of
    the next block: so a block's time is the time between two such moments. The first
    block is the warm-up, after which `make_others` is given the first few batches.
    """

    def __init__(
        self,
        inner: Any,
        block: int,
        name: str,
        make_others: Callable[[list], Mapping[str, Callable[[], object]]],
    ):
        self._inner, self._block, self._name = inner, block, name
        self._make_others = make_others
        self._kept, self._calls, self._began, self._others = [], 0, None, {}
        self.counters = inner.counters
        self.samples: dict[str, list[Sample]] = {name: []}

    def __next__(self):
        if self._calls and self._calls % self._block == 0:
            self._between_blocks()
        self._calls += 1
        batch = next(self._inner)
        if self._calls <= 4:
            self._kept.append(batch)
        return batch

    def _between_blocks(self):
        if self._began is None:
            self._others = self._make_others(self._kept)
            self.samples |= {name: [] for name in self._others}
            for run in self._others.values():
                run()
        else:
            self.samples[self._name].append(_since(self._began))
            for name, run in self._others.items():
                began = _now()
                run()
                self.samples[name].append(_since(began))
        self._began = _now()

    def close(self):
        self._inner.close()


def _now():
    return Sample(time.perf_counter(), interleave.processor_seconds())


def _since(began):
    return Sample(*np.subtract(_now(), began))
