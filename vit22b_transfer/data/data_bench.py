"""How fast a task is read, and where the time goes."""

import contextlib
import functools
import os
import time
from typing import NamedTuple

from vit22b_transfer import UserError
from vit22b_transfer.data import decoded_images, images, packed_images, streams
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.converters import ImageTextFeatureConverter
from vit22b_transfer.data.example_images import records_of
from vit22b_transfer.data.host_batches import Request, host_train_batches
from vit22b_transfer.data.label_converters import ImageLabelFeatureConverter
from vit22b_transfer.data.order import HostShard
from vit22b_transfer.host import progress
from vit22b_transfer.models.preparation import Preparation

# The most images of which the parts are timed one by one.
_SAMPLE = 64
# Of texts, where none is given.
_LENGTH = 256


class Measured(NamedTuple):
    """Speed of a task's reading on this machine, and its parts in processor time.

    examples_per_second: in wall time, by all `processors`. per_example: seconds of one
    processor. parts: name -> seconds of one processor for each example; `the rest` is
    looking up records, TensorFlow's queues, and batching. scaled: of images decoded at
    a scale, in place of whole ones.
    """

    examples: int
    processors: int
    examples_per_second: float
    per_example: float
    parts: dict[str, float]
    scaled: float


def measure(
    task_name: str,
    split: str = "train",
    *,
    size: int = 224,
    batch_size: int = 64,
    seconds: float = 20.0,
    limits: dict[str, int | None] | None = None,
) -> Measured:
    """Reads batches as a training does, for some seconds, and times its parts.

    size: side of the images in pixels. limits: tokens of `inputs` and `targets`.
    The first batch, in which TensorFlow builds its graph, is not counted. Every image
    is decoded anew, where a training keeps those of a small set.

    Raises:
      UserError: if there is no such task or split, it is none of images and texts or
        labels, or its images cannot be read.
    """
    streams.keep_tensorflow_off_accelerators()
    task = registered.task_named(task_name)
    lengths: dict[str, object] = {"images": (size, size)}
    if "labels" in task.output_features:
        labels = [one.labels for one in records_of(task_name, split)]
        largest = max((label for each in labels for label in each), default=0)
        lengths["labels"] = max(1, *map(len, labels))
        converter = functools.partial(
            ImageLabelFeatureConverter, num_classes=max(2, largest + 1)
        )
    else:
        converter = ImageTextFeatureConverter
        for name in ("inputs", "targets"):
            lengths[name] = (limits or {}).get(name) or _LENGTH
    request = Request(task_name, split, lengths, converter, batch_size)
    parts, scaled = _parts(task_name, split, size, lengths)
    batches = host_train_batches(request, 0, 0, HostShard())
    label = f"reading {task_name} {split}"
    with (
        decoded_images.SMALL_SETS.keeping_none(),
        progress.Progress(progress.console(stderr=True), label, total=None) as shown,
        contextlib.closing(batches),
    ):
        next(batches)
        count, used, started = 0, time.process_time(), time.perf_counter()
        for batch in batches:
            count += len(batch.flags)
            shown.add(len(batch.flags))
            if time.perf_counter() - started > seconds:
                break
        wall, used = time.perf_counter() - started, time.process_time() - used
    each = used / count
    parts["the rest"] = max(0.0, each - sum(parts.values()))
    return Measured(
        count, len(os.sched_getaffinity(0)), count / wall, each, parts, scaled
    )


def _parts(
    task_name: str, split: str, size: int, lengths: dict[str, object]
) -> tuple[dict[str, float], float]:
    """Seconds of a processor for each part of an example; for images at a scale."""
    task = registered.task_named(task_name)
    records = [one for one in records_of(task_name, split) if one.image_path]
    some = records[:: max(1, -(-len(records) // _SAMPLE))]
    if not some:
        raise UserError(f"split {split!r} of task {task_name!r} has no image to read.")

    def timed(function, values):
        used = time.process_time()
        results = [function(value) for value in values]
        return (time.process_time() - used) / len(values), results

    def resized(how):
        def made(content):
            try:
                return images.read_image(content, (size, size), how)
            except UserError:  # the pipeline counts it
                return None

        return made

    parts = {}
    parts["reading files"], contents = timed(
        packed_images.read, [one.image_path for one in some]
    )
    parts["images decoded and resized"], _ = timed(resized(Preparation()), contents)
    scaled, _ = timed(resized(Preparation(jpegs="scaled")), contents)
    if "targets" in lengths:
        encode = task.output_features["targets"].vocabulary.encode
        texts = [f"{one.question} {one.target}" for one in some]
        parts["texts to tokens"], _ = timed(encode, texts)
    return parts, scaled
