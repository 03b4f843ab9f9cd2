"""Images that a command or a recipe names: files, folders, lists of them, archives.

    images given                      become
    a.jpg                             that image
    a folder, 'photos/*/[0-9]*.png'   all images below it; those that match, sorted
    .jsonl, .csv                      one for each line: column image, image_path,
                                      file_name or path; if there, question, image_id
    .json                             COCO's `images`; or VQAv2's `questions`
    .tar                              WebDataset: its images in order; KEY.txt beside
                                      one is its question
    .parquet                          a column `image`: encoded bytes, a path, or
                                      Hugging Face's struct of both; `question`
    .tfrecord, .array_record          images inside of `tf.train.Example`s; `question`
    .jsonl of OpenAI's batches        the image and the text of each request

Nothing is ever left out: what cannot be read, or may not (a name that leads out of its
folder, an address of the network), is a line with an error in its place.
"""

import dataclasses
import glob
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence

import seqio

from vit22b_transfer import UserError
from vit22b_transfer.data import packed_images, preprocessors, text_files, vocabularies
from vit22b_transfer.data.annotations import json_list, missing_field, read_json
from vit22b_transfer.data.image_folders import ImageFolder
from vit22b_transfer.data.images import IMAGE_FORMATS
from vit22b_transfer.data.indexed_source import IndexedSource
from vit22b_transfer.data.records import (
    BadRecords,
    PathLike,
    Record,
    half_character,
    resolve_path,
)
from vit22b_transfer.data.sources import BadEntry, image_file_name
from vit22b_transfer.host import json_files

TASK, SPLIT = "given_images", "given"
IMAGE_COLUMNS = ("image", "image_path", "file_name", "path")
_QUESTION = preprocessors.QUESTION_FIELD
# Of an id, in a message.
_LONGEST_ID = 100
_LISTS = (".json", ".jsonl", ".csv", *packed_images.SUFFIXES)


class GivenImagesSource(IndexedSource):
    """The images that are given, in that order, one record each, split `given`.

    folder: that names in lists are relative to; None: the folder of each list.
    image_file: the file of an image id, as of `sources.VqaFiles`.
    asked: whether the images are asked about; else each stands once, without questions.
    question: asked of every image; "": those that the lists have.
    """

    def __init__(
        self,
        images: Sequence[PathLike],
        *,
        folder: PathLike | None = None,
        image_file: str = "{image_id:012d}.jpg",
        asked: bool = False,
        question: str = "",
        paths_outside: bool = False,
    ):
        if question and not asked:
            raise UserError(f"the question {question!a} is given, but asked is False.")
        if problem := half_character(question):
            raise UserError(f"the question {problem}.")
        if not images or isinstance(images, str):
            raise UserError(
                f"images is {images!r}; give files, folders or lists, such as "
                "('photos', 'more/*.png')."
            )
        self._images_of, self._image_file = folder, image_file
        self._asked, self._question = asked, question
        super().__init__({SPLIT: tuple(images)}, paths_outside=paths_outside)

    def _resolved(self, files):
        return tuple(os.path.expanduser(os.fspath(name)) for name in files)

    def _origin(self, files):
        return ", ".join(map(ascii, files[:3])) + (", ..." if len(files) > 3 else "")

    def digest(self) -> str:
        """A text that is equal for the same images and questions in the same order."""
        hashed = hashlib.sha256()
        records = self._load(SPLIT)
        for record in records:
            said = (record.image_path, record.image_id, record.question_id)
            said += (record.question, record.image_problem)
            hashed.update(repr(said).encode("utf-8", "surrogateescape"))
        return f"{len(records)} examples, sha256 {hashed.hexdigest()[:16]}"

    def _read(self, split, files, bad: BadRecords) -> list[Record]:
        named = [(name, record) for name in files for record in self._of(name)]
        records = [record for _, record in named]
        if not self._asked:
            once = {(r.image_path, r.image_id): _asked(r, "") for r in records}
            return list(once.values())
        if self._question:
            return [_asked(record, self._question) for record in records]
        for name, record in named:
            if not (record.question or record.image_problem):
                image = ascii(record.image_id[:_LONGEST_ID])
                raise UserError(
                    f"{_shown(name)}: image {image} has no question; give one for all, "
                    "or a list with a column question."
                )
        return records

    def _of(self, name: str) -> Iterator[Record]:
        path = resolve_path(name)
        suffix = path.suffix.lower()
        if path.is_dir():
            yield from _of_folder(self._folder(path), name)
        elif not path.exists():
            yield from self._of_pattern(name)
        elif packed_images.is_archive(path):
            for record in packed_images.records(path, beside="question"):
                yield dataclasses.replace(record, references=())
        elif suffix in IMAGE_FORMATS:
            yield Record(str(path), _shown(name))
        elif suffix in _LISTS:
            folder = resolve_path(self._images_of or path.parent)
            yield from self._of_list(path, self._folder(folder))
        else:
            raise UserError(
                f"{name!a} is neither a folder nor a file that is read: images "
                f"({', '.join(IMAGE_FORMATS)}), lists and archives "
                f"({', '.join(_LISTS)})."
            )

    def _of_pattern(self, name: str) -> Iterator[Record]:
        if not glob.has_magic(name):
            raise UserError(f"{name!a} does not exist; name a file, folder or pattern.")
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise UserError(
                f"nothing matches {name!a}; quote it if the shell reads it."
            )
        for one in found:
            known = one.lower().endswith((*IMAGE_FORMATS, *_LISTS))
            if known or os.path.isdir(one) or packed_images.is_archive(one):
                yield from self._of(one)

    def _of_list(self, path: pathlib.Path, folder: ImageFolder) -> Iterator[Record]:
        if path.suffix.lower() == ".csv":
            entries = _csv_entries(path)
        elif path.suffix.lower() == ".jsonl":
            entries = _jsonl_entries(path)
        else:
            yield from self._of_json(path, folder)
            return
        for where, offset, entry in entries:
            if packed_images.is_request(entry):
                yield packed_images.requested(path, offset, entry, folder.find)
            else:
                yield _of_entry(path, where, entry, folder)

    def _of_json(self, path: pathlib.Path, folder: ImageFolder) -> Iterator[Record]:
        content = read_json(path)
        if isinstance(content, dict) and isinstance(content.get("questions"), list):
            for number, entry in enumerate(content["questions"]):
                fields = dict(question_id=(int, str), image_id=(int, str), question=str)
                _check(path, f"questions[{number}]", missing_field(entry, **fields))
                image_id = str(entry["image_id"])
                try:
                    name = image_file_name(self._image_file, entry["image_id"])
                    record = _found(folder, name, image_id)
                except BadEntry as problem:
                    why = f"{problem.reason}: {problem.detail}"
                    record = Record("", image_id, image_problem=why)
                question_id, asked = str(entry["question_id"]), entry["question"]
                yield _asked(record, asked.strip(), question_id)
            return
        for number, entry in enumerate(json_list(content, "images", path, "COCO")):
            problem = missing_field(entry, id=(int, str), file_name=str)
            _check(path, f"images[{number}]", problem)
            yield _found(folder, entry["file_name"], str(entry["id"]))


def _shown(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


def _asked(record: Record, question: str, question_id: str = "") -> Record:
    question_id = question_id or record.question_id
    return dataclasses.replace(record, question=question, question_id=question_id)


def _found(folder: ImageFolder, name: str, image_id: str) -> Record:
    """The record of a file of a folder; of one that cannot be used, with why."""
    path, problem = folder.find(name)
    return Record(path or "", image_id, image_problem=problem and f"{name}: {problem}")


def _check(path: pathlib.Path, where: str, problem: str) -> None:
    if problem:
        raise UserError(f"{path}, {where}: {problem}. Correct the file.")


def _of_folder(folder: ImageFolder, name: str) -> Iterator[Record]:
    found = [
        os.path.join(directory, file)
        for directory, files in folder.walk()
        for file in files
        if file.lower().endswith(tuple(IMAGE_FORMATS))
    ]
    if not found:
        raise UserError(f"the folder {name!a} holds no image.")
    for path in sorted(found):
        inside = os.path.relpath(path, folder.root)
        yield Record(path, _shown(os.path.join(name, inside)))


def _jsonl_entries(path: pathlib.Path) -> Iterator[tuple[str, int, object]]:
    """(where, offset in bytes, value) of each line that is not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                value = json_files.parse(content, path, line=number)
                yield f"line {number}", offset, value
            offset += len(line)


def _csv_entries(path: pathlib.Path) -> Iterator[tuple[str, int, object]]:
    rows = text_files.csv_rows(path)
    _, header = next(rows, (1, []))
    for number, row in rows:
        _check(
            path,
            f"line {number}",
            ""
            if len(row) == len(header)
            else f"{len(row)} columns, but {len(header)} in the header",
        )
        yield f"line {number}", 0, dict(zip(header, row, strict=True))


def _of_entry(
    path: pathlib.Path, where: str, entry: object, folder: ImageFolder
) -> Record:
    columns = [
        name for name in IMAGE_COLUMNS if isinstance(entry, dict) and name in entry
    ]
    if not columns or not isinstance(entry, dict):
        raise UserError(
            f"{path}, {where}: no image is named; one of {', '.join(IMAGE_COLUMNS)} is "
            "expected in each line."
        )
    texts = {n: entry[n] for n in (columns[0], "question") if n in entry}
    ids = {n: entry[n] for n in ("image_id", "question_id") if n in entry}
    kinds: dict = dict.fromkeys(texts, str) | dict.fromkeys(ids, (int, str))
    _check(path, where, missing_field({**texts, **ids}, **kinds))
    name = entry[columns[0]]
    record = _found(folder, name, str(ids.get("image_id", name)))
    question = texts.get("question", "").strip()
    return _asked(record, question, str(ids.get("question_id", "")))


def task(
    images: Sequence[str],
    prompts: Sequence[str],
    *,
    folder: str | None = None,
    image_file: str = "{image_id:012d}.jpg",
    asked: bool = False,
    question: str = "",
    paths_outside: bool = False,
) -> str:
    """The name of a task over the images given, which is registered here.

    prompts: of which the first that fits is taken: with "{question}" in it if `asked`,
      else without. Other arguments: those of `GivenImagesSource`.

    An image that cannot be read is a line with its error. The vocabulary is the one
    that $VIT22B_VOCABULARY names. There are no targets.

    Raises:
      UserError: if an image named alone, a folder or a list is not there, or no prompt
        fits.
    """
    source = GivenImagesSource(
        images,
        folder=folder,
        image_file=image_file,
        asked=asked,
        question=question,
        paths_outside=paths_outside,
    )
    fits = [prompt for prompt in prompts if (_QUESTION in prompt) == asked]
    if not fits:
        what = "has the place" if asked else "is without the place"
        raise UserError(
            f"none of the prompts {', '.join(map(ascii, prompts))} {what} {_QUESTION} "
            f"of a question{'' if asked else ', and nothing is asked'}."
        )
    options = preprocessors.ReadingOptions(on_bad_image="skip")
    if TASK in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(TASK)
    seqio.TaskRegistry.add(
        TASK,
        # SeqIO's DataSource does not satisfy its own protocol to the letter.
        source=source,  # pyright: ignore[reportArgumentType]
        preprocessors=preprocessors.image_text_preprocessors(fits[0], options),
        output_features=preprocessors.image_text_features(
            vocabularies.from_environment()
        ),
        postprocess_fn=preprocessors.references_and_predictions,
        metric_fns=[],
    )
    return TASK
