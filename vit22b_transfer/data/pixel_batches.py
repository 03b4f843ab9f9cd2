"""Endless training batches of images and labels of their pixels, a function of a step.

Order and crops come from seed, epoch and record (`order`), so that a run that goes on
at a step is given what it would have been given, on any number of hosts.
"""

import concurrent.futures
import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.data import order
from vit22b_transfer.data.paired_folders import Pair
from vit22b_transfer.data.pixel_crops import RandomCrops
from vit22b_transfer.data.placement import BatchPartitioning, Features, Placement
from vit22b_transfer.data.prefetch import Prefetched

_READERS = 4
_AHEAD = 2


@dataclasses.dataclass
class ExampleCounter:
    """Examples that were given out."""

    examples: int = 0

    def counts(self) -> dict[str, int]:
        """By name."""
        return {"examples": self.examples}


@dataclasses.dataclass(frozen=True)
class CropData:
    """What a head is trained on: crops of the pairs of a folder.

    folder: a `SegmentationFolder` or `DepthFolder`; pairs: those of its training split.
    size: (height, width) of the crops. fill: colour beyond an image's edge. no_label:
    what labels are there. first_steps: (name, count) of a feature [B] that is 1 in so
      many first steps and 0 after them; None: none.
    """

    folder: Any
    pairs: Sequence[Pair]
    size: tuple[int, int]
    batch_size: int
    crops: RandomCrops
    fill: tuple[int, int, int]
    no_label: int
    first_steps: tuple[str, int] | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be positive.")

    def batches(
        self,
        model: Any,
        partitioning: BatchPartitioning,
        *,
        seed: int,
        start_step: int,
    ) -> "CropBatches":
        """Endless device batches; the first is that of step `start_step`."""
        del model
        return CropBatches(self, partitioning, seed, start_step)


class CropBatches(Iterator[Features]):
    """Batches of `CropData`, made ahead by threads; `counters` tells how many."""

    def __init__(
        self,
        data: CropData,
        partitioning: BatchPartitioning,
        seed: int,
        start_step: int,
    ):
        self._data, self._seed = data, seed
        self._place = Placement.on(partitioning, data.batch_size)
        self.counters = ExampleCounter()
        self._made = Prefetched(self._batches(start_step), _AHEAD)

    def __next__(self) -> Features:
        batch = next(self._made)
        self.counters.examples += self._data.batch_size
        return self._place(batch)

    def close(self) -> None:
        """Stops the threads."""
        self._made.close()

    def _batches(self, step: int) -> Generator[dict[str, np.ndarray], None, None]:
        data = self._data
        plan = order.ReadingPlan(data.batch_size, self._seed, shard=self._place.shard)
        key, count = order.stream_key(self._seed, "crops"), len(data.pairs)
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            while True:
                records = plan.records(step, 0, count, key)
                keys = plan.example_keys(step, 0, count, key)
                drawn = list(pool.map(self._drawn, records, keys))
                batch = {
                    "encoder_input_images": np.stack([image for image, _ in drawn]),
                    "labels": np.stack([labels for _, labels in drawn]),
                }
                if data.first_steps is not None:
                    name, steps = data.first_steps
                    batch[name] = np.full(len(drawn), step < steps, np.float32)
                yield batch
                step += 1

    def _drawn(self, record, key):
        data = self._data
        image, labels = data.folder.read(data.pairs[int(record)])
        rng = np.random.default_rng(int(key) & (2**64 - 1))
        return data.crops.draw(
            image, labels, data.size, rng, fill=data.fill, no_label=data.no_label
        )


def settings_of(data: CropData) -> Mapping[str, Any]:
    """What decides the crops beside the files, as JSON values."""
    return {
        "size": list(data.size),
        "batch_size": data.batch_size,
        **dataclasses.asdict(data.crops),
    }
