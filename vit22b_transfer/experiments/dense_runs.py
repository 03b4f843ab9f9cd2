"""What segmentation and depth have in common: a head learned on crops, then windows."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.data import paired_folders, pixel_batches, pixel_crops
from vit22b_transfer.data.placement import Placement
from vit22b_transfer.experiments import features, head_training, outcomes
from vit22b_transfer.host import progress, whole_files
from vit22b_transfer.inference import windows
from vit22b_transfer.models import dense, dense_heads
from vit22b_transfer.training import train


@dataclasses.dataclass(frozen=True)
class DenseProtocol:
    """How a head is learned on a tower and asked about whole images.

    head: of `models.dense_heads`. crops: how training images are drawn; their size is
      that of the tower's source. fraction: of the training images that are used, above
      0 and at most 1, drawn by the training's seed; smaller ones are parts of larger.
    train_trunk: whether the tower is trained with the head; else it is frozen, and runs
      in every step, as no crop comes twice. stride: (down, across) in pixels between
      the windows of a test image. pictures: of how many test images are drawn.
    """

    head: dense_heads.Head
    training: head_training.HeadTraining
    crops: pixel_crops.RandomCrops
    stride: tuple[int, int]
    fraction: float = 1.0
    train_trunk: bool = False
    pictures: int = 8


@dataclasses.dataclass(frozen=True)
class DenseRun:
    """A protocol on the data of a folder, checked before any work.

    name: of the experiment. task: what is said of each point. no_label: of a pixel
      beyond an image's edge. first_steps: as in `pixel_batches.CropData`.
    """

    name: str
    protocol: DenseProtocol
    task: dense.Segmentation | dense.Depth
    source: features.FeatureSource
    folder: Any
    output_dir: str
    no_label: int
    first_steps: tuple[str, int] | None = None

    def __post_init__(self):
        path = whole_files.writable_directory(self.output_dir, "output directory")
        object.__setattr__(self, "output_dir", path)

    def checked(self) -> "CheckedRun":
        """With the pairs of both splits, all of whose files are looked at.

        Raises:
          UserError: if something does not fit together, or there are fewer than two
            test images: an interval needs two.
        """
        self.source.check_one_size("a head of pixels")
        size: Any = tuple(self.source.image_size)
        window = windows.Windows(size, self.protocol.stride)
        head = dense_heads.of_tower(self.protocol.head, self.source.tower)
        self.source.tower.num_tokens(*size)
        train_pairs = self.folder.pairs(self.folder.train)
        used = train_pairs.part(self.protocol.fraction, self.protocol.training.seed)
        test_pairs = self.folder.pairs(self.folder.test)
        if len(test_pairs.pairs) < 2:
            raise UserError(
                f"split {self.folder.test!r} has one image; an interval needs two "
                "test images or more."
            )
        return CheckedRun(self, window, head, train_pairs, used, test_pairs)


@dataclasses.dataclass(frozen=True)
class CheckedRun:
    """As `DenseRun.checked` gives it: ready to learn and to predict."""

    run: DenseRun
    window: windows.Windows
    head: dense_heads.Head
    train_pairs: paired_folders.Pairs
    used: paired_folders.Pairs
    test_pairs: paired_folders.Pairs

    @property
    def facts(self) -> dict[str, Any]:
        """What stands in each line of the results beside the numbers."""
        run, folder = self.run, self.run.folder
        protocol = dataclasses.replace(run.protocol, head=self.head)
        data = {"task": str(folder.root)}
        return {
            "probe": run.name,
            "protocol": {
                **outcomes.described(protocol),
                "says": outcomes.described(run.task),
            },
            "features": run.source.facts(),
            "train": {**data, "split": folder.train, "images": len(self.used.pairs)},
            "test": {
                **data,
                "split": folder.test,
                "images": len(self.test_pairs.pairs),
            },
            "labels": outcomes.described(folder),
        }

    @property
    def left_out(self) -> dict[str, int]:
        """What was left out of both splits, by reason."""
        folder = self.run.folder
        return {
            f"{split}: {reason}": count
            for split, pairs in (
                (folder.train, self.train_pairs),
                (folder.test, self.test_pairs),
            )
            for reason, count in pairs.left_out.items()
        }

    @property
    def directory(self) -> str:
        """Where checkpoints of the training go."""
        run, facts = self.run, self.facts
        told = facts["protocol"]
        training = dict(told["training"])
        del training["checkpoint_every"]
        names = ("head", "crops", "says", "fraction", "train_trunk")
        decides = {
            **{name: told[name] for name in names},
            "training": training,
            "features": facts["features"],
            "labels": facts["labels"],
            "images": [pair.name for pair in self.used.pairs],
        }
        return head_training.directory_of(run.output_dir, run.name, decides)

    def predicted(
        self, finish: Callable[[np.ndarray, tuple[int, int]], np.ndarray]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """(number, image, labels, prediction) of each test image, in order.

        The head is learned first, or what is left of it. finish: makes a map at the
        size of the labels, as `windows.classes_at`.
        """
        run, protocol = self.run, self.run.protocol
        source, training = run.source, protocol.training
        model = dense.DenseModel(
            source.tower,
            self.head,
            run.task,
            training.optimizer,
            train_trunk=protocol.train_trunk,
        )
        data = pixel_batches.CropData(
            run.folder,
            self.used.pairs,
            self.window.size,
            training.batch_size,
            protocol.crops,
            fill_of(source.tower),
            run.no_label,
            run.first_steps,
        )
        params = training.learned(
            model,
            data,
            directory=self.directory,
            partitioning=source.partitioning,
            initial=train.InitialCheckpoint(
                source.checkpoint, rules=((r"head/.*", None),), cast=True
            ),
        )
        params = training.with_statistics(params, model, data, source.partitioning)
        placement = Placement.on(source.partitioning, source.batch_size)
        read: list[tuple[np.ndarray, np.ndarray]] = []

        def images():
            for pair in self.test_pairs.pairs:
                read.append(run.folder.read(pair))
                yield read[-1][0]

        with (
            source.partitioning.activate(),
            progress.Progress(
                progress.console(),
                f"{run.folder.test}: images judged",
                total=len(self.test_pairs.pairs),
                unit="images",
            ) as bar,
        ):
            jitted = jax.jit(model.predict)
            maps = self.window.maps(
                images(), lambda batch: jitted(params, batch), placement
            )
            for number, found in enumerate(maps):
                image, labels = read.pop(0)
                yield number, image, labels, finish(found, labels.shape)
                bar.show(number + 1)


def fill_of(tower: Any) -> tuple[int, int, int]:
    """The colour that the tower's normalisation makes nothing of, in bytes."""
    scale = getattr(tower, "pixel_scale", 1 / 255)
    red, green, blue = (
        int(np.clip(round(mean / scale), 0, 255)) for mean in tower.pixel_mean
    )
    return red, green, blue
