"""Example streams: the examples of SeqIO tasks in a chosen order, from any position."""

import codecs
import inspect
import logging
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import example_metadata, image_lengths
from vit22b_transfer.data.augmentation import EXAMPLE_KEY
from vit22b_transfer.data.converters import (
    Example,
    ImageFeatureConverter,
    Lengths,
    feature_specs,
    map_examples,
)
from vit22b_transfer.data.order import HostShard, ReadingPlan, stream_key
from vit22b_transfer.data.records import printable
from vit22b_transfer.data.tasks import RandomAccess

logger = logging.getLogger(__name__)

_LAST_STEP = 1 << 62


class _OrderedSource(seqio.DataSource):
    """The records of another source in a given order, behind SeqIO's interface.

    keys: of int64 scalars in the same order, which become the examples' `EXAMPLE_KEY`.
    """

    def __init__(
        self,
        source: seqio.DataSource,
        split: str,
        order: tf.data.Dataset,
        keys: tf.data.Dataset | None,
    ):
        super().__init__(splits=[split], caching_permitted=source.caching_permitted)
        self._source = source
        self._order = order
        self._keys = keys

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = False,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Lengths | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        assert isinstance(self._source, RandomAccess)
        records = self._source.records(split, self._order)
        if self._keys is not None:
            records = tf.data.Dataset.zip((records, self._keys)).map(_with_key)
        # Known, so that preprocessors which drop or multiply examples can be told.
        cardinality = self._order.cardinality()
        return records.apply(tf.data.experimental.assert_cardinality(cardinality))


@tf.autograph.experimental.do_not_convert
def _with_key(example: Example, key: tf.Tensor) -> Example:
    return {**example, EXAMPLE_KEY: tf.bitcast(key, tf.int32)}


def keep_tensorflow_off_accelerators() -> None:
    """Leaves the GPUs to JAX; to be called before TensorFlow's first operation.

    It would take all their memory.
    """
    if tf.config.get_visible_devices("GPU"):
        tf.config.set_visible_devices([], "GPU")


def draws_random_numbers(task: seqio.Task) -> bool:
    """Whether a preprocessor asks SeqIO for seeds (`map_over_dataset(num_seeds=...)`).

    SeqIO gives the n-th example of a pass the n-th seed. Randomness that comes from
    elsewhere (`tf.random.uniform`) cannot be seen here, nor repeated.
    """
    return any(
        {"seed", "seeds"} & inspect.signature(preprocessor).parameters.keys()
        for preprocessor in task.preprocessors
        if not isinstance(preprocessor, seqio.CacheDatasetPlaceholder)
    )


def random_access(task: seqio.Task) -> RandomAccess | None:
    """The task's source if the task can be given its records in any order."""
    # A subclass of Task may read in its own way, which Task.replace would lose.
    if isinstance(task.source, RandomAccess) and type(task) is seqio.Task:
        return task.source
    return None


def task_examples(
    task: seqio.Task,
    split: str,
    lengths: Lengths,
    seed: int | None = None,
    order: tf.data.Dataset | None = None,
    keys: tf.data.Dataset | None = None,
) -> tf.data.Dataset:
    """The task's examples in its own order, or of the records in `order`.

    keys: int64 scalars in that order, for what is drawn at random of each example.
    They are as the task makes them: SeqIO trims nothing. The cardinality is that of
    `order` only if the task gives one example per record.
    """
    if order is not None:
        task = task.replace(source=_OrderedSource(task.source, split, order, keys))
    return task.get_dataset(
        lengths,
        split=split,
        shuffle=False,
        seed=seed,
        trim_output_features=False,
        try_in_mem_cache=False,
    )


def computed(
    values: Callable[[int], np.ndarray], first: int, last: int, cardinality: int
) -> tf.data.Dataset:
    """Dataset of the scalars in values(first), ..., values(last - 1), all int64."""

    @tf.autograph.experimental.do_not_convert
    def compute(step: tf.Tensor) -> tf.Tensor:
        array = tf.numpy_function(lambda s: values(int(s)), [step], tf.int64)
        return tf.ensure_shape(array, [None])

    steps = tf.data.Dataset.range(first, last).map(compute)
    return steps.unbatch().apply(tf.data.experimental.assert_cardinality(cardinality))


def _endless_numbers(values: Callable[[int], np.ndarray], first: int):
    return computed(values, first, _LAST_STEP, tf.data.INFINITE_CARDINALITY)


def train_examples(
    tasks: Sequence[seqio.Task],
    split: str,
    converter: ImageFeatureConverter,
    lengths: Lengths,
    plan: ReadingPlan,
    start_step: int,
) -> tf.data.Dataset:
    """This host's endless stream of `fitted` examples, from the batch of `start_step`.

    Several tasks are dealt out by `plan.schedule`.
    """
    streams = []
    for member, task in enumerate(tasks):
        if lacks := converter.without_target(task.output_features):
            raise UserError(f"task {task.name!r} has {lacks} to train on.")
        examples = _endless(task, member, split, lengths, plan, start_step)
        metadata = example_metadata.TRAINING
        streams.append(fitted(examples, task.name, converter, lengths, metadata))
    if len(streams) == 1:
        return streams[0]
    choice = _endless_numbers(lambda step: plan.members(step)[0], start_step)
    return tf.data.Dataset.choose_from_datasets(streams, choice)


def _endless(
    task: seqio.Task,
    member: int,
    split: str,
    lengths: Lengths,
    plan: ReadingPlan,
    start_step: int,
) -> tf.data.Dataset:
    """The examples of `member` in this host's rows, reshuffled every epoch."""
    source = random_access(task)
    key = stream_key(plan.seed, task.name)

    def ordered_from(step: int) -> tuple[tf.data.Dataset, bool]:
        """The examples, and whether there is one for each record."""
        assert source is not None
        of_member = (member, source.num_records(split), key)
        order = _endless_numbers(lambda s: plan.records(s, *of_member), step)
        keys = None
        if image_lengths.augmentation_of(lengths.get("images")) is not None:
            keys = _endless_numbers(lambda s: plan.example_keys(s, *of_member), step)
        examples = task_examples(task, split, lengths, plan.seed, order, keys)
        return examples, bool(examples.cardinality() == order.cardinality())

    if source is None:
        shard = None
        if plan.shard.count > 1:
            shard = seqio.ShardInfo(plan.shard.index, plan.shard.count)
        reason = f"its source {type(task.source).__name__} has no random access"
        examples = task.get_dataset(
            lengths,
            split=split,
            shuffle=True,
            seed=plan.seed,
            shard_info=shard,
            num_epochs=None,
            trim_output_features=False,
            try_in_mem_cache=False,
        )
    elif draws_random_numbers(task):
        reason = "its preprocessors draw random numbers in sequence"
        examples, _ = ordered_from(0)
    else:
        examples, one_each = ordered_from(start_step)
        if one_each:
            return examples
        reason = "its preprocessors do not give one example per record"
        examples, _ = ordered_from(0)
    skipped = plan.rows_before(start_step, member)
    logger.log(
        logging.WARNING if skipped else logging.INFO,
        "task %r is read in sequence, because %s: resuming at step %d reads and drops "
        "%d examples first.",
        task.name,
        reason,
        start_step,
        skipped,
    )
    return examples.skip(skipped)


def eval_examples(
    task: seqio.Task,
    split: str,
    lengths: Lengths,
    batch_size: int,
    shard: HostShard,
    start_index: int,
    max_examples: int | None = None,
    only: Sequence[int] | None = None,
) -> tuple[tf.data.Dataset, int | None]:
    """One pass over the task's examples in order, and the number there are, or None.

    With `max_examples` the split is as if it had no more than its first ones. `only`
    are the numbers of the batches to read, rising, the one of `start_index` being 0.

    With a number, the examples are this host's rows of batches that begin at
    `start_index`. With None (no random access, or not one example per record) they are
    all rows from `start_index` on, whatever the host.
    """
    seed = 0 if draws_random_numbers(task) else None
    source = random_access(task)
    if source is not None and seed is None:
        size, rows = source.num_records(split), shard.rows(batch_size)
        size = size if max_examples is None else min(size, max_examples)

        whole, rest = divmod(max(0, size - start_index), batch_size)
        numbers = range(whole + 1) if only is None else only

        def records(step: int) -> np.ndarray:
            start = start_index + numbers[step] * batch_size
            stop = min(start + rows.stop, size)
            return np.arange(start + rows.start, stop, dtype=np.int64)

        of_last = min(max(0, rest - rows.start), len(rows))
        mine = sum(len(rows) if n < whole else of_last * (n == whole) for n in numbers)
        order = computed(records, 0, len(numbers), mine)
        examples = task_examples(task, split, lengths, seed, order)
        if examples.cardinality() == order.cardinality():
            return examples, size
    if only is not None:
        raise UserError(
            f"task {task.name!r} can only be read in sequence: its source has no "
            "random access, or its preprocessors do not give one example per record. "
            "Predict it in one piece, without --shard."
        )
    examples = task_examples(task, split, lengths, seed)
    if max_examples is not None:
        examples = examples.take(max_examples)
    return examples.skip(start_index), None


def fitted(
    examples: tf.data.Dataset,
    task_name: str,
    converter: ImageFeatureConverter,
    lengths: Lengths,
    metadata: Mapping[str, tf.TensorSpec],
) -> tf.data.Dataset:
    """The converter's task features, texts cut to their lengths, and what batches need.

    A text counts as truncated if it is here, or if the task says that it was
    (`truncated_<name>`). A vector that the task does not have becomes an empty one. An
    evaluation counts no empty one of a task that says that it has none at all
    (`without_<name>`: False).

    Adds `image_id` (for error messages), `example_flags` (int32, one per name in
    `converter.flags`) and `example_metadata` (one string per feature that `metadata`
    names).

    Raises:
      UserError: if the task lacks a feature that is no vector, such as `images`.
    """
    specs = feature_specs(examples)
    wanted = converter.TASK_FEATURES
    for name, spec in wanted.items():
        if name not in specs and spec.rank != 1:
            raise UserError(
                f"task {task_name!r} gives no {name}, which the model needs; it gives "
                f"{', '.join(sorted(specs))}."
            )

    def fit(example: Example) -> Example:
        result, counted = {}, []
        for name, spec in wanted.items():
            values = example.get(name)
            result[name] = tf.zeros([0], spec.dtype) if values is None else values
        for name in converter.TEXTS:
            tokens = result[name]
            before = example.get(f"truncated_{name}", tf.constant(False))
            counted.append(before | (tf.shape(tokens)[0] > lengths[name]))
            result[name] = tokens[: lengths[name]]
        error = example.get("image_error", tf.constant(""))
        for name in converter.COUNTED_EMPTY:
            empty = tf.equal(tf.size(result[name]), 0)
            # Of a mixture: a task that has other objectives.
            has = name in specs and f"lacks_{name}" not in specs
            empty = tf.logical_and(empty, has)
            if metadata != example_metadata.TRAINING:
                said = example.get(f"without_{name}")
                empty = empty if said is None else said
            counted.append(tf.logical_and(empty, tf.equal(error, "")))
        result["example_flags"] = tf.cast(tf.stack([error != "", *counted]), tf.int32)
        result["image_id"] = tf.as_string(example.get("image_id", tf.constant("")))
        if metadata == example_metadata.TRAINING:
            example = {**example, "image_id": result["image_id"]}
        result["example_metadata"] = example_metadata.packed(example, metadata)
        return result

    return map_examples(examples, fit)


def as_numpy(dataset: tf.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
    """The elements of the dataset.

    Raises:
      UserError: where a preprocessor raised one, or an assertion failed, with its own
        text; TensorFlow would bury it in where it happened.
    """
    try:
        yield from cast(Iterator[dict[str, np.ndarray]], dataset.as_numpy_iterator())
    except tf.errors.OpError as error:
        _let_go_of_frames(error)
        message = _raised_text(error.message or "")
        if message is None or not isinstance(error, tf.errors.InvalidArgumentError):
            raise
        raise UserError(message) from error


def _let_go_of_frames(error: BaseException | None) -> None:
    """Frees what the frames of an error hold: TensorFlow's iterator.

    Whoever keeps the error would keep that up to the end of the program, where it
    waits for threads that Python has ended: for ever.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _raised_text(message: str) -> str | None:
    """What a preprocessor said in a TensorFlow error, None if it said nothing."""
    raised = re.search(
        r"(?:ValueError|UserError): (.*?)\nTraceback \(most recent call last\):",
        message,
        re.DOTALL,
    )
    if raised:
        return raised[1]
    failed = re.search(r"assertion failed: \[(.*)\]", message)
    return _unescaped(failed[1].replace("] [", " ")) if failed else None


def _unescaped(text: str) -> str:
    """A text as it was before TensorFlow put C's escapes into it, on one line."""
    content = codecs.escape_decode(text.encode())[0]
    return printable(content.decode(errors="backslashreplace"))
