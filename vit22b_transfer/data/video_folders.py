"""Videos as folders of numbered frames, a folder for each clip, in that of its class.

    DATA/training/juggling/clip_7/000001.jpg    DATA/validation/archery/a/frame_12.png

The number of a frame is the last one in its name. Of a clip each number stands once and
none is missing between the least and the greatest; every `stride`-th frame is read,
from the first on. `DATA/classes.txt` lists the classes, a name in each line.
"""

import collections
import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
from jaxtyping import Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.data import label_preprocessors, preprocessors
from vit22b_transfer.data.drawn_batches import DrawnBatches, Example
from vit22b_transfer.data.image_folders import tell_others
from vit22b_transfer.data.labelled_sources import LabelledSource
from vit22b_transfer.data.placement import BatchPartitioning
from vit22b_transfer.data.records import (
    PathLike,
    printable,
    resolve_path,
    skipping_advice,
)
from vit22b_transfer.data.sources import IMAGE_SUFFIXES
from vit22b_transfer.data.task_fingerprints import digest

CLASSES = "classes.txt"
_NUMBER = re.compile(r"(\d{1,18})\D*$", re.ASCII)


class ClipSource(LabelledSource):
    """The frames of clips that are read, as labelled images, clip after clip.

    An image's id is its path in the split. stride: of the frames that are read. least:
      so many of them a clip must have.

    A clip is a bad record if it lies in no folder of a class or in one of another name,
    or if a number is missing, stands twice, or there are too few frames; so is an image
    beside the clips, one without a number, and a link that leads out of the folder.
    """

    _advice = skipping_advice("VideoFolder")

    def __init__(self, *arguments: Any, stride: int, least: int, **options: Any):
        self._stride, self._least = stride, least
        super().__init__(*arguments, **options)

    def _origin(self, files: PathLike) -> str:
        return str(files)

    def _read(self, split, files, bad):
        classes, folder = self.classes(), self._folder(files)
        inside = os.path.realpath(folder.root)
        clips, others, seen = collections.defaultdict(list), [], set()
        for directory, names in folder.walk():
            clip = os.path.relpath(directory, folder.root)
            seen.add(clip)
            for name in names:
                path = os.path.join(directory, name)
                real = os.path.realpath(path)
                if not name.lower().endswith(IMAGE_SUFFIXES):
                    others.append(path)
                elif clip.count(os.sep) != 1:
                    bad.add("frame in no folder of a clip", f"{path}: CLASS/CLIP/NAME")
                elif os.path.commonpath([inside, real]) != inside:
                    bad.add("file that lies outside of its folder", f"{path} -> {real}")
                else:
                    clips[clip].append(name)
        for clip in seen:
            if clip.count(os.sep) == 1 and clip not in clips:
                bad.add("clip without a frame", os.path.join(folder.root, clip))
        records = []
        for clip in sorted(clips):
            class_name = clip.split(os.sep)[0]
            number = classes.id_of(os.fsencode(class_name).decode(errors="replace"))
            where = os.path.join(folder.root, clip)
            if number is None:
                bad.add("unknown class", self._unknown(class_name, classes))
                continue
            for name in self._frames(where, clips[clip], bad):
                path = os.path.join(where, name)
                image_id = os.path.relpath(path, folder.root)
                image_id = os.fsencode(image_id).decode(errors="backslashreplace")
                records.append(self._record(path, image_id, [number], classes))
        tell_others(folder.root, IMAGE_SUFFIXES, others)
        self._warn_of_missing_classes(split, records, classes)
        return records

    def _frames(self, where, names, bad):
        """The names of the frames that are read, in order; none of a bad clip."""
        numbered = {}
        for name in sorted(names):
            found = _NUMBER.search(os.path.splitext(name)[0])
            if found is None:
                bad.add("frame without a number", os.path.join(where, name))
                return []
            other = numbered.setdefault(int(found[1]), name)
            if other != name:
                bad.add("frame number that stands twice", f"{where}: {other}, {name}")
                return []
        order = sorted(numbered)
        for number, after in itertools.pairwise(order):
            if after != number + 1:
                bad.add("frames missing", f"{where}: none from {number} to {after}")
                return []
        chosen = [numbered[number] for number in order[:: self._stride]]
        if len(chosen) < self._least:
            needed = (self._least - 1) * self._stride + 1
            bad.add(
                "clip with too few frames",
                f"{where}: {len(order)}; {self._least} frames, {self._stride} apart, "
                f"need {needed}",
            )
            return []
        return chosen


@dataclasses.dataclass(frozen=True)
class VideoFolder:
    """A folder of videos. train, test: names of its splits' folders."""

    root: PathLike
    train: str = "training"
    test: str = "validation"
    on_bad_record: str = "error"

    def task(self, *, stride: int, least: int) -> str:
        """The name of a task of single frames, registered now; as `ClipSource`.

        Raises:
          UserError: for a stride or number of frames below 1.
        """
        if stride < 1 or least < 1:
            raise UserError(f"frames={least} and stride={stride} must be positive.")
        root = resolve_path(self.root)
        # Which frames are read, the cache of their vectors finds out by itself.
        name = f"clips_{digest(f'{root} {self}')}"
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)
        source = ClipSource(
            {split: root / split for split in (self.train, self.test)},
            classes=root / CLASSES,
            on_bad_record=self.on_bad_record,
            stride=stride,
            least=least,
        )
        options = preprocessors.ReadingOptions(on_bad_image=self.on_bad_record)
        seqio.TaskRegistry.add(
            name,
            # SeqIO's DataSource does not satisfy its own protocol to the letter.
            source=source,  # pyright: ignore[reportArgumentType]
            preprocessors=label_preprocessors.label_preprocessors(options),
            output_features=label_preprocessors.label_features(),
            shuffle_buffer_size=1,
        )
        return name


@dataclasses.dataclass(frozen=True)
class Clips:
    """Vectors of the frames of clips, in order, and the class of each clip.

    left_out: clips without one of their frames, which could not be read.
    """

    vectors: Sequence[Float[np.ndarray, "frames width"]]
    labels: Int[np.ndarray, " clips"]
    left_out: int

    @classmethod
    def of_frames(
        cls,
        task: str,
        split: str,
        rows: Int[np.ndarray, " images"],
        vectors: Float[np.ndarray, "images width"],
        labels: Int[np.ndarray, " images"],
    ) -> "Clips":
        """The clips of a task of frames. rows: numbers of the frames that were read.

        Raises:
          UserError: if no clip is whole.
        """
        source: Any = seqio.TaskRegistry.get(task).source
        count = source.num_records(split)
        names = [
            os.path.dirname(source.record(split, n).image_id) for n in range(count)
        ]
        place = np.full(count, -1)
        place[rows] = np.arange(len(rows))
        found, classes, left_out, start = [], [], 0, 0
        for _, group in itertools.groupby(names):
            stop = start + len(list(group))
            inside, start = place[start:stop], stop
            if (inside < 0).any():
                left_out += 1
                continue
            found.append(vectors[inside])
            classes.append(labels[inside[0]])
        if not found:
            raise UserError(
                f"split {printable(split)!r} has no clip all of whose frames can be "
                "read."
            )
        return cls(found, np.array(classes, np.int64), left_out)

    def windows(
        self, number: int, frames: int, views: int
    ) -> Float[np.ndarray, "windows frames width"]:
        """Windows evenly from a clip's first frame to its last, at most `views`."""
        vectors = self.vectors[number]
        starts = np.unique(np.linspace(0, len(vectors) - frames, views).round())
        return np.stack([vectors[int(n) : int(n) + frames] for n in starts])


@dataclasses.dataclass(frozen=True)
class ClipData:
    """What a head of videos is trained on: windows of clips, at random places."""

    clips: Clips
    frames: int
    batch_size: int

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
            len(self.clips.labels),
            self.batch_size,
            partitioning,
            seed=seed,
            start_step=start_step,
        )

    def _drawn(self, number: int, rng: np.random.Generator) -> Example:
        vectors = self.clips.vectors[number]
        start = rng.integers(0, len(vectors) - self.frames + 1)
        window = vectors[start : start + self.frames].astype(np.float32)
        return {
            "frames": window,
            "labels": np.array(self.clips.labels[number], np.int32),
        }
