"""Example streams: the examples of SeqIO tasks in a chosen order, from any position."""

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import example_metadata
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.converters import (
    TEXT_FEATURES,
    Example,
    Lengths,
    feature_specs,
    map_examples,
)
from vit22b_transfer.data.order import (
    HostShard,
    MixtureSchedule,
    ReadingPlan,
    stream_key,
)

logger = logging.getLogger(__name__)

_LAST_STEP = 1 << 62


class _OrderedSource(seqio.DataSource):
    """The records of another source in a given order, behind SeqIO's interface."""

    def __init__(self, source: seqio.DataSource, split: str, order: tf.data.Dataset):
        super().__init__(splits=[split], caching_permitted=source.caching_permitted)
        self._source = source
        self._order = order

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
        assert isinstance(self._source, registered.RandomAccess)
        records = self._source.records(split, self._order)
        # Known, so that preprocessors which drop or multiply examples can be told.
        cardinality = self._order.cardinality()
        return records.apply(tf.data.experimental.assert_cardinality(cardinality))


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


def _random_access(task: seqio.Task) -> registered.RandomAccess | None:
    """The task's source if the task can be given its records in any order."""
    # A subclass of Task may read in its own way, which Task.replace would lose.
    if isinstance(task.source, registered.RandomAccess) and type(task) is seqio.Task:
        return task.source
    return None


def _ordered(
    task: seqio.Task,
    split: str,
    lengths: Lengths,
    order: tf.data.Dataset,
    seed: int | None,
) -> tf.data.Dataset:
    """The task's examples of the records in `order`."""
    source = _OrderedSource(task.source, split, order)
    return task.replace(source=source).get_dataset(
        lengths,
        split=split,
        shuffle=False,
        seed=seed,
        trim_output_features=False,
        try_in_mem_cache=False,
    )


def count_examples(task: seqio.Task, split: str, lengths: Lengths) -> int:
    """Number of examples; the whole split is read if the task does not tell."""
    size = registered.num_records(task, split)
    if size is not None and _random_access(task) is not None:
        examples = numbered_examples(task, split, lengths, [range(size)])
        if examples.cardinality() == size:
            return size
    examples = _in_order(task, split, lengths)
    return sum(1 for _ in examples)


def numbered_examples(
    task: seqio.Task, split: str, lengths: Lengths, ranges: Sequence[range]
) -> tf.data.Dataset:
    """The task's examples of these numbers, which rise, in order.

    Only those are read where the source has random access and gives one example per
    record, else all of them. Numbers beyond the split are left out.
    """
    source = _random_access(task)
    if source is not None:
        size = source.num_records(split)
        ranges = [range(part.start, min(part.stop, size)) for part in ranges]

        def numbers(place: int) -> np.ndarray:
            return np.arange(ranges[place].start, ranges[place].stop, dtype=np.int64)

        order = _computed(numbers, 0, len(ranges), sum(map(len, ranges)))
        examples = _ordered(task, split, lengths, order, None)
        if examples.cardinality() == order.cardinality():
            return examples
    starts = tf.constant([part.start for part in ranges], tf.int64)
    stops = tf.constant([part.stop for part in ranges], tf.int64)

    def asked_for(*numbered: Any) -> tf.Tensor:
        return tf.reduce_any((starts <= numbered[0]) & (numbered[0] < stops))

    numbered = _in_order(task, split, lengths).enumerate().filter(asked_for)
    return numbered.map(lambda _, example: example)


def _in_order(
    task: seqio.Task, split: str, lengths: Lengths, seed: int | None = None
) -> tf.data.Dataset:
    """All examples of the task in their order."""
    return task.get_dataset(
        lengths,
        split=split,
        shuffle=False,
        seed=seed,
        trim_output_features=False,
        try_in_mem_cache=False,
    )


def _computed(
    values: Callable[[int], np.ndarray], first: int, last: int, cardinality: int
) -> tf.data.Dataset:
    """Dataset of the scalars in values(first), ..., values(last - 1), all int64."""

    @tf.autograph.experimental.do_not_convert
    def compute(step: tf.Tensor) -> tf.Tensor:
        array = tf.numpy_function(lambda s: values(int(s)), [step], tf.int64)
        return tf.ensure_shape(array, [None])

    steps = tf.data.Dataset.range(first, last).map(compute)
    return steps.unbatch().apply(tf.data.experimental.assert_cardinality(cardinality))


def train_examples(
    provider: seqio.Task | seqio.Mixture,
    split: str,
    lengths: Lengths,
    plan_for: Callable[[MixtureSchedule], ReadingPlan],
    start_step: int,
    instead: Mapping[str, seqio.Task],
) -> tf.data.Dataset:
    """This host's endless stream of `fitted` examples, from the batch of `start_step`.

    A mixture's tasks are dealt out by their rates (`order.MixtureSchedule`); its
    `sample_fn` is not used. A task whose name is in `instead` is read from that one.
    """
    tasks = list(seqio.get_subtasks(provider))
    rates = [1.0]
    if isinstance(provider, seqio.Mixture):
        _check_same_features(provider)
        rates = [provider.get_rate(task) for task in tasks]
        if min(rates) < 0 or max(rates) == 0:
            raise UserError(f"mixture {provider.name!r} has the rates {rates}.")
        tasks = [task for task, rate in zip(tasks, rates, strict=True) if rate > 0]
        rates = [rate for rate in rates if rate > 0]
    tasks = [instead.get(task.name, task) for task in tasks]
    plan = plan_for(MixtureSchedule(tuple(rates)))
    streams = []
    for member, task in enumerate(tasks):
        if "targets" not in task.output_features:
            raise UserError(f"task {task.name!r} has no targets to train on.")
        examples = _endless(task, member, split, lengths, plan, start_step)
        streams.append(fitted(examples, lengths, {}))
    if len(streams) == 1:
        return streams[0]

    def choices(step: int) -> np.ndarray:
        return plan.members(step)[0]

    choice = _computed(choices, start_step, _LAST_STEP, tf.data.INFINITE_CARDINALITY)
    return tf.data.Dataset.choose_from_datasets(streams, choice)


def _check_same_features(mixture: seqio.Mixture) -> None:
    first, *others = mixture.tasks
    for task in others:
        for name, feature in first.output_features.items():
            if task.output_features[name] != feature:
                raise UserError(
                    f"tasks {first.name!r} and {task.name!r} of mixture "
                    f"{mixture.name!r} differ in feature {name!r} (vocabulary, EOS, "
                    f"dtype or rank): {feature} and {task.output_features[name]}."
                )


def _endless(
    task: seqio.Task,
    member: int,
    split: str,
    lengths: Lengths,
    plan: ReadingPlan,
    start_step: int,
) -> tf.data.Dataset:
    """The examples of `member` in this host's rows, reshuffled every epoch."""
    source = _random_access(task)
    size = source.num_records(split) if source else 0

    def order_from(step: int) -> tf.data.Dataset:
        key = stream_key(plan.seed, task.name)

        def records(step: int) -> np.ndarray:
            return plan.records(step, member, size, key)

        return _computed(records, step, _LAST_STEP, tf.data.INFINITE_CARDINALITY)

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
        examples = _ordered(task, split, lengths, order_from(0), plan.seed)
    else:
        order = order_from(start_step)
        examples = _ordered(task, split, lengths, order, plan.seed)
        if examples.cardinality() == order.cardinality():
            return examples
        reason = "its preprocessors do not give one example per record"
        examples = _ordered(task, split, lengths, order_from(0), plan.seed)
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
) -> tuple[tf.data.Dataset, int | None]:
    """One pass over the task's examples in order, and the number there are, or None.

    With a number, the examples are this host's rows of batches that begin at
    `start_index`. With None (no random access, or not one example per record) they are
    all rows from `start_index` on, whatever the host.
    """
    seed = 0 if draws_random_numbers(task) else None
    source = _random_access(task)
    if source is not None and seed is None:
        size, rows = source.num_records(split), shard.rows(batch_size)

        def records(batch: int) -> np.ndarray:
            start = start_index + batch * batch_size
            stop = min(start + rows.stop, size)
            return np.arange(start + rows.start, stop, dtype=np.int64)

        whole, rest = divmod(max(0, size - start_index), batch_size)
        mine = whole * len(rows) + min(max(0, rest - rows.start), len(rows))
        order = _computed(records, 0, whole + 1, mine)
        examples = _ordered(task, split, lengths, order, seed)
        if examples.cardinality() == order.cardinality():
            return examples, size
    return _in_order(task, split, lengths, seed).skip(start_index), None


def fitted(
    examples: tf.data.Dataset,
    lengths: Lengths,
    metadata: Mapping[str, tf.TensorSpec],
) -> tf.data.Dataset:
    """The features in `lengths`, texts trimmed to theirs, and what else batches need.

    A text counts as truncated if it is here, or if the task says that it was
    (`truncated_inputs`, `truncated_targets`).

    Adds `image_id` (for error messages), `example_flags` (int32, one per name in
    `FLAGS`) and `example_metadata` (one string per feature that `metadata` names).
    A text feature that the task does not have becomes an empty text.
    """
    specs = feature_specs(examples)

    def fit(example: Example) -> Example:
        empty = tf.zeros([0], tf.int32)
        result = {name: example[name] for name in lengths if name in specs}
        truncated = []
        for name in TEXT_FEATURES:
            tokens = example.get(name, empty)
            before = example.get(f"truncated_{name}", tf.constant(False))
            truncated.append(before | (tf.shape(tokens)[0] > lengths[name]))
            result[name] = tokens[: lengths[name]]
        error = example.get("image_error", tf.constant(""))
        result["example_flags"] = tf.cast(tf.stack([*truncated, error != ""]), tf.int32)
        result["image_id"] = tf.as_string(example.get("image_id", tf.constant("")))
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
    except tf.errors.InvalidArgumentError as error:
        message = _own_text(error.message)
        if message is None:
            raise
        raise UserError(message) from error


def _own_text(message: str) -> str | None:
    """What our code said in the message of a TensorFlow error, None if nothing."""
    raised = re.search(
        r"(?:ValueError|UserError): (.*?)\nTraceback \(most recent call last\):",
        message,
        re.DOTALL,
    )
    if raised:
        return raised[1]
    failed = re.search(r"assertion failed: \[(.*)\]", message)
    return failed[1].replace("] [", " ") if failed else None
