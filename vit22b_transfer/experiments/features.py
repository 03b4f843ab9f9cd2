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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading, restoring
from vit22b_transfer.experiments import vectors as named
from vit22b_transfer.experiments.labelled import Labelled
from vit22b_transfer.host import progress
from vit22b_transfer.inference import cache_features
from vit22b_transfer.partitioning.rules import Partitioning

# Rows that are read between two looks at the progress bar.
_ROWS_SHOWN = 1000


@dataclasses.dataclass(frozen=True)
class FeatureSource:
    """A frozen tower, and where its features are kept.

    tower: a `towers.TowerConfig`. checkpoint: one that holds the tower, or a directory
      of them. directory: of the features. image_size: (height, width) in pixels.
    num_classes: None for the length of the class list of the task.
    batch_size: images that the tower is run on at a time, over all devices.
    examples_per_shard: images of a file; what a killed run loses at most.
    """

    tower: Any
    checkpoint: str
    directory: str
    partitioning: Partitioning
    image_size: Sequence[int]
    batch_size: int
    num_classes: int | None = None
    examples_per_shard: int = 1024

    def read(
        self, task: str, split: str, vectors: Sequence[str] | None
    ) -> "SplitFeatures":
        """The features of a split: those that are there, else made and kept.

        vectors: names as `vectors.VECTORS`; None for all tokens, which stay on disk.

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
        registered.task_names(task, split)
        num_classes = self.number_of_classes(task)
        key, stored = self._made(task, split, vectors, num_classes)
        layout, source = feature_cache.open_source(key)
        what = f"{task} {split}"
        rows, labels, notes = _labels(source, what)
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
            found, tuple(vectors or ()), labels, num_classes, what, notes, rows
        )

    def _made(self, task, split, vectors, num_classes) -> tuple[Any, list[str]]:
        """The key of features that are there, now at the latest; their vectors."""
        key = self._key(task, split, vectors, num_classes)
        names: list[str] = list(vectors or ())
        if _is_whole(key):
            return key, names
        for stored in _with_more(key, names):  # another probe's, these among them
            other = self._key(task, split, stored, num_classes)
            if _is_whole(other):
                return other, stored
        _check_single_labels(key.task.source, split, f"{task} {split}")
        key.check_repeatable(by_reading=True)
        tower = self._restored(key, vectors)
        cache_features.write_split(key, tower, self.examples_per_shard)
        return key, names

    def facts(self) -> dict[str, Any]:
        """What decides the features beside the data, as JSON values for a result."""
        return {
            "checkpoint": reading.resolve(self.checkpoint),
            "weights": reading.tower_digest(self.checkpoint),
            "tower": self._settings(),
            "image_size": list(self.image_size),
            "preparation": str(getattr(self.tower, "preparation", None)),
        }

    def _settings(self) -> dict[str, str]:
        pooling = {"pooling": str(getattr(self.tower, "pooling", ""))}
        return {**self.tower.token_settings(), **pooling}

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

    def _key(self, task, split, vectors, num_classes) -> Any:
        from vit22b_transfer.data import feature_cache, label_converters
        from vit22b_transfer.data import tasks as registered

        settings = self.tower.token_settings()
        if vectors is not None:
            named.check(vectors, self.tower)
            settings = {**self._settings(), "vectors": ", ".join(vectors)}
        how = getattr(self.tower, "preparation", None)
        return feature_cache.CacheKey(
            cache=feature_cache.FeatureCache(self.directory, self.checkpoint),
            task=registered.task_named(task),
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

    def _restored(self, key, vectors) -> cache_features.Encoder:
        """The tower, read into its shardings."""
        config = self.tower if vectors is not None else self.tower.without_pooling()
        shape = tuple(key.fingerprint["feature_lengths"]["images"])
        patches = config.num_tokens(*shape[:2])
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
        tower, asked = config.build(), {}
        if vectors is not None and (blocks := named.blocks_of(vectors)):
            asked["intermediates"] = blocks

        def encode(params, images):
            output: Any = tower.apply({"params": params}, images, **asked)
            if vectors is None:
                return (output.tokens,)
            return (named.stacked(output, names=tuple(vectors), patches=patches),)

        return cache_features.Encoder(
            encode,
            config.dtype,
            self.partitioning,
            read["encoder"]["tower"],
            shape,
            self.batch_size,
        )


@dataclasses.dataclass(frozen=True)
class Tokens:
    """All tokens of a split's images, on disk: `[numbers]` reads those of some images.

    shape: length and width of an image's tokens.
    """

    source: Any
    rows: Int[np.ndarray, " images"]
    shape: tuple[int, int]

    def __getitem__(
        self, numbers: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, "some length width"]:
        return np.stack([self.source.row(int(row)) for row in self.rows[numbers]])


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
    """Features and labels of the images of a split that have both.

    vectors: [images, names, width], or all tokens on disk. notes: images that were left
    out, by reason. rows: numbers of the images among all examples of the split.
    """

    vectors: Float[np.ndarray, "images names width"] | Tokens
    names: tuple[str, ...]
    labels: Int[np.ndarray, " images"]
    num_classes: int
    what: str
    notes: Mapping[str, Any]
    rows: Int[np.ndarray, " images"]

    def joined(self, names: Sequence[str]) -> Labelled:
        """The vectors of those names, one behind the other, in memory once more."""
        assert not isinstance(self.vectors, Tokens)
        places = [self.names.index(name) for name in names]
        if places == list(range(len(self.names))):
            chosen = self.vectors  # all of them, in order: no copy
        else:
            chosen = self.vectors[:, places]
        flat = chosen.reshape(len(chosen), -1)
        return Labelled(flat, self.labels, self.num_classes, self.what)


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


def _check_single_labels(source: Any, split: str, what: str) -> None:
    """Raises UserError, before the tower is run, for an image with several labels."""
    from vit22b_transfer.data.labelled_sources import LabelledSource

    if isinstance(source, LabelledSource):
        for number in range(source.num_records(split)):
            record = source.record(split, number)
            if len(record.labels) > 1:
                raise _several_labels(record.image_id, what, len(record.labels))


def _several_labels(name: str, what: str, count: int) -> UserError:
    return UserError(
        f"image {name[:200]!r} of {what} has {count} labels; a probe tells one class "
        "of each image from the others. Take a task with one label per image (without "
        "a hierarchy)."
    )


def _labels(source: Any, what: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Numbers of the examples that have an image and a label, the labels, the rest.

    Raises:
      UserError: for an image with several labels.
    """
    from vit22b_transfer.data import streams

    rows, labels = [], []
    unreadable = unlabelled = 0
    for number, example in enumerate(streams.as_numpy(source.without_tokens())):
        found = np.unique(example["labels"])
        if example.get("image_error", b""):
            unreadable += 1
        elif not len(found):
            unlabelled += 1
        elif len(found) > 1:
            name = bytes(example.get("image_id", b"")).decode(errors="backslashreplace")
            raise _several_labels(name, what, len(found))
        else:
            rows.append(number)
            labels.append(int(found[0]))
    notes = {"unreadable_images": unreadable, "images_without_label": unlabelled}
    notes = {f"{what}: {name}": count for name, count in notes.items() if count}
    return np.asarray(rows, np.int64), np.asarray(labels, np.int64), notes
