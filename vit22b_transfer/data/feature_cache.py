"""Tokens of a frozen tower on disk, as a source of the same task.

A cache directory has a directory for each task, split and fingerprint. The fingerprint
is all that decides the tokens and texts in it: the tower's weights and configuration,
the task's records and preprocessing, the shapes, the storage. What does not match it is
refused, not read.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import streams
from vit22b_transfer.data.converters import (
    ImageFeatureConverter,
    Lengths,
    Spec,
    feature_specs,
    map_examples,
)
from vit22b_transfer.data.feature_shards import (
    STORAGES,
    Shard,
    ShardsSource,
    TokenFormat,
    pack,
    read_layout,
    unfinished,
)
from vit22b_transfer.data.numbered_examples import count_examples, numbered_examples
from vit22b_transfer.data.records import check_choice
from vit22b_transfer.data.task_fingerprints import described, digest, records_digest
from vit22b_transfer.host import whole_files

# Examples that are read twice, to see whether they are the same.
_COMPARED = 16


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """Where cached features lie, and which tower they are of.

    tower: a checkpoint that holds the tower. storage: see `TokenFormat`; int8 takes a
      quarter of float32's space.
    """

    # What it holds, what is run for it, and what to do instead: for messages.
    what: ClassVar[str] = "cached features"
    encoder: ClassVar[str] = "tower"
    instead: ClassVar[str] = "Train with the tower (leave out cached_features.gin)"
    # Behind a task and split in the names of its directories.
    suffix: ClassVar[str] = ""
    # Whether it is read in place of the task, so that its examples are in it.
    holds_examples: ClassVar[bool] = True

    directory: str
    tower: str
    storage: str = "exact"

    def __post_init__(self):
        check_choice("storage", self.storage, STORAGES)


@dataclasses.dataclass(frozen=True)
class CacheKey:
    """A split of one task, and all that decides what is cached of it.

    cache: a `FeatureCache`, or a `teacher_cache.TeacherCache`. weights: a hash of those
      of the tower, or of the teacher. tower: its configuration.
    """

    cache: Any
    task: seqio.Task
    split: str
    feature_lengths: Lengths
    converter_cls: Callable[..., ImageFeatureConverter]
    weights: str
    tower: Mapping[str, str]

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the content of the cache, as plain JSON values."""
        converter = self.converter_cls(pack=False)
        shapes = converter.shapes(self.feature_lengths)
        return {
            "weights": self.weights,
            "tower": dict(self.tower),
            "task": self.task.name,
            "split": self.split,
            "records": records_digest(self.task, self.split),
            "preprocessing": digest(described(self.task)),
            "feature_lengths": {"images": list(shapes["images"])}
            | {name: self.feature_lengths[name] for name in converter.TEXTS},
            "storage": self.cache.storage,
        }

    @property
    def directory(self) -> str:
        """Where the shards lie: a name for each fingerprint."""
        key = digest(json.dumps(self.fingerprint, sort_keys=True))
        root = os.path.abspath(os.path.expanduser(self.cache.directory))
        return os.path.join(root, f"{_stem(self)}-{key}")

    def check_repeatable(self, *, by_reading: bool) -> None:
        """Raises UserError if the task gives other examples each time it is read.

        Only reading some twice shows randomness that does not come from SeqIO's seeds.
        """
        found = streams.draws_random_numbers(self.task)
        if by_reading and not found:
            first = [range(_COMPARED)]
            once, again = (
                [digest(repr(example)) for example in self.examples(first)]
                for _ in range(2)
            )
            found = once != again
        if found:
            raise UserError(
                f"task {self.task.name!r} draws random numbers in its preprocessors, "
                "such as for crops or flips: every epoch shows other images, and a "
                f"cache is of the same ones. {self.cache.instead}, or register a task "
                "without the augmentation."
            )

    def dataset(self, ranges: Sequence[range]) -> tf.data.Dataset:
        """Pixels `images` and everything else `packed`, of the numbered examples."""
        examples = numbered_examples(self.task, self.split, self._lengths, ranges)
        return map_examples(
            examples,
            lambda example: {
                "images": example["images"],
                "packed": pack(_without_images(example)),
            },
        )

    def examples(self, ranges: Sequence[range]) -> Iterator[dict[str, np.ndarray]]:
        """The elements of `dataset`."""
        return streams.as_numpy(self.dataset(ranges).prefetch(tf.data.AUTOTUNE))

    def unpacked(self, count: int) -> Iterator[dict[str, np.ndarray]]:
        """The first examples as the task gives them, `images` among their features."""
        ranges = [range(count)]
        examples = numbered_examples(self.task, self.split, self._lengths, ranges)
        return streams.as_numpy(examples)

    def stored_features(self) -> dict[str, tuple[str, list[int | None]]]:
        """dtype and shape of each feature in a packed example, if it holds some."""
        if not self.cache.holds_examples:
            return {}
        examples = numbered_examples(self.task, self.split, self._lengths, [range(1)])
        return {
            name: (spec.dtype.name, spec.shape.as_list() if spec.shape.rank else [])
            for name, spec in _without_images(feature_specs(examples)).items()
        }

    def num_examples(self) -> int:
        """Number of examples; a task that does not tell is read to count them."""
        return count_examples(self.task, self.split, self._lengths)

    @property
    def _lengths(self) -> Lengths:
        """Those with which the task makes images as the tower takes them."""
        return self.converter_cls(pack=False).prepared(self.feature_lengths)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What `layout.json` says of the shards beside it; written before any of them."""

    num_examples: int
    examples_per_shard: int
    tokens: TokenFormat
    features: Mapping[str, Sequence[Any]]

    @property
    def ranges(self) -> list[range]:
        """The examples of each shard."""
        size = self.examples_per_shard
        return [
            range(start, min(start + size, self.num_examples))
            for start in range(0, self.num_examples, size)
        ]

    def paths(self, directory: str) -> list[str]:
        """Where the shards lie."""
        count = len(self.ranges)
        return [
            os.path.join(directory, f"{number:05d}-of-{count:05d}.array_record")
            for number in range(count)
        ]

    def write(self, key: CacheKey) -> None:
        """Writes it, with the fingerprint, into the directory."""
        os.makedirs(key.directory, exist_ok=True)
        content = dataclasses.asdict(self) | {"fingerprint": key.fingerprint}
        path = _layout_path(key.directory)
        with whole_files.replacing(path) as file:
            json.dump(content, file, indent=1)

    def remove_unfinished(self, directory: str) -> None:
        """Removes what killed processes left; hold the lock of the directory."""
        whole_files.remove_unfinished(_layout_path(directory))
        for path in self.paths(directory):
            with contextlib.suppress(FileNotFoundError):
                os.remove(unfinished(path))

    @classmethod
    def read(cls, directory: str) -> "Layout | None":
        """The layout in a directory, None if there is none."""
        content = _read_layout(directory)
        if content is None:
            return None
        del content["fingerprint"]
        content["tokens"] = TokenFormat(**content["tokens"])
        return cls(**content)


@dataclasses.dataclass(frozen=True)
class CachedTasks:
    """Tasks by name that give cached tokens as their `images`, in place of others.

    converter_cls: of their batches, with `encoder_input_features`.
    """

    tasks: Mapping[str, seqio.Task]
    tokens: TokenFormat
    converter_cls: type[ImageFeatureConverter]

    def lengths(self, lengths: Lengths) -> Lengths:
        """The feature lengths, with that of the tokens in place of the pixels'."""
        return {**lengths, "images": (self.tokens.length, self.tokens.width)}


@functools.cache
def _tokens_converter(
    kind: type[ImageFeatureConverter], dtype: str
) -> type[ImageFeatureConverter]:
    """The converter of tasks whose `images` are tokens [length, width] in `dtype`."""
    spec, name = Spec(dtype=tf.as_dtype(dtype), rank=2), "encoder_input_features"
    features = dict(kind.MODEL_FEATURES)
    del features[kind.IMAGES]

    class TokensConverter(kind):
        """Converter of tokens of a tower in place of images."""

        TASK_FEATURES = {**kind.TASK_FEATURES, "images": spec}
        MODEL_FEATURES = {name: spec, **features}
        IMAGES = name

        def image_shape(self, length: Any) -> tuple[int, ...]:
            """Shape of the tokens, which is their feature length."""
            return tuple(length)

    return TokensConverter


def open_tasks(keys: Sequence[CacheKey]) -> CachedTasks:
    """The tasks, to be read from their caches.

    Raises:
      UserError: if a cache is missing, unfinished, cut off, or made with something
        else, and then with what.
    """
    layouts = []
    tasks = {}
    for key in keys:
        key.check_repeatable(by_reading=False)
        layout, source = open_source(key)
        images = seqio.ContinuousFeature(dtype=tf.as_dtype(layout.tokens.dtype), rank=2)
        features = {**key.task.output_features, "images": images}
        tasks[key.task.name] = key.task.replace(
            source=source, preprocessors=[], output_features=features
        )
        layouts.append(layout)
    kind = type(keys[0].converter_cls(pack=False))
    tokens = layouts[0].tokens
    return CachedTasks(tasks, tokens, _tokens_converter(kind, tokens.dtype))


def open_source(key: CacheKey) -> tuple[Layout, ShardsSource]:
    """What is cached for a key, as `open_tasks` reads it; the same errors."""
    layout, shards = open_shards(key)
    specs = {
        name: tf.TensorSpec(shape, tf.as_dtype(dtype))
        for name, (dtype, shape) in layout.features.items()
    }
    return layout, ShardsSource(key.split, shards, layout.tokens, specs)


def open_shards(key: CacheKey) -> tuple[Layout, list[Shard]]:
    """What was cached for the key.

    Raises:
      UserError: if it is missing, unfinished, cut off, or made with something else, and
        then with what.
    """
    layout = Layout.read(key.directory)
    if layout is None:
        raise UserError(_why_not(key))
    paths = layout.paths(key.directory)
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UserError(
            f"the {key.cache.what} in {key.directory} lack {len(missing)} of "
            f"{len(paths)} shards, such as {os.path.basename(missing[0])}. Run `vit22b "
            "cache-features` again: it goes on where it was."
        )
    return layout, [Shard(path) for path in paths]


def _why_not(key: CacheKey) -> str:
    """Why there is no cache for the key: none at all, or a stale one."""
    what = f"task {key.task.name!r}, split {key.split!r}"
    root = os.path.dirname(key.directory)
    stale = fingerprints_beside(key)
    if not stale:
        return (
            f"there are no {key.cache.what} of {what} in {root}; write them with "
            "`vit22b cache-features` and the same arguments."
        )
    lines = []
    for path, theirs in sorted(stale.items()):
        differing = _differences(theirs, key.fingerprint)
        lines.append(f"{os.path.basename(path)}: {'; '.join(differing)}")
    listed = "\n  ".join(lines)
    return (
        f"the {key.cache.what} of {what} in {root} are stale: they were made with "
        f"something else:\n  {listed}\nWrite them anew with `vit22b cache-features` "
        "and the same arguments, or train with what they were made with."
    )


def fingerprints_beside(key: CacheKey) -> dict[str, dict[str, Any]]:
    """Directory and fingerprint of all that is cached of the same task and split."""
    root = os.path.dirname(key.directory)
    names = os.listdir(root) if os.path.isdir(root) else []
    pattern = re.escape(_stem(key)) + "-[0-9a-f]{16}"
    others = [os.path.join(root, name) for name in names if re.fullmatch(pattern, name)]
    found = {path: _read_layout(path) for path in others}
    return {path: content["fingerprint"] for path, content in found.items() if content}


def _differences(theirs, ours, outer=""):
    differing = []
    for name in {**ours, **theirs}:
        value, other = ours.get(name), theirs.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            differing += _differences(other, value, f"{name}.")
        elif other != value:
            differing.append(f"{outer}{name} ({other!r} there, {value!r} here)")
    return differing


def _stem(key):
    parts = (key.task.name, key.split)
    return "-".join(re.sub(r"[^\w.+]+", "_", p) for p in parts) + key.cache.suffix


def _layout_path(directory):
    return os.path.join(directory, "layout.json")


def _read_layout(directory):
    path = _layout_path(directory)
    if not os.path.isfile(path):
        return None
    return read_layout(path)


def _without_images(example: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored as it is: all but pixels, encoded or not."""
    return {k: v for k, v in example.items() if k not in ("image", "images")}
