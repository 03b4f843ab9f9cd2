"""Frozen features of labelled splits: computed once, kept on disk, read by every probe.

They lie in a feature cache (`data.feature_cache`), a folder for each split and for all
that decides them: the tower's weights and configuration, the task's records and
preprocessing, the image size, which vectors. A probe with the same of all these reads
them; with anything else it makes others beside them. Stopped work goes on where it was,
and ends with the same bytes; on another number of devices they are equal but for
rounding.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading, restoring
from vit22b_transfer.experiments import split_labels
from vit22b_transfer.experiments import vectors as named
from vit22b_transfer.experiments.split_features import SplitFeatures, Tokens
from vit22b_transfer.host import progress
from vit22b_transfer.inference import cache_features, image_batches
from vit22b_transfer.models.packing import PackedImages
from vit22b_transfer.models.preparation import Preparation
from vit22b_transfer.partitioning.rules import Partitioning

# Rows that are read between two looks at the progress bar.
_ROWS_SHOWN = 1000
# Of images whose labels nobody asks for: any id is one.
_ANY_CLASSES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a task."""

    task: str
    split: str


@dataclasses.dataclass(frozen=True)
class FeatureSource:
    """A frozen tower, and where its features are kept.

    tower: a `towers.TowerConfig`. checkpoint: one that holds the tower, or a directory
      of them. directory: of the features. image_size: (height, width) in pixels.
    num_classes: None for the length of the class list of the task.
    batch_size: images that the tower is run on at a time, over all devices.
    examples_per_shard: images of a file; what a killed run loses at most.
    packing: None shows the tower images of `image_size`. With one they keep their
      shapes, of at most as many patches as an image of that size has, and `batch_size`
      counts rows of several images. Features differ by rounding from those of images
      one by one, as they do between batch sizes.
    """

    tower: Any
    checkpoint: str
    directory: str
    partitioning: Partitioning
    image_size: Sequence[int]
    batch_size: int
    num_classes: int | None = None
    examples_per_shard: int = 1024
    packing: image_batches.Packing | None = None

    def read(
        self,
        task: str,
        split: str,
        vectors: Sequence[str] | None,
        *,
        labelled: bool = True,
        change: Any = None,
        towers: dict[Any, Any] | None = None,
    ) -> "SplitFeatures":
        """The features of a split: those that are there, else made and kept.

        vectors: names as `vectors.VECTORS`; None for all tokens, which stay on disk.
        labelled: False takes every image that can be read, whatever its labels, and
          tells none of them (-1).
        change: a `data.changed_images.Change` of the pictures before the tower.
        towers: where a tower that was read is kept for further calls; by default it is
          read anew for each split that is made.

        Raises:
          UserError: for an unknown name, a wrong class list, an image with several
            labels, or if something does not fit together.
        """
        from vit22b_transfer.data import feature_cache
        from vit22b_transfer.data import tasks as registered

        if self.examples_per_shard < 1:
            raise UserError(
                f"examples_per_shard={self.examples_per_shard} must be positive."
            )
        if vectors is None:
            self.check_one_size("all tokens of each image")
        registered.task_names(task, split)
        num_classes = self.number_of_classes(task) if labelled else _ANY_CLASSES
        data = (task, split, change)
        key, stored = self._made(data, vectors, num_classes, labelled, towers)
        layout, source = feature_cache.open_source(key)
        what = _named(*data)
        ids, rows, labels, notes = split_labels.read(source, what, labelled)
        if left_out := registered.skipped_text(task, split):
            notes["left_out_of_the_split"] = left_out
        console = progress.console()
        label = f"{what}: features read"
        shape = (layout.tokens.length, layout.tokens.width)
        found: Any = Tokens(source, rows, shape)
        if vectors is not None:
            chosen = [stored.index(name) for name in vectors]
            dtype = jnp.dtype(layout.tokens.dtype)
            found = np.empty((len(rows), len(chosen), shape[1]), dtype)
            with progress.Progress(console, label, total=len(rows)) as bar:
                for place, row in enumerate(rows):
                    found[place] = source.row(int(row))[chosen]
                    if place % _ROWS_SHOWN == 0 or place + 1 == len(rows):
                        bar.show(place + 1)
        return SplitFeatures(
            found,
            tuple(vectors or ()),
            labels,
            num_classes,
            what,
            notes,
            rows,
            tuple(ids[row] for row in rows),
            tuple(ids),
        )

    def names(self, task: str, split: str) -> tuple[str, ...]:
        """Names of a split's images, no image read; none where only reading tells them.

        Those of images that cannot be read are among them.
        """
        from vit22b_transfer.data import tasks as registered
        from vit22b_transfer.data.indexed_source import IndexedSource

        registered.task_names(task, split)
        source = registered.task_named(task).source
        if not isinstance(source, IndexedSource):
            return ()
        numbers = range(source.num_records(split))
        return tuple(source.record(split, number).image_id for number in numbers)

    def _made(
        self, data, vectors, num_classes, labelled, towers
    ) -> tuple[Any, list[str]]:
        """The key of features that are there, now at the latest; their vectors."""
        task, split, change = data
        key = self._key(task, split, vectors, num_classes, change)
        names: list[str] = list(vectors or ())
        if _is_whole(key):
            return key, names
        for stored in _with_more(key, names):  # another probe's, these among them
            other = self._key(task, split, stored, num_classes, change)
            if _is_whole(other):
                return other, stored
        if labelled:
            split_labels.check_single(key.task.source, split, _named(*data))
        key.check_repeatable(by_reading=True)
        towers = {} if towers is None else towers
        kind = (tuple(key.fingerprint["feature_lengths"]["images"]), *names)
        if kind not in towers:
            towers[kind] = self._restored(key, vectors)
        cache_features.write_split(key, towers[kind], self.examples_per_shard)
        return key, names

    def identity(
        self,
        task: str,
        split: str,
        vectors: Sequence[str] | None,
        *,
        labelled: bool = True,
        change: Any = None,
    ) -> str:
        """16 hexadecimal digits of all that decides what `read` gives."""
        from vit22b_transfer.data import task_fingerprints
        from vit22b_transfer.data import tasks as registered

        registered.task_names(task, split)
        num_classes = self.number_of_classes(task) if labelled else _ANY_CLASSES
        key = self._key(task, split, vectors, num_classes, change)
        names = self.class_names(task) if labelled else None
        facts = [sorted(key.fingerprint.items()), num_classes, names]
        return task_fingerprints.digest(repr(facts))

    def facts(self) -> dict[str, Any]:
        """What decides the features beside the data, as JSON values for a result."""
        return {
            "checkpoint": reading.resolve(self.checkpoint),
            "weights": reading.tower_digest(self.checkpoint),
            "tower": self._settings(),
            "image_size": list(self.image_size),
            "preparation": str(self._preparation()),
        }

    def _settings(self) -> dict[str, str]:
        settings = {"pooling": str(getattr(self.tower, "pooling", ""))}
        if self.packing is not None:
            settings["preparation"] = str(self._preparation())
        return {**self.tower.token_settings(), **settings}

    def _preparation(self) -> Preparation | None:
        """How files become what the tower is shown; None if nothing says it."""
        how = getattr(self.tower, "preparation", None)
        return how if self.packing is None else self.packing.preparation(self.tower)

    def class_names(self, task: str) -> Sequence[str] | None:
        """Those of the task's class list, by id; None if it has none."""
        from vit22b_transfer.data import tasks as registered
        from vit22b_transfer.data.labelled_sources import LabelledSource

        source = registered.task_named(task).source
        return source.classes().names if isinstance(source, LabelledSource) else None

    def number_of_classes(self, task: str) -> int:
        """That of the class list, or as given.

        Raises:
          UserError: if there is neither, or if they differ.
        """
        names = self.class_names(task)
        listed = None if names is None else len(names)
        if listed is None:
            if self.num_classes is None:
                raise UserError(
                    f"task {task!r} has no class list, so that the number of its "
                    "classes is not known. Set NUM_CLASSES."
                )
            return self.num_classes
        if self.num_classes not in (None, listed):
            raise UserError(
                f"the class list of task {task!r} has {listed} names, but NUM_CLASSES "
                f"is {self.num_classes}. Leave NUM_CLASSES out, or give the task the "
                "list that is meant."
            )
        return listed

    def _key(self, task, split, vectors, num_classes, change=None) -> Any:
        from vit22b_transfer.data import changed_images, feature_cache, label_converters
        from vit22b_transfer.data import tasks as registered

        settings = self.tower.token_settings()
        if vectors is not None:
            named.check(vectors, self.tower)
            settings = {**self._settings(), "vectors": ", ".join(vectors)}
        how = self._preparation()
        return feature_cache.CacheKey(
            cache=feature_cache.FeatureCache(self.directory, self.checkpoint),
            task=changed_images.changed(registered.task_named(task), change),
            split=split,
            # Several labels are an error of ours, which says what to do.
            feature_lengths={"images": tuple(self.image_size), "labels": 1 << 16},
            converter_cls=functools.partial(
                label_converters.ImageLabelFeatureConverter,
                num_classes=num_classes,
                preparation=how,
            ),
            weights=reading.tower_digest(self.checkpoint),
            tower=settings,
        )

    def parameters(self, config: Any, shape: tuple[int, ...]) -> Any:
        """The tower's parameters, read into its shardings.

        config: the tower, pooling or not. shape: of an image.
        """
        images = jax.ShapeDtypeStruct((self.batch_size, *shape), jnp.uint8)
        with self.partitioning.activate():
            variables = flax.core.unfreeze(
                jax.eval_shape(config.build().init, jax.random.key(0), images)
            )
        shardings = self.partitioning.params_shardings(
            variables["params"], variables["params_axes"]
        )
        params = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=sharding
            ),
            variables["params"],
            shardings,
        )
        tree = {"encoder": {"tower": params}}
        path = reading.resolve(self.checkpoint)
        read = restoring.restore_partial(path, tree, cast=True).params
        return read["encoder"]["tower"]

    def _restored(self, key, vectors) -> cache_features.Encoder:
        """The tower, read into its shardings."""
        config = self.tower if vectors is not None else self.tower.without_pooling()
        shape = tuple(key.fingerprint["feature_lengths"]["images"])
        patches = config.num_tokens(*shape[:2])
        images: Any = image_batches.Stacked(shape)
        if self.packing is not None:
            images = self.packing.rows(patches, config.patch_size)
        params = self.parameters(config, shape)
        tower, asked = config.build(), {}
        if vectors is not None and (blocks := named.blocks_of(vectors)):
            asked["intermediates"] = blocks

        def encode(params, images):
            output: Any = tower.apply({"params": params}, images, **asked)
            if vectors is None:
                return (output.tokens,)
            if isinstance(images, PackedImages):
                return (named.stacked_of_rows(output, images, names=tuple(vectors)),)
            return (named.stacked(output, names=tuple(vectors), patches=patches),)

        mesh, rows = self.partitioning, self.batch_size
        return cache_features.Encoder(encode, config.dtype, mesh, params, images, rows)

    def check_one_size(self, what: str) -> None:
        """Raises UserError, saying that `what` needs it, if images differ in size."""
        if self.packing is not None:
            raise UserError(
                f"{what} cannot be had of images of their own shapes, which have "
                "various numbers of patches. Leave out "
                "gin_configs/runs/probe_own_shapes.gin."
            )

    def pictures(
        self, task: str, split: str, count: int
    ) -> tuple[UInt8[np.ndarray, "images height width 3"], list[str]]:
        """The first images of a split that can be read, as the tower sees them; names.

        count: examples that are looked at.
        """
        from vit22b_transfer.data import tasks as registered

        self.check_one_size("one array of pictures")
        registered.task_names(task, split)
        key = self._key(task, split, None, _ANY_CLASSES)
        found, names = [], []
        for example in key.unpacked(count):
            if not example.get("image_error", b""):
                found.append(example["images"])
                name = bytes(example.get("image_id", b""))
                names.append(name.decode(errors="backslashreplace"))
        if not found:
            raise UserError(
                f"none of the first {count} images of {task} {split} can be read."
            )
        return np.stack(found), names


def _named(task: str, split: str, change: Any) -> str:
    """What messages call the images of a split, changed or not."""
    return f"{task} {split}" + ("" if change is None else f" under {change.name}")


def _with_more(key: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """Names of the vectors of all other features that differ in having more of them."""
    from vit22b_transfer.data import feature_cache

    ours = key.fingerprint
    for path, theirs in sorted(feature_cache.fingerprints_beside(key).items()):
        tower = theirs.get("tower")
        if path == key.directory or not names or not isinstance(tower, dict):
            continue
        stored = str(tower.get("vectors", "")).split(", ")
        same = {**theirs, "tower": {**tower, "vectors": ", ".join(names)}}
        if same == ours and {*names} < {*stored}:
            yield stored


def _is_whole(key: Any) -> bool:
    """Whether all shards are there, and none was cut off."""
    from vit22b_transfer.data import feature_cache
    from vit22b_transfer.data.feature_shards import Shard

    layout = feature_cache.Layout.read(key.directory)
    paths = [] if layout is None else layout.paths(key.directory)
    if not paths or not all(map(os.path.exists, paths)):
        return False
    try:
        for path in paths:
            Shard(path)
    except UserError:  # `write_split` makes it anew
        return False
    return True
