"""Video by a frozen tower that sees frame by frame, and a transformer over them.

ViT-22B was judged so on Kinetics-400 and Moments in Time (section 4.5); how many frames
it took is not published, ViViT's protocol is. Vectors of frames are computed once: the
frames are never cropped at random, only the place of a clip's window is.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.data import video_folders
from vit22b_transfer.data.placement import Placement
from vit22b_transfer.experiments import head_training, outcomes
from vit22b_transfer.experiments.features import FeatureSource
from vit22b_transfer.host import progress, whole_files
from vit22b_transfer.models import video_head

NAME = "Video"
TOP = 5


@dataclasses.dataclass(frozen=True)
class VideoProtocol:
    """How clips are cut, learned from and judged.

    vector: of each frame, by name (`vectors.VECTORS`). frames, stride: of a window: so
      many frames, each `stride` after the one before. views: windows of a test clip,
      evenly over it, whose logits are averaged.
    """

    head: video_head.TemporalHead
    training: head_training.HeadTraining
    vector: str = "pooled"
    frames: int = 32
    stride: int = 2
    views: int = 4

    def __post_init__(self):
        if self.views < 1:
            raise UserError(f"views={self.views} must be positive.")


def run_video(
    protocol: VideoProtocol,
    *,
    source: FeatureSource,
    data: video_folders.VideoFolder,
    output_dir: str,
) -> list[outcomes.Measured]:
    """Shares of test clips whose class is the likeliest, and among the five likeliest.

    source: the frozen tower; its batch size is that of frames, and of windows in
    testing. Vectors of the frames are computed, or read if they are there; the head is
    learned, or read; either goes on where it was stopped. Prints protocol and numbers,
    with 95 % intervals over clips, and appends a JSON line for each to
    `output_dir/probes.jsonl`.

    Raises:
      UserError: if something does not fit together.
    """
    protocol.head.config(source.tower.width)  # an error before any frame is read
    output_dir = whole_files.writable_directory(output_dir, "output directory")
    training = protocol.training
    task = data.task(stride=protocol.stride, least=protocol.frames)
    clips: dict[str, video_folders.Clips] = {}
    notes: dict[str, Any] = {}
    parts, count = {}, 0
    for name, split in (("train", data.train), ("test", data.test)):
        found = source.read(task, split, (protocol.vector,))
        joined = found.joined((protocol.vector,))
        clips[name] = video_folders.Clips.of_frames(
            task, split, found.rows, joined.features, joined.labels
        )
        count = found.num_classes
        for key, value in found.notes.items():
            notes[f"{split}: {key.removeprefix(f'{task} {split}: ')}"] = value
        if clips[name].left_out:
            notes[f"{split}: clips with an unreadable frame"] = clips[name].left_out
        total = len(clips[name].labels)
        parts[name] = {"task": str(data.root), "split": split, "images": total}
    facts = {
        "probe": NAME,
        "classes": count,
        "protocol": outcomes.described(protocol),
        "features": source.facts(),
        **parts,
        "labels": outcomes.described(data),
    }
    decides = {key: facts[key] for key in ("protocol", "features", "train", "labels")}
    model = video_head.VideoModel(
        protocol.head,
        width=clips["train"].vectors[0].shape[1],
        frames=protocol.frames,
        num_classes=count,
        optimizer_def=training.optimizer,
    )
    params = training.learned(
        model,
        video_folders.ClipData(clips["train"], protocol.frames, training.batch_size),
        directory=head_training.directory_of(output_dir, NAME, decides),
        partitioning=source.partitioning,
    )
    logits = _logits(model, params, clips["test"], protocol, source)
    labels = clips["test"].labels
    order = np.argsort(-logits, axis=1, kind="stable")
    found = []
    for metric, top in (("accuracy", 1), (f"accuracy_top_{TOP}", TOP)):
        if top >= count > 1 and top > 1:
            continue  # all classes are among them
        right = (order[:, :top] == labels[:, None]).any(axis=1)
        share = float(right.mean())
        found.append(
            outcomes.Measured(
                metric,
                share,
                outcomes.wilson_interval(share, len(right)),
                len(right),
                notes={} if found else notes,
                interval_kind=outcomes.INTERVAL,
            )
        )
    head_training.tell(found, output_dir, facts)
    return found


def _logits(model, params, clips, protocol, source):
    """Of each clip the mean over its windows."""
    placement = Placement.on(source.partitioning, source.batch_size)
    size, total = source.batch_size, len(clips.labels)
    sums = np.zeros((total, model.module.num_classes))
    counts = np.zeros((total, 1))
    batch: list[tuple[int, np.ndarray]] = []

    def run():
        rows = [window for _, window in batch]
        rows += [rows[-1]] * (size - len(rows))
        stacked = placement({"frames": np.stack(rows).astype(np.float32)})
        found = np.asarray(predict(params, stacked["frames"]))
        for (number, _), logits in zip(batch, found, strict=False):
            sums[number] += logits
            counts[number] += 1
        batch.clear()

    label = "clips judged"
    with (
        source.partitioning.activate(),
        progress.Progress(progress.console(), label, total=total, unit="clips") as bar,
    ):
        predict = jax.jit(model.predict)
        for number in range(total):
            for window in clips.windows(number, protocol.frames, protocol.views):
                batch.append((number, window))
                if len(batch) == size:
                    run()
            bar.show(number + 1)
        if batch:
            run()
    return sums / counts
