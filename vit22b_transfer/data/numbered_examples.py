"""A task's examples by their numbers, for caches of features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.converters import Lengths
from vit22b_transfer.data.streams import computed, random_access, task_examples


def count_examples(task: seqio.Task, split: str, lengths: Lengths) -> int:
    """Number of examples; the whole split is read if the task does not tell."""
    size = registered.num_records(task, split)
    if size is not None and random_access(task) is not None:
        examples = numbered_examples(task, split, lengths, [range(size)])
        if examples.cardinality() == size:
            return size
    return sum(1 for _ in task_examples(task, split, lengths))


def numbered_examples(
    task: seqio.Task, split: str, lengths: Lengths, ranges: Sequence[range]
) -> tf.data.Dataset:
    """The task's examples of these numbers, which rise, in order.

    Only those are read where the source has random access and gives one example per
    record, else all of them. Numbers beyond the split are left out.
    """
    source = random_access(task)
    if source is not None:
        size = source.num_records(split)
        ranges = [range(part.start, min(part.stop, size)) for part in ranges]

        def numbers(place: int) -> np.ndarray:
            return np.arange(ranges[place].start, ranges[place].stop, dtype=np.int64)

        order = computed(numbers, 0, len(ranges), sum(map(len, ranges)))
        examples = task_examples(task, split, lengths, None, order)
        if examples.cardinality() == order.cardinality():
            return examples
    starts = tf.constant([part.start for part in ranges], tf.int64)
    stops = tf.constant([part.stop for part in ranges], tf.int64)

    def asked_for(*numbered: Any) -> tf.Tensor:
        return tf.reduce_any((starts <= numbered[0]) & (numbered[0] < stops))

    numbered = task_examples(task, split, lengths).enumerate().filter(asked_for)
    return numbered.map(lambda _, example: example)
