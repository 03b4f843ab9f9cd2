"""One host's rows of each batch, as numpy: converted, padded, with their metadata."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import example_metadata, streams
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.converters import (
    ImageFeatureConverter,
    Lengths,
    Spec,
    feature_specs,
    known_shape,
)
from vit22b_transfer.data.order import HostShard, MixtureSchedule, ReadingPlan

ConverterFactory = Callable[..., ImageFeatureConverter]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to read: a split of a registered task or mixture, and in which shapes.

    task_overrides: tasks to read in place of those of the same names.
    max_examples: of evaluation: how many of the first examples to read; None: all.

    Raises:
      UserError: for an unknown name or split, or shapes that do not fit.
    """

    name: str
    split: str
    feature_lengths: Lengths
    converter_cls: ConverterFactory
    batch_size: int
    task_overrides: Mapping[str, seqio.Task] = dataclasses.field(default_factory=dict)
    max_examples: int | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size must be positive, got {self.batch_size}.")
        registered.check_max_examples(self.max_examples)
        self.converter.shapes(self.feature_lengths)
        # Tasks make images as the tower takes them.
        lengths = self.converter.prepared(self.feature_lengths)
        object.__setattr__(self, "feature_lengths", lengths)
        _ = self.provider  # found now, not at the first batch

    @functools.cached_property
    def provider(self) -> seqio.Task | seqio.Mixture:
        """The registered task or mixture."""
        return registered.find_provider(self.name, self.split)

    @functools.cached_property
    def converter(self) -> ImageFeatureConverter:
        """A converter that says what to read."""
        return self.converter_cls(pack=False)

    def read_as(self, task: seqio.Task) -> seqio.Task:
        """The task that is read for a registered one."""
        return self.task_overrides.get(task.name, task)


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """One host's rows of a batch; only the first len(flags) rows are examples.

    `flags` has a column per name in the converter's `flags`. `examples` holds the
    metadata of evaluation, in training `image_id` alone, as a text that is "" of tasks
    without one. `start_index` is the position of the first row.
    """

    features: dict[str, np.ndarray]
    flags: np.ndarray
    examples: list[dict[str, Any]]
    start_index: int


def host_train_batches(
    request: Request, seed: int, start_step: int, shard: HostShard
) -> Generator[HostBatch, None, None]:
    """Endless batches from that of `start_step` on: this host's rows of each."""
    streams.keep_tensorflow_off_accelerators()
    tasks, rates = registered.with_rates(request.provider)
    plan = ReadingPlan(request.batch_size, seed, MixtureSchedule(rates), shard)
    rows = shard.rows(request.batch_size)
    examples = streams.train_examples(
        [request.read_as(task) for task in tasks],
        request.split,
        request.converter,
        request.feature_lengths,
        plan,
        start_step,
    )
    batches = _batched(request, examples, len(rows), example_metadata.TRAINING)
    for step, features in enumerate(streams.as_numpy(batches), start_step):
        index = step * request.batch_size + rows.start
        # Not `unpacked`: for a name in a log no training ends.
        named = [
            {"image_id": row[0].decode(errors="replace")}
            for row in features["example_metadata"]
        ]
        batch = _host_batch(request, features, {}, index, len(rows))
        yield dataclasses.replace(batch, examples=named)
    raise UserError(
        f"split {request.split!r} of {request.name!r} ended, but training repeats it "
        "for ever: it is empty, or its preprocessors drop every example."
    )


def host_eval_batches(
    request: Request,
    start_index: int,
    shard: HostShard,
    only: Sequence[int] | None = None,
) -> Generator[HostBatch, None, None]:
    """One pass from example `start_index` on, in order: this host's rows of each batch.

    only: numbers of the batches that are read, rising; that of `start_index` is 0.

    Every host gets the same number of batches, if need be of zeros alone.
    """
    streams.keep_tensorflow_off_accelerators()
    assert isinstance(request.provider, seqio.Task)
    task, size = request.read_as(request.provider), request.batch_size
    rows = shard.rows(size)
    examples, num_examples = streams.eval_examples(
        task,
        request.split,
        request.feature_lengths,
        size,
        shard,
        start_index,
        request.max_examples,
        only,
    )
    if num_examples is not None and start_index > num_examples:
        raise UserError(
            f"start_index {start_index} lies beyond split {request.split!r} of "
            f"{request.name!r}, which has {num_examples} examples."
        )
    metadata = example_metadata.specs(task, request.converter, examples)
    examples = streams.fitted(
        examples, task.name, request.converter, request.feature_lengths, metadata
    )
    # Without a known number, every host reads all rows to know when the last one came.
    reads_all = num_examples is None
    batches = _batched(request, examples, size if reads_all else len(rows), metadata)
    numbers = itertools.count() if only is None else iter(only)
    starts = (start_index + number * size for number in numbers)
    index = start_index
    for features in streams.as_numpy(batches):
        if reads_all:
            features = {k: v[rows.start : rows.stop] for k, v in features.items()}
        first = next(starts)
        yield _host_batch(request, features, metadata, first + rows.start, len(rows))
        index = first + size
    if reads_all and index == start_index == 0:
        raise UserError(f"split {request.split!r} of {request.name!r} is empty.")
    last = next(starts, None)
    if num_examples is not None and last is not None and last < num_examples:
        index = last
        # The last batch has rows for other hosts only, but all take part in each step.
        features = {
            name: np.zeros([0, *known_shape(spec)[1:]], spec.dtype.as_numpy_dtype)
            for name, spec in feature_specs(batches).items()
        }
        yield _host_batch(request, features, metadata, index + rows.start, len(rows))


def _batched(
    request: Request,
    examples: tf.data.Dataset,
    num_rows: int,
    metadata: Mapping[str, tf.TensorSpec],
) -> tf.data.Dataset:
    """Batches of model features, `example_flags` and `example_metadata`."""
    # SeqIO's own way to carry features past a converter: of fixed length and rank 1.
    flags, strings = Spec(dtype=tf.int32), Spec(dtype=tf.string)
    converter = request.converter_cls(
        pack=False,
        passthrough_features={"example_flags": flags, "example_metadata": strings},
    )
    lengths = dict(request.feature_lengths)
    lengths |= {
        "example_flags": len(converter.flags),
        "example_metadata": len(metadata),
    }
    options = tf.data.Options()
    options.deterministic = True
    batches = converter(examples, lengths).batch(num_rows)
    return batches.with_options(options).prefetch(1)


def _host_batch(
    request: Request,
    features: dict[str, np.ndarray],
    metadata: Mapping[str, tf.TensorSpec],
    start_index: int,
    num_rows: int,
) -> HostBatch:
    """The batch with its features filled up to `num_rows` with zeros."""
    flags, packed = features.pop("example_flags"), features.pop("example_metadata")
    missing = num_rows - len(flags)
    if missing:
        features = {
            name: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1))
            for name, value in features.items()
        }
    unpack = functools.partial(example_metadata.unpacked, request.name, metadata)
    return HostBatch(
        features, flags, [*map(unpack, packed)] if metadata else [], start_index
    )
