"""What the sources of `sources.py` have in common: random access over records.

Images stay on disk: a record carries a path. Paths may hold `~` and `$VARIABLES` and
are resolved when a split is first used, so constructing a source touches no file.

Every source yields examples with the same string features: `image_path`, `image_id`,
`question_id`, `question`, `target` (scalars) and `references` (a vector); with several
images `image_paths` in place of the first, of labelled images `labels` (ids) as well;
where the split has any, also `answer_type`, `question_type` and `image_problem`.
"""

import abc
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import packed_images
from vit22b_transfer.data.image_folders import ImageFolder
from vit22b_transfer.data.records import (
    BAD_RECORD_POLICIES,
    SKIPPING,
    BadRecords,
    Record,
    check_choice,
    resolve_path,
)

_SCALARS = ("image_path", "image_id", "question_id", "question", "target")
_KINDS = ("answer_type", "question_type", "image_problem")


class RandomAccessSource(seqio.DataSource):
    """A SeqIO source whose examples can be read in any order; a record is an example.

    A shard or a shuffle is one of records, whatever files they lie in.
    """

    @abc.abstractmethod
    def num_records(self, split: str) -> int:
        """The number of records of a split."""

    @abc.abstractmethod
    def records(self, split: str, order: tf.data.Dataset) -> tf.data.Dataset:
        """One example for each record index (int64) in `order`, in that order."""

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """True: any subset of the records can be read."""
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        """One name: sharding is by record, not by file."""
        return [split]

    def num_input_examples(self, split: str) -> int:
        """The number of records of a split."""
        return self.num_records(split)

    def get_dataset(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused,
    ) -> tf.data.Dataset:
        """All examples of a split, or of a shard; a shuffle is over all of them."""
        # sequence_length, use_cached, num_epochs: of no effect in any source.
        del unused
        size = self.num_records(split)
        order = tf.data.Dataset.range(size)
        if shard_info is not None:
            order = order.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            order = order.shuffle(size, seed=seed)
        return self.records(split, order)


class IndexedSource(RandomAccessSource):
    """A source of `Record`s, which are read when a split is first used.

    A bad record is an error that names it, or with `on_bad_record='skip'` is left out,
    counted in `report()` and logged. A file name that leads out of its image folder is
    bad, unless `paths_outside` says that the files of this source may.
    """

    # How bad records are left out, for an error.
    _advice = SKIPPING

    def __init__(
        self,
        split_to_files: Mapping[str, Any],
        *,
        on_bad_record: str = "error",
        paths_outside: bool = False,
    ):
        check_choice("on_bad_record", on_bad_record, BAD_RECORD_POLICIES)
        self._split_to_files = dict(split_to_files)
        self._on_bad_record = on_bad_record
        self._paths_outside = paths_outside
        self._loaded: dict[str, tuple[Any, list[Record], dict[str, int]]] = {}
        self._tables: dict[str, tuple[list[Record], Any]] = {}
        self._lock = threading.Lock()
        super().__init__(
            splits=self._split_to_files,
            caching_permitted=False,
            performs_internal_shuffling=True,
        )

    def _folder(self, root: pathlib.Path) -> ImageFolder:
        return ImageFolder(root, paths_outside=self._paths_outside)

    def _resolved(self, files: Any) -> Any:
        """`files` with `~` and `$VARIABLES` replaced in its paths."""
        return resolve_path(files)

    @abc.abstractmethod
    def _origin(self, files: Any) -> str:
        """What error messages call these files."""

    @abc.abstractmethod
    def _read(self, split: str, files: Any, bad: BadRecords) -> list[Record]:
        """All good records of a split, in the order of the file."""

    def _load(self, split: str) -> list[Record]:
        check_choice("split", split, list(self._split_to_files))
        files = self._split_to_files[split]
        # The variables in the paths may change between two uses in one process.
        key = self._resolved(files)
        with self._lock:
            if split not in self._loaded or self._loaded[split][0] != key:
                bad = BadRecords(self._on_bad_record, self._origin(key), self._advice)
                records = self._read(split, key, bad)
                bad.log()
                if not records:
                    left_out = bad.tally.summary()
                    raise UserError(
                        f"{self._origin(key)}: split {split!r} has no usable record"
                        + (f"; left out: {left_out}." if left_out else ".")
                    )
                self._loaded[split] = (key, records, bad.tally.counts())
            return self._loaded[split][1]

    def survey(self, split: str) -> tuple[list[Record], dict[str, int], str]:
        """The good records of a split, and the bad ones: by reason, and in words.

        As with `on_bad_record='skip'`, whatever the policy; nothing is kept.
        """
        check_choice("split", split, list(self._split_to_files))
        files = self._resolved(self._split_to_files[split])
        bad = BadRecords("skip", self._origin(files))
        records = self._read(split, files, bad)
        return records, bad.tally.counts(), bad.tally.summary()

    def record(self, split: str, index: int) -> Record:
        """The record at `index` of a split."""
        return self._load(split)[index]

    def num_records(self, split: str) -> int:
        """The number of records of a split."""
        return len(self._load(split))

    def report(self) -> dict[str, dict[str, int]]:
        """Skipped records: split -> reason -> count, of the splits read so far."""
        return {split: dict(loaded[2]) for split, loaded in self._loaded.items()}

    def records(self, split: str, order: tf.data.Dataset) -> tf.data.Dataset:
        """One example for each record index (int64) in `order`, in that order."""
        look_up, packed = self._table(split)
        examples = order.map(tf.autograph.experimental.do_not_convert(look_up))
        if not packed:
            return examples
        read = tf.autograph.experimental.do_not_convert(_with_bytes)
        return examples.map(read, num_parallel_calls=tf.data.AUTOTUNE)

    def _table(self, split):
        """A function from an index to the example, without Python in between.

        A tf.numpy_function would cost as much as the decoding of a small image. And
        whether any image is inside of another file.
        """
        records = self._load(split)
        if split not in self._tables or self._tables[split][0] is not records:
            packed = any(packed_images.is_packed(one.image_path) for one in records)
            self._tables[split] = (records, (_look_up(records), packed))
        return self._tables[split][1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._split_to_files})"


def _look_up(records):
    """The function from a record index to the example, in TensorFlow alone."""
    lists = ["references"]
    types = {"references": tf.string, "image_paths": tf.string, "labels": tf.int32}
    for name in ("image_paths", "labels"):
        if any(getattr(record, name) for record in records):
            lists.append(name)
    kinds = [n for n in _KINDS if any(getattr(record, n) for record in records)]
    columns, places = {}, []
    for name in (*_SCALARS, *kinds, *lists):
        values = [getattr(record, name) for record in records]
        # Paths, ids and references repeat: keep each once, and where it lies.
        distinct = {value: place for place, value in enumerate(dict.fromkeys(values))}
        columns[name] = list(distinct)
        places.append([distinct[value] for value in values])
    # A name that is no UTF-8 keeps its bytes; to read it is then an error that says so.
    columns["image_path"] = [os.fsencode(path) for path in columns["image_path"]]
    scalars = {name: tf.constant(columns[name]) for name in (*_SCALARS, *kinds)}
    values_of, spans = {}, {}
    for name in lists:
        ends = np.cumsum([0, *(len(group) for group in columns[name])])
        flat = [value for group in columns[name] for value in group]
        values_of[name] = tf.constant(flat, types[name])
        spans[name] = tf.constant(np.stack([ends[:-1], ends[1:]], axis=1))
    rows = tf.constant(np.array(places, np.int64).T)

    def look_up(index):
        row = dict(zip(columns, tf.unstack(rows[index]), strict=True))
        example = {name: tf.gather(scalars[name], row[name]) for name in scalars}
        for name in lists:
            start, end = tf.unstack(spans[name][row[name]])
            example[name] = values_of[name][start:end]
        if "image_paths" in example:
            del example["image_path"]
        return example

    return look_up


def _with_bytes(example):
    """The example with `image`, what its file or archive holds, for `image_path`."""
    example = dict(example)
    problem = example.pop("image_problem", tf.constant(""))

    def read(place, known):
        if known:
            return b"", known
        try:
            return packed_images.read(os.fsdecode(place)), b""
        except UserError as error:
            return b"", str(error).encode("utf-8", "backslashreplace")

    places = [example.pop("image_path"), problem]
    image, problem = tf.numpy_function(read, places, [tf.string, tf.string])
    image.set_shape([])
    problem.set_shape([])
    return {**example, "image": image, "image_problem": problem}
