"""Device batches of a task by name: deterministic, resumable, sharded, masked."""

import dataclasses
import logging
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import images, placement, streams
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.converters import (
    ImageTextFeatureConverter,
    Lengths,
    feature_specs,
    known_shape,
)
from vit22b_transfer.data.host_batches import (
    ConverterFactory,
    Request,
    host_eval_batches,
    host_train_batches,
)
from vit22b_transfer.data.prefetch import Prefetched
from vit22b_transfer.data.preprocessors import encode_text, load_images

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

# What was lost of each split that was read to its end, as it was logged.
_LOGGED: set[str] = set()


@dataclasses.dataclass
class BatchCounters:
    """What this host has been given so far: examples, and what was lost of them.

    skipped_records: those that the source left out of the split (its policy 'skip'),
      whether this host reads it all or a part.
    lost: by name in the converter's `flags`: `skipped_images` counts examples whose
      image could not be read (policy 'skip': zero image, nothing to learn);
      `truncated_<text>` counts texts that lost tokens beyond their length;
      `without_labels` images that have none. Rows that fill up the last batch do not
      count.
    """

    examples: int
    skipped_records: int
    lost: dict[str, int]

    def counts(self) -> dict[str, int]:
        """All counters by name."""
        first, last = {"examples": self.examples}, self.skipped_records
        return first | self.lost | {"skipped_records": last}

    def losses(self) -> str:
        """What was lost, as `2 skipped images, 1 skipped records`; "" if nothing."""
        return ", ".join(
            f"{count} {name.replace('_', ' ')}"
            for name, count in self.counts().items()
            if count and name != "examples"
        )

    def add(self, flags: np.ndarray, told: Collection[str] = ()) -> None:
        """Counts a batch by its rows of flags; warns of each first loss.

        told: flags whose first loss was warned of when it was read.
        """
        self.examples += len(flags)
        for name, count in zip(self.lost, flags.sum(axis=0), strict=True):
            if count and not self.lost[name] and name not in told:
                logger.warning(
                    "%s: %d of the %d examples of this batch, the first to be seen. "
                    "The total is counted.",
                    name,
                    count,
                    len(flags),
                )
            self.lost[name] += int(count)


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """A device batch and, on the host, what the task says of this host's examples.

    `examples` hold the task's own fields beside its model features, such as
    `inputs_pretokenized`, `image_id` and `references`: str, number or list of them,
    never pixels. They are the rows with an example; the first is number `start_index`
    of the split. With several hosts each gets the rows that it read, so that together
    they have every example once. Rows without an example are zero, weights included.
    `repeated` says of each row that this host read whether its image is that of the row
    before, pixel for pixel.
    """

    features: placement.Features
    examples: list[dict[str, Any]]
    start_index: int
    repeated: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))


class Batches(Generic[Item], Iterator[Item]):
    """Iterator over device batches made ahead of use, with `counters` of those given.

    `image_ids` are those of the last batch of a training: of this host's rows.
    At the end of the split it logs what was lost, if anything was; a split that is
    read again with the same loss logs nothing anew. Close it, or use it in a `with`
    block, to stop its thread before the end.
    """

    def __init__(
        self,
        request: Request,
        items: Generator[tuple[Item, np.ndarray, list[str]], None, None],
    ):
        skipped = registered.skipped_records(request.provider, request.split)
        lost = dict.fromkeys(request.converter.flags, 0)
        self.counters = BatchCounters(0, sum(skipped.values()), lost)
        self._told = _told(request, lost)
        self._what = f"{request.name} {request.split}"
        self.image_ids: list[str] = []
        self._items = Prefetched(items)

    def __next__(self) -> Item:
        try:
            item, flags, self.image_ids = next(self._items)
        except StopIteration:
            if lost := self.counters.losses():
                read = self.counters.examples
                total = f"{self._what}, {read} examples read: {lost}"
                if total not in _LOGGED:
                    logger.warning("%s", total)
                _LOGGED.add(total)
            raise
        self.counters.add(flags, self._told)
        return item

    def close(self) -> None:
        """Stops reading; iteration is over."""
        self._items.close()
        images.tell_noted()

    def __enter__(self) -> "Batches[Item]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _told(request: Request, flags: Collection[str]) -> set[str]:
    """The flags whose first loss all preprocessors warn of, naming the example."""
    tasks = map(request.read_as, registered.with_rates(request.provider)[0])
    steps = [{getattr(p, "func", None) for p in task.preprocessors} for task in tasks]

    def by(flag):
        return load_images if flag == "skipped_images" else encode_text

    return {flag for flag in flags if all(by(flag) in own for own in steps)}


def train_batches(
    task_or_mixture_name: str,
    split: str,
    *,
    feature_lengths: Lengths,
    converter_cls: ConverterFactory,
    batch_size: int,
    seed: int,
    partitioning: placement.BatchPartitioning,
    start_step: int = 0,
    task_overrides: Mapping[str, seqio.Task] | None = None,
) -> Batches[placement.Features]:
    """Endless device batches, the first being that of `start_step`.

    A batch is a function of seed and step alone. Each epoch is a new shuffle of the
    whole split; a mixture's tasks are dealt out by their rates. Resuming takes no time
    where the source has random access and the preprocessors give one example per record
    and draw no random numbers. Otherwise the examples before `start_step` are read
    again, and the log says so; of a source without random access the order then also
    depends on the number of hosts. What is drawn by `data.augmentation` is a function
    of seed, epoch and record, and costs no resuming. `task_overrides` holds tasks by
    name to read in place of the registered ones (`data.feature_cache`).

    Raises:
      UserError: if a name, split, length or batch size does not fit, or while
        iterating if there are no examples or one cannot be used; it is named.
    """
    request = Request(
        task_or_mixture_name,
        split,
        feature_lengths,
        converter_cls,
        batch_size,
        task_overrides or {},
    )
    if start_step < 0:
        raise UserError(f"start_step must not be negative, got {start_step}.")
    place = placement.Placement.on(partitioning, batch_size)

    def items():
        for batch in host_train_batches(request, seed, start_step, place.shard):
            ids = [example["image_id"] for example in batch.examples]
            yield place(batch.features), batch.flags, ids

    return Batches(request, items())


def eval_batches(
    task_name: str,
    split: str,
    *,
    feature_lengths: Lengths,
    converter_cls: ConverterFactory,
    batch_size: int,
    partitioning: placement.BatchPartitioning,
    start_index: int = 0,
    task_overrides: Mapping[str, seqio.Task] | None = None,
    max_examples: int | None = None,
    only: Sequence[int] | None = None,
) -> Batches[EvalBatch]:
    """One pass over a split in order, from example `start_index` on.

    Of batches of numbers in `only` alone, if it is given: they rise, and 0 is the one
    that begins at `start_index`. With `max_examples` the split ends after that many
    examples. The last batch is filled up with zero rows. Of a task without targets all
    loss weights are zero.

    Raises:
      UserError: if a name, split, length or batch size does not fit, if the name is a
        mixture's, or while iterating if there are no examples or one cannot be used;
        it is named.
    """
    request = Request(
        task_name,
        split,
        feature_lengths,
        converter_cls,
        batch_size,
        task_overrides or {},
        max_examples,
    )
    if start_index < 0:
        raise UserError(f"start_index must not be negative, got {start_index}.")
    if isinstance(request.provider, seqio.Mixture):
        names = ", ".join(task.name for task in request.provider.tasks)
        raise UserError(
            f"{task_name!r} is a mixture; evaluate its tasks one by one: {names}."
        )
    place = placement.Placement.on(partitioning, batch_size)

    def items():
        for batch in host_eval_batches(request, start_index, place.shard, only):
            examples = batch.examples if place.reports else []
            repeated = repeated_images(batch.features)
            features = place(batch.features)
            read = EvalBatch(features, examples, batch.start_index, repeated)
            yield read, batch.flags, []

    return Batches(request, items())


def repeated_images(features: Mapping[str, Any]) -> np.ndarray:
    """Of each row of host arrays, whether its image is that of the row before."""
    images = features.get(ImageTextFeatureConverter.IMAGES)
    if images is None:
        return np.zeros(0, bool)
    pairs = zip(images, images[1:], strict=False)
    same = [np.array_equal(one, other) for one, other in pairs]
    return np.array([False, *same][: len(images)])


def batch_shapes(
    converter_cls: ConverterFactory, feature_lengths: Lengths, batch_size: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, np.dtype]]:
    """(shapes, dtypes) of a batch's features, to initialise a model; reads nothing."""
    streams.keep_tensorflow_off_accelerators()
    converter = converter_cls(pack=False)
    example = {
        name: tf.zeros(
            # Nothing is cut here: vectors may be of any length up to theirs.
            (0,) if len(shape) == 1 else shape,
            converter.TASK_FEATURES[name].dtype,
        )
        for name, shape in converter.shapes(feature_lengths).items()
    }
    lengths = converter.prepared(feature_lengths)
    converted = converter(tf.data.Dataset.from_tensors(example), lengths)
    specs = feature_specs(converted)
    shapes = {name: (batch_size, *known_shape(spec)) for name, spec in specs.items()}
    types = {name: np.dtype(spec.dtype.as_numpy_dtype) for name, spec in specs.items()}
    return shapes, types
