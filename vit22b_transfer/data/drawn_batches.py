"""Endless training batches of examples that are drawn from records of any kind.

Order and random numbers come from seed, epoch and record (`order`), so that a run that
goes on at a step is given what it would have been given, on any number of hosts.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Generator, Iterator

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.data import order
from vit22b_transfer.data.placement import BatchPartitioning, Features, Placement
from vit22b_transfer.data.prefetch import Prefetched

Example = dict[str, np.ndarray]
_READERS = 4
_AHEAD = 2


@dataclasses.dataclass
class ExampleCounter:
    """Examples that were given out."""

    examples: int = 0

    def counts(self) -> dict[str, int]:
        """By name."""
        return {"examples": self.examples}


class DrawnBatches(Iterator[Features]):
    """Device batches of what `draw` makes of records, some of them made ahead.

    draw: from a record's number, below `count`, and a random generator to an example,
      whose arrays have one shape for all; called by several threads. of_step: features
      [B] of a step, beside those.
    """

    def __init__(
        self,
        draw: Callable[[int, np.random.Generator], Example],
        count: int,
        batch_size: int,
        partitioning: BatchPartitioning,
        *,
        seed: int,
        start_step: int,
        of_step: Callable[[int], dict[str, float]] = lambda step: {},
    ):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be positive.")
        self._draw, self._count, self._of_step = draw, count, of_step
        self._place = Placement.on(partitioning, batch_size)
        self._plan = order.ReadingPlan(batch_size, seed, shard=self._place.shard)
        self._key = order.stream_key(seed, "drawn")
        self.counters = ExampleCounter()
        self._made = Prefetched(self._batches(start_step), _AHEAD)

    def __next__(self) -> Features:
        batch = next(self._made)
        self.counters.examples += self._place.batch_size
        return self._place(batch)

    def close(self) -> None:
        """Stops the threads."""
        self._made.close()

    def _batches(self, step: int) -> Generator[Example, None, None]:
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            while True:
                where = step, 0, self._count, self._key
                records = self._plan.records(*where)
                keys = self._plan.example_keys(*where)
                drawn = list(pool.map(self._example, records, keys))
                batch = {
                    name: np.stack([example[name] for example in drawn])
                    for name in drawn[0]
                }
                for name, value in self._of_step(step).items():
                    batch[name] = np.full(len(drawn), value, np.float32)
                yield batch
                step += 1

    def _example(self, record, key):
        # As unsigned: a seed is not negative.
        rng = np.random.default_rng(int(key) & (2**64 - 1))
        return self._draw(int(record), rng)
