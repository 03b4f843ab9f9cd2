"""A frozen tower run once over the splits of a training, its tokens kept on disk.

Or the teacher of a distillation, and its logits.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import identity, reading, restoring
from vit22b_transfer.host import disk_errors, locks, progress
from vit22b_transfer.inference import image_batches
from vit22b_transfer.models import int8
from vit22b_transfer.models.classifier import ClassificationModel
from vit22b_transfer.partitioning import processes
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import inputs
from vit22b_transfer.training.state import abstract_variables


@dataclasses.dataclass(frozen=True)
class CachedSplit:
    """What was done for one task and split.

    num_encoded: images that tower or teacher was run on by this process, in this call.
    num_shards: all of them; num_kept: those that earlier calls had finished.
    """

    directory: str
    num_examples: int
    num_encoded: int
    num_shards: int
    num_kept: int


def cache_features(
    model: Any,
    *,
    partitioning: Partitioning,
    data: Any,
    eval_data: Any = None,
    examples_per_shard: int = 256,
) -> list[CachedSplit]:
    """Writes the features that training with this `data` and `eval_data` reads.

    data, eval_data: `inputs.TrainData` and `inputs.EvalData` with one and the same
      `cache`, or with one and the same `teacher_cache`. examples_per_shard: hosts
      share out whole shards, and a killed process loses one at most; a split that was
      begun keeps its size.

    Shards that are there already are kept, so that what was stopped goes on, on any
    number of hosts. Each distinct image is encoded and stored once by each host.

    Raises:
      UserError: if a task draws random numbers, something does not fit together, or
        another process is caching the same split.
    """
    identity.show_vocabulary(model)
    if examples_per_shard < 1:
        raise UserError(f"examples_per_shard={examples_per_shard} must be positive.")
    splits = [(data, data.task)]
    if eval_data is not None:
        splits += [(eval_data, task) for task in eval_data.tasks]
    caches = [(part.cache, part.teacher_cache) for part, _ in splits]
    if caches.count(caches[0]) < len(caches) or caches[0].count(None) != 1:
        raise UserError(
            "data and eval_data must have the same cache to write features to, or the "
            "same teacher_cache; include gin_configs/runs/cached_features.gin or "
            "gin_configs/runs/distill_cached.gin."
        )
    of_teacher = data.teacher_cache is not None
    cache = data.teacher_cache if of_teacher else data.cache
    keys_of = inputs.teacher_keys if of_teacher else inputs.cache_keys
    restore = frozen_teacher if of_teacher else frozen_tower
    keys = []
    for part, name in splits:
        found = keys_of(cache, model, name, part.split, part.feature_lengths)
        keys += [(key, part.batch_size) for key in found]
    for key, _ in keys:  # all of them, before hours of work on the first
        key.check_repeatable(by_reading=True)
    encoders, results = {}, []
    for key, batch_size in keys:
        image_shape = tuple(key.fingerprint["feature_lengths"]["images"])
        batch = (image_shape, batch_size)
        if batch not in encoders:
            encoders[batch] = restore(model, partitioning, cache, *batch)
        results.append(write_split(key, encoders[batch], examples_per_shard))
    return results


def write_split(key: Any, encoder: "Encoder", examples_per_shard: int) -> CachedSplit:
    """Writes the shards of one split that are not there yet.

    key: its `feature_cache.CacheKey`, of what the encoder gives.
    """
    with contextlib.ExitStack() as stack:
        kept = functools.partial(_kept, key.directory)
        stack.enter_context(disk_errors.said(key.directory, kept))
        if jax.process_index() == 0:
            os.makedirs(key.directory, exist_ok=True)
            stack.enter_context(locks.held(key.directory))
        processes.wait_for_all("features locked")
        return _cache_split(key, encoder, examples_per_shard)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What is run on each image, on a mesh, in batches of `batch_size` rows.

    encode: of parameters and images gives the arrays that are stored of each image, the
      first of them [batch, length, width], or of rows with several images to a row
      [batch, images, length, width]; dtype: what they are read back in. images: how
      they become a batch.
    """

    encode: Callable[[Any, Any], tuple[Any, ...]]
    dtype: Any
    partitioning: Partitioning
    params: Any
    images: image_batches.BatchFormat
    batch_size: int

    @functools.cached_property
    def _compiled(self):
        sharding = self.partitioning.batch_sharding
        images = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (self.batch_size, *x.shape[1:]), x.dtype, sharding=sharding(x.ndim)
            ),
            self.images.batch(1).arrays,
        )
        with self.partitioning.activate():
            shapes = jax.eval_shape(self.encode, self.params, images)
            out_shardings = tuple(sharding(leaf.ndim) for leaf in shapes)
            jitted = jax.jit(self.encode, out_shardings=out_shardings)
            return jitted.lower(self.params, images).compile(), shapes[0].shape

    @property
    def token_shape(self) -> tuple[int, int]:
        """Length and width of what is stored of an image."""
        return self._compiled[1][-2:]

    def __call__(self, images: Any) -> tuple[jax.Array, ...]:
        """What is stored of a device batch, as `images` gives it."""
        return self._compiled[0](self.params, images)


def frozen_tower(
    model: Any,
    partitioning: Partitioning,
    cache: Any,
    image_shape: tuple[int, ...],
    batch_size: int,
) -> Encoder:
    """Tokens of the tower that a `FeatureCache` names, or their int8 values and scales.

    It is read into its shardings, in the model's dtypes: a checkpoint in float32 serves
    a tower that is kept in bfloat16.
    """
    batch = {
        "encoder_input_images": np.empty((batch_size, *image_shape), np.uint8),
        "encoder_input_tokens": np.empty((batch_size, 1), np.int32),
        "decoder_input_tokens": np.empty((batch_size, 1), np.int32),
    }
    params = abstract_variables(model, partitioning, batch)
    abstract = {"encoder": {"tower": params["encoder"]["tower"]}}
    path = reading.resolve(cache.tower)
    read = restoring.restore_partial(path, abstract, cast=True).params
    config = model.module.tower.without_pooling()
    tower = config.build()

    def encode(params, images):
        output: Any = tower.apply({"params": params}, images)
        if cache.storage == "int8":  # a scale for each token
            return int8.quantized(output.tokens, axis=-1)
        return (output.tokens,)

    params = read["encoder"]["tower"]
    images = image_batches.Stacked(image_shape)
    return Encoder(encode, config.dtype, partitioning, params, images, batch_size)


def frozen_teacher(
    model: Any,
    partitioning: Partitioning,
    cache: Any,
    image_shape: tuple[int, ...],
    batch_size: int,
) -> Encoder:
    """Logits of the teacher that a `TeacherCache` names, as one token of each image.

    Raises:
      UserError: unless its checkpoint is of a classifier like the model's teacher.
    """
    teacher = ClassificationModel(model.teacher)
    batch = {"encoder_input_images": np.empty((batch_size, *image_shape), np.uint8)}
    abstract = abstract_variables(teacher, partitioning, batch)
    params = restoring.restore_whole(reading.resolve(cache.teacher), abstract)

    def encode(params, images):
        logits: Any = teacher.module.apply({"params": params}, images)
        return (logits[:, None],)

    images = image_batches.Stacked(image_shape)
    return Encoder(encode, np.float32, partitioning, params, images, batch_size)


def _cache_split(key: Any, encoder: Encoder, examples_per_shard: int) -> CachedSplit:
    """Writes the shards that are missing."""
    from vit22b_transfer.data import feature_cache, placement

    place = placement.Placement.on(encoder.partitioning, encoder.batch_size)
    layout = feature_cache.Layout.read(key.directory)
    processes.wait_for_all("features looked")
    if layout is None:
        length, width = encoder.token_shape
        tokens = feature_cache.TokenFormat(
            length, width, jnp.dtype(encoder.dtype).name, key.cache.storage
        )
        layout = feature_cache.Layout(
            key.num_examples(), examples_per_shard, tokens, key.stored_features()
        )
        if jax.process_index() == 0:
            layout.write(key)
    paths = layout.paths(key.directory)
    if jax.process_index() == 0:
        layout.remove_unfinished(key.directory)
        _remove_damaged(paths)
    processes.wait_for_all("features began")
    known, missing = _scan_shards(paths)
    processes.wait_for_all("features shared out")
    shard = place.shard
    mine = [number for number in missing if number % shard.count == shard.index]
    console = progress.console(quiet=jax.process_index() > 0)
    num_kept = len(paths) - len(missing)
    if num_kept:
        console.print(
            f"{key.directory}: {num_kept} of {len(paths)} shards are there",
            markup=False,
        )
    work = _Work(key, layout, paths, mine, known, place, encoder.images)
    label = f"{key.task.name} {key.split}"
    total = sum(len(layout.ranges[number]) for number in mine)
    if missing:
        with progress.Progress(console, label, total=total) as bar:
            for images in _in_lockstep(work.batches(), work.no_images):
                images = image_batches.on_devices(place, images)
                work.take(_local_rows(encoder(images)))
                bar.show(work.num_done)
    processes.wait_for_all("features written")
    console.print(
        f"{layout.num_examples} examples in {key.directory}, {len(paths)} shards; "
        f"the {key.cache.encoder} was run on {work.num_encoded} images",
        markup=False,
    )
    return CachedSplit(
        key.directory, layout.num_examples, work.num_encoded, len(paths), num_kept
    )


def _kept(directory: str) -> str:
    """Half a sentence on what a run that starts now goes on from."""
    from vit22b_transfer.data import feature_cache

    layout = feature_cache.Layout.read(directory)
    paths = [] if layout is None else layout.paths(directory)
    count = sum(map(os.path.exists, paths))
    return f"{count} of {len(paths)} shards are kept"


def _remove_damaged(paths: Sequence[str]) -> None:
    """Removes shards that were cut off, for them to be made anew."""
    from vit22b_transfer.data.feature_shards import Shard

    for path in filter(os.path.exists, paths):
        try:
            Shard(path)
        except ValueError:
            os.remove(path)


def _scan_shards(paths: Sequence[str]) -> tuple[set[str], list[int]]:
    """Images of which there are tokens, and the numbers of the missing shards."""
    from vit22b_transfer.data.feature_shards import Shard

    there = [path for path in paths if os.path.exists(path)]
    known = {image for path in there for image in Shard(path).rows}
    return known, [n for n, path in enumerate(paths) if path not in there]


class _Work:
    """One host's shards: batches of images to encode, and what becomes of the tokens.

    Images that some whole shard has, or an earlier one of this call, are not encoded.
    """

    def __init__(self, key, layout, paths, mine, known, place, form):
        self._key, self._layout, self._paths = key, layout, paths
        self._mine, self._known, self._writes = mine, known, place.reports
        self._num_rows, self._form = len(place.shard.rows(place.batch_size)), form
        self._writer = None
        self._pending, self._places = [], []
        self.num_done = self.num_encoded = 0

    def no_images(self) -> Any:
        """This host's rows of a batch without an image."""
        return self._form.batch(self._num_rows).arrays

    def batches(self) -> Iterator[Any]:
        """This host's rows of each batch; `take` has to be called between them."""
        from vit22b_transfer.data.feature_shards import ShardWriter, image_hash

        ranges = [self._layout.ranges[number] for number in self._mine]
        examples = self._key.examples(ranges) if ranges else iter(())
        for number, part in zip(self._mine, ranges, strict=True):
            self._writer = ShardWriter(self._paths[number]) if self._writes else None
            shown, batch = [], self._form.batch(self._num_rows)
            for example_number in part:
                example = next(examples)
                pixels = example["images"]
                image = image_hash(pixels, varied=self._form.varied)
                if self._key.cache.holds_examples:
                    shown.append((image, example["packed"]))
                if image not in self._known:
                    self._known.add(image)
                    name = f"the image of example {example_number}"
                    if not batch.add(pixels, name):
                        yield self._filled(batch)
                        batch = self._form.batch(self._num_rows)
                        batch.add(pixels, name)
                    self._pending.append(image)
                self.num_done += 1
            if batch.places:
                yield self._filled(batch)
            if self._writer is not None:
                self._writer.finish(shown)

    def _filled(self, batch):
        self._places = batch.places
        return batch.arrays

    def take(self, rows: tuple[np.ndarray, ...]) -> None:
        """Stores the tokens of the last batch."""
        for place, image in zip(self._places, self._pending, strict=True):
            if self._writer is not None:
                row = b"".join(np.ascontiguousarray(x[place]).tobytes() for x in rows)
                self._writer.add_row(image, row)
        self.num_encoded += len(self._pending)
        self._pending, self._places = [], []


def _in_lockstep(batches: Iterator[Any], no_images: Callable[[], Any]) -> Iterator[Any]:
    """The batches, and empty ones while other hosts have more: all take each step."""
    while True:
        batch = next(batches, None)
        busy = batch is not None
        if jax.process_count() > 1:
            busy = multihost_utils.process_allgather(np.array(busy)).any()
        if not busy:
            return
        yield no_images() if batch is None else batch


def _local_rows(arrays: Sequence[jax.Array]) -> tuple[np.ndarray, ...]:
    """This host's rows of each array."""
    if jax.process_count() == 1:
        return jax.device_get(tuple(arrays))
    local = []
    for array in arrays:
        by_start = {
            shard.index[0].start or 0: shard.data for shard in array.addressable_shards
        }
        parts = [np.asarray(by_start[start]) for start in sorted(by_start)]
        local.append(np.concatenate(parts))
    return tuple(local)
