"""What a head of pixels is trained on: random crops of images with their labels."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit22b_transfer.data.drawn_batches import DrawnBatches, Example
from vit22b_transfer.data.paired_folders import Pair
from vit22b_transfer.data.pixel_crops import RandomCrops
from vit22b_transfer.data.placement import BatchPartitioning


@dataclasses.dataclass(frozen=True)
class CropData:
    """Crops of the pairs of a folder.

    folder: a `SegmentationFolder` or `DepthFolder`; pairs: those that are learned from.
    size: (height, width) of the crops. fill: colour beyond an image's edge. no_label:
      what labels are there.
    first_steps: (name, count) of a feature [B] that is 1 in so many first steps and 0
      after them; None: none.
    """

    folder: Any
    pairs: Sequence[Pair]
    size: tuple[int, int]
    batch_size: int
    crops: RandomCrops
    fill: tuple[int, int, int]
    no_label: int
    first_steps: tuple[str, int] | None = None

    def batches(
        self,
        model: Any,
        partitioning: BatchPartitioning,
        *,
        seed: int,
        start_step: int,
    ) -> DrawnBatches:
        """Endless device batches; the first is that of step `start_step`."""
        del model
        return DrawnBatches(
            self._drawn,
            len(self.pairs),
            self.batch_size,
            partitioning,
            seed=seed,
            start_step=start_step,
            of_step=self._of_step,
        )

    def _drawn(self, number: int, rng: np.random.Generator) -> Example:
        image, labels = self.folder.read(self.pairs[number])
        image, labels = self.crops.draw(
            image, labels, self.size, rng, fill=self.fill, no_label=self.no_label
        )
        return {"encoder_input_images": image, "labels": labels}

    def _of_step(self, step: int) -> dict[str, float]:
        if self.first_steps is None:
            return {}
        name, count = self.first_steps
        return {name: float(step < count)}
