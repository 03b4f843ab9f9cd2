"""A teacher's logits on disk, which a task gives beside its images.

They lie as the tokens of a frozen tower do (`data.feature_cache`), under a fingerprint
of all that decides them, but without the examples: the task itself is read, and each
picture's logits are found by the hash of its pixels. So a picture that the teacher was
not shown, pixel for pixel, is an error that names it, and never another's logits.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data.converters import (
    Example,
    ImageFeatureConverter,
    Lengths,
    Spec,
    map_examples,
    padded,
)
from vit22b_transfer.data.feature_cache import CacheKey, open_shards
from vit22b_transfer.data.feature_shards import Shard, TokenFormat, image_hash
from vit22b_transfer.models.distillation import LOGITS


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """Where a teacher's logits lie, and which teacher's they are.

    teacher: a checkpoint of a classifier, whose tower and head they come from. They are
      stored in float32, 4 bytes for each class and different picture.
    """

    # As those of `feature_cache.FeatureCache`.
    what: ClassVar[str] = "cached logits of a teacher"
    encoder: ClassVar[str] = "teacher"
    instead: ClassVar[str] = (
        "Run the teacher (name gin_configs/runs/distill.gin in place of "
        "distill_cached.gin)"
    )
    suffix: ClassVar[str] = "-teacher"
    holds_examples: ClassVar[bool] = False
    storage: ClassVar[str] = "exact"

    directory: str
    teacher: str


@dataclasses.dataclass(frozen=True)
class TaughtTasks:
    """Tasks by name that give `teacher_logits` beside all that they gave before.

    converter_cls: of their batches, which have them too.
    """

    tasks: Mapping[str, seqio.Task]
    num_classes: int
    converter_cls: Callable[..., ImageFeatureConverter]

    def lengths(self, lengths: Lengths) -> Lengths:
        """The feature lengths with that of the logits."""
        return {**lengths, LOGITS: self.num_classes}


def logits_format(num_classes: int) -> TokenFormat:
    """How the logits of a picture are stored: as one token in float32."""
    return TokenFormat(1, num_classes, "float32", TeacherCache.storage)


def open_tasks(keys: Sequence[CacheKey], num_classes: int) -> TaughtTasks:
    """The tasks, with what was cached of a teacher of so many classes.

    Raises:
      UserError: if a cache is missing, unfinished, cut off, or made with something
        else, and then with what.
    """
    tasks = {}
    for key in keys:
        key.check_repeatable(by_reading=False)
        layout, shards = open_shards(key)
        wanted = logits_format(num_classes)
        if layout.tokens != wanted:
            raise UserError(
                f"{key.directory} is of {layout.tokens}, but the logits of "
                f"{num_classes} classes are {wanted}. Delete the folder and run "
                "`vit22b cache-features` again."
            )
        logits = seqio.ContinuousFeature(dtype=tf.float32, rank=1)
        tasks[key.task.name] = key.task.replace(
            preprocessors=[
                *key.task.preprocessors,
                _Answers(key, shards, num_classes).added_to,
            ],
            output_features={**key.task.output_features, LOGITS: logits},
        )
    return TaughtTasks(tasks, num_classes, _with_logits(keys[0].converter_cls))


class _Answers:
    """The logits of each picture of a split, by the hash of its pixels."""

    def __init__(self, key: CacheKey, shards: Sequence[Shard], num_classes: int):
        self._key, self._num_classes = key, num_classes
        self._places = {
            image: (shard, row)
            for shard in shards
            for row, image in enumerate(shard.rows)
        }

    def added_to(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The examples, which have `images`, with their `teacher_logits`."""

        def add(example: Example) -> Example:
            name = tf.as_string(example.get("image_id", tf.constant("")))
            found = tf.numpy_function(
                self._look_up, [example["images"], name], tf.float32, stateful=False
            )
            return {**example, LOGITS: tf.ensure_shape(found, [self._num_classes])}

        return map_examples(dataset, add)

    def _look_up(self, pixels: np.ndarray, name: bytes) -> np.ndarray:
        place = self._places.get(image_hash(pixels))
        if place is None:
            of = f" {name.decode(errors='replace')}" if name else ""
            raise UserError(
                f"the teacher was not shown the image{of} of task "
                f"{self._key.task.name!r} as it is now: {self._key.directory} has no "
                "logits of these pixels. Write them anew with `vit22b cache-features`, "
                "in another CACHE_DIR, or run the teacher: name "
                "gin_configs/runs/distill.gin in place of distill_cached.gin."
            )
        shard, row = place
        logits = np.frombuffer(shard.row(row), np.float32)
        if logits.shape != (self._num_classes,):
            raise UserError(
                f"row {row} of {shard.path} is not of {self._num_classes} classes. "
                "Delete the folder and run `vit22b cache-features` again."
            )
        return logits


def _with_logits(
    converter_cls: Callable[..., ImageFeatureConverter],
) -> Callable[..., ImageFeatureConverter]:
    """The converter whose batches have the logits too, with the same arguments."""
    kind, arguments = converter_cls, {}
    if isinstance(converter_cls, functools.partial):
        kind, arguments = converter_cls.func, converter_cls.keywords
    return functools.partial(_converter_with_logits(kind), **arguments)


@functools.cache
def _converter_with_logits(kind: Any) -> type[ImageFeatureConverter]:
    spec = Spec(dtype=tf.float32)

    class TaughtConverter(kind):
        """Converter that takes a teacher's logits to the batch as they are."""

        TASK_FEATURES = {**kind.TASK_FEATURES, LOGITS: spec}
        MODEL_FEATURES = {**kind.MODEL_FEATURES, LOGITS: spec}

        def passed_through(self, given: Mapping[str, Any]) -> dict[str, Any]:
            """Of an example, or of lengths, what comes beside the model's own."""
            return super().passed_through(given) | {LOGITS: given[LOGITS]}

        def _convert_features(
            self, ds: tf.data.Dataset, task_feature_lengths: Lengths
        ) -> tf.data.Dataset:
            length = task_feature_lengths[LOGITS]
            whole = map_examples(ds, lambda x: {**x, LOGITS: padded(x, LOGITS, length)})
            return super()._convert_features(whole, task_feature_lengths)

    return TaughtConverter
