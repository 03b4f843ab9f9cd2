"""SeqIO sources over annotation files and image folders, with random access.

Images stay on disk: a record carries a path. Paths may hold `~` and `$VARIABLES` and
are resolved when a split is first used, so constructing a source touches no file.

Every source yields examples with the same string features: `image_path`, `image_id`,
`question_id`, `question`, `target` (scalars) and `references` (a vector).
"""

import abc
import collections
import dataclasses
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data.annotations import (
    coco_image_paths,
    json_list,
    missing_field,
    read_caption_lines,
    read_json,
    vqa_answers,
)
from vit22b_transfer.data.records import (
    BadRecords,
    ImageFolder,
    PathLike,
    Record,
    check_choice,
    resolve_path,
)

BAD_RECORD_POLICIES = ("error", "skip")
IMAGE_SUFFIXES = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
)

_SCALARS = ("image_path", "image_id", "question_id", "question", "target")


@dataclasses.dataclass(frozen=True)
class CaptionFiles:
    """A caption file and the folder that its file names are relative to."""

    captions: PathLike
    images: PathLike


@dataclasses.dataclass(frozen=True)
class VqaFiles:
    """VQAv2 files; without `annotations` the questions have no answers.

    `image_file` makes a file name from an image id; VQAv2 on the 2014 images needs
    for example "COCO_val2014_{image_id:012d}.jpg".
    """

    questions: PathLike
    images: PathLike
    annotations: PathLike | None = None
    image_file: str = "{image_id:012d}.jpg"


def record_order(
    size: int, shuffle: bool, seed: int | None, shard_info: seqio.ShardInfo | None
) -> tf.data.Dataset:
    """Indices of `size` records, or of a shard of them; in order, or shuffled."""
    order = tf.data.Dataset.range(size)
    if shard_info is not None:
        order = order.shard(shard_info.num_shards, shard_info.index)
    return order.shuffle(size, seed=seed) if shuffle else order


class IndexedSource(seqio.DataSource):
    """A SeqIO source with random access over records.

    A bad record is an error that names it, or with `on_bad_record='skip'` is left out,
    counted in `report()` and logged.
    """

    def __init__(
        self, split_to_files: Mapping[str, Any], *, on_bad_record: str = "error"
    ):
        check_choice("on_bad_record", on_bad_record, BAD_RECORD_POLICIES)
        self._split_to_files = dict(split_to_files)
        self._on_bad_record = on_bad_record
        self._loaded: dict[str, tuple[Any, list[Record], dict[str, int]]] = {}
        self._tables: dict[str, tuple[list[Record], Any]] = {}
        self._lock = threading.Lock()
        super().__init__(
            splits=self._split_to_files,
            caching_permitted=False,
            performs_internal_shuffling=True,
        )

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """True: any subset of the records can be read."""
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        """One name: sharding is by record, not by file."""
        return [split]

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
        key = _resolved(files)
        with self._lock:
            if split not in self._loaded or self._loaded[split][0] != key:
                bad = BadRecords(self._on_bad_record, self._origin(key))
                records = self._read(split, key, bad)
                bad.log()
                if not records:
                    raise UserError(
                        f"{self._origin(key)}: split {split!r} has no usable record."
                    )
                self._loaded[split] = (key, records, bad.tally.counts())
            return self._loaded[split][1]

    def record(self, split: str, index: int) -> Record:
        """The record at `index` of a split."""
        return self._load(split)[index]

    def num_records(self, split: str) -> int:
        """The number of records of a split."""
        return len(self._load(split))

    def num_input_examples(self, split: str) -> int:
        """The number of records of a split; here one record is one example."""
        return self.num_records(split)

    def report(self) -> dict[str, dict[str, int]]:
        """Skipped records: split -> reason -> count, of the splits read so far."""
        return {split: dict(loaded[2]) for split, loaded in self._loaded.items()}

    def records(self, split: str, order: tf.data.Dataset) -> tf.data.Dataset:
        """One example for each record index (int64) in `order`, in that order."""
        look_up = self._table(split)
        return order.map(tf.autograph.experimental.do_not_convert(look_up))

    def _table(self, split):
        """A function from an index to the example, without Python in between.

        A tf.numpy_function would cost as much as the decoding of a small image.
        """
        records = self._load(split)
        if split not in self._tables or self._tables[split][0] is not records:
            self._tables[split] = (records, _look_up(records))
        return self._tables[split][1]

    def get_dataset(
        self,
        split: str,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused,
    ) -> tf.data.Dataset:
        """All examples of a split, or of a shard; a shuffle is over all of them."""
        del (
            unused
        )  # sequence_length, use_cached, num_epochs: of no effect in any source
        size = self.num_records(split)
        return self.records(split, record_order(size, shuffle, seed, shard_info))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._split_to_files})"


def _look_up(records):
    """The function from a record index to the example, in TensorFlow alone."""
    columns, places = [], []
    for name in (*_SCALARS, "references"):
        values = [getattr(record, name) for record in records]
        # Paths, ids and references repeat: keep each once, and where it lies.
        distinct = {value: place for place, value in enumerate(dict.fromkeys(values))}
        columns.append(list(distinct))
        places.append([distinct[value] for value in values])
    *scalars, references = columns
    scalars = [tf.constant(column) for column in scalars]
    ends = np.cumsum([0, *(len(group) for group in references)])
    texts = tf.constant([text for group in references for text in group], tf.string)
    spans = tf.constant(np.stack([ends[:-1], ends[1:]], axis=1))
    rows = tf.constant(np.array(places, np.int64).T)

    def look_up(index):
        row = tf.unstack(rows[index])
        example = {
            name: tf.gather(column, place)
            for name, column, place in zip(_SCALARS, scalars, row[:-1], strict=True)
        }
        start, end = tf.unstack(spans[row[-1]])
        example["references"] = texts[start:end]
        return example

    return look_up


def _resolved(files):
    if not isinstance(files, CaptionFiles | VqaFiles):
        return resolve_path(files)
    changes = {}
    for field in dataclasses.fields(files):
        value = getattr(files, field.name)
        if field.name != "image_file" and value is not None:
            changes[field.name] = resolve_path(value)
    return dataclasses.replace(files, **changes)


class _CaptionSource(IndexedSource):
    """Captions grouped by image: what both caption formats have in common."""

    def __init__(
        self,
        split_to_files: Mapping[str, CaptionFiles],
        *,
        per_caption_splits: Sequence[str] = ("train",),
        on_bad_record: str = "error",
    ):
        self._per_caption_splits = tuple(per_caption_splits)
        super().__init__(split_to_files, on_bad_record=on_bad_record)

    def _origin(self, files: CaptionFiles) -> str:
        return str(files.captions)

    def _records_of(self, split, captions, bad):
        """Records from (path, image_id, caption) in file order, whose image exists."""
        by_image = collections.defaultdict(list)
        for _, image_id, caption in captions:
            by_image[image_id].append(caption)
        references = {image: tuple(texts) for image, texts in by_image.items()}
        records = []
        for path, image_id, caption in captions:
            if split not in self._per_caption_splits:
                if image_id not in references:
                    continue  # all its captions are in the record of the first one
                texts = references.pop(image_id)
            else:
                texts = references[image_id]
            records.append(Record(path, image_id, target=caption, references=texts))
        return records


class CocoCaptionsSource(_CaptionSource):
    """COCO captions JSON with an image folder.

    In `per_caption_splits` every caption is a record; in other splits every image is
    one, with its first caption as `target`. `references` are always all captions.
    """

    def _read(self, split, files, bad):
        content = read_json(files.captions)
        kind = "COCO captions"
        images = json_list(content, "images", files.captions, kind)
        annotations = json_list(content, "annotations", files.captions, kind)
        paths = coco_image_paths(images, ImageFolder(files.images), bad)
        captions, seen, described = [], set(), set()
        for entry in annotations:
            problem = missing_field(
                entry, id=(int, str), image_id=(int, str), caption=str
            )
            if problem:
                bad.add("malformed entry", problem)
                continue
            name = f"annotation {entry['id']}"
            image_id = str(entry["image_id"])
            if entry["id"] in seen:
                bad.add("duplicate annotation id", name)
            elif image_id not in paths:
                bad.add(
                    "annotation without image",
                    f"{name} is about image {image_id}, which is not in 'images'",
                )
            elif not entry["caption"].strip():
                bad.add("empty caption", f"{name} of image {image_id}")
            else:
                described.add(image_id)
                if paths[image_id] is not None:
                    captions.append(
                        (paths[image_id], image_id, entry["caption"].strip())
                    )
            seen.add(entry["id"])
        for image_id in paths:
            if image_id not in described:
                bad.add("image without captions", f"image {image_id}")
        return self._records_of(split, captions, bad)


class CaptionFileSource(_CaptionSource):
    """An image folder with a `.jsonl`, `.csv` or `.txt` file of captions.

    `annotations.read_caption_lines` describes the three formats. The file name is the
    image id. Records are made as in `CocoCaptionsSource`.
    """

    def _read(self, split, files, bad):
        folder = ImageFolder(files.images)
        captions = []
        for where, file_name, caption in read_caption_lines(files.captions, bad):
            path = folder.path(file_name) if file_name.strip() else None
            if path is None:
                bad.add(
                    "missing image file",
                    f"{where}: {file_name!r} is not in {folder.root}",
                )
            elif not caption.strip():
                bad.add("empty caption", f"{where}: {file_name}")
            else:
                captions.append((path, file_name, caption.strip()))
        return self._records_of(split, captions, bad)


class VqaSource(IndexedSource):
    """VQAv2 questions and annotations JSON with an image folder.

    Every question is a record. `references` are the answers of all annotators, `target`
    is the most frequent one; both are empty where no annotations are given.
    """

    def __init__(
        self, split_to_files: Mapping[str, VqaFiles], *, on_bad_record: str = "error"
    ):
        super().__init__(split_to_files, on_bad_record=on_bad_record)

    def _origin(self, files: VqaFiles) -> str:
        return str(files.questions)

    def _read(self, split, files, bad):
        content = read_json(files.questions)
        entries = json_list(content, "questions", files.questions, "VQAv2 questions")
        answers = None
        if files.annotations is not None:
            answers = vqa_answers(files.annotations, bad)
        folder = ImageFolder(files.images)
        records, seen = [], set()
        for entry in entries:
            try:
                record = _vqa_record(entry, files, folder, answers)
                if record.question_id in seen:
                    raise _BadEntry("duplicate question id", record.question_id)
                records.append(record)
            except _BadEntry as e:
                bad.add(e.reason, e.detail)
            if isinstance(entry, dict):
                seen.add(str(entry.get("question_id")))
        for question_id in sorted((answers or {}).keys() - seen):
            bad.add(
                "annotation without question",
                f"question id {question_id} of {files.annotations}",
            )
        return records


class _BadEntry(Exception):
    def __init__(self, reason, detail):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _vqa_record(entry, files, folder, answers):
    """The record of a question; _BadEntry if something about it is wrong."""
    problem = missing_field(
        entry, question_id=(int, str), image_id=(int, str), question=str
    )
    if problem:
        raise _BadEntry("malformed entry", problem)
    question_id, image_id = str(entry["question_id"]), str(entry["image_id"])
    name = f"question {question_id}"
    question = entry["question"].strip()
    if not question:
        raise _BadEntry("empty question", name)
    file_name = _image_file(files.image_file, entry["image_id"])
    path = folder.path(file_name)
    if path is None:
        detail = f"{name}: {file_name} is not in {folder.root}"
        raise _BadEntry("missing image file", detail)
    if answers is None:
        return Record(path, image_id, question_id, question)
    if question_id not in answers:
        raise _BadEntry("question without answers", f"{name} in {files.annotations}")
    annotated_id, target, given = answers[question_id]
    if annotated_id != image_id:
        detail = f"{name}: image {image_id} in the questions, {annotated_id} in answers"
        raise _BadEntry("annotation of another image", detail)
    return Record(path, image_id, question_id, question, target, given)


def _image_file(pattern, image_id):
    try:
        return pattern.format(image_id=image_id)
    except (ValueError, KeyError, IndexError) as e:
        raise UserError(
            f"image_file {pattern!r} cannot be filled with image_id {image_id!r} "
            f"({e}); use for example '{{image_id}}.jpg'."
        ) from e


class ImageFolderSource(IndexedSource):
    """All images below a folder, without text, in the order of their paths.

    For inference. An image's id is its path relative to the folder.
    """

    def __init__(self, split_to_folder: Mapping[str, PathLike]):
        super().__init__(split_to_folder)

    def _origin(self, files: PathLike) -> str:
        return str(files)

    def _read(self, split, files, bad):
        folder = ImageFolder(files)
        records, others = [], 0
        for directory, _, names in os.walk(folder.root, followlinks=True):
            for name in names:
                path = os.path.join(directory, name)
                if name.lower().endswith(IMAGE_SUFFIXES):
                    records.append(Record(path, os.path.relpath(path, folder.root)))
                else:
                    others += 1
        if others:
            logging.getLogger(__name__).warning(
                "%s: %d files do not end in %s and are left out",
                folder.root,
                others,
                ", ".join(IMAGE_SUFFIXES),
            )
        return sorted(records, key=lambda record: record.image_id)
