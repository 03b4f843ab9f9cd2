"""SeqIO sources over COCO, caption and VQAv2 files and over folders of images.

`indexed_source.py` has what they share: paths, features, random access, bad records.
"""

import collections
import dataclasses
import functools
import os
import string
from collections.abc import Mapping

from vit22b_transfer import UserError
from vit22b_transfer.data.annotations import (
    coco_image_paths,
    json_list,
    missing_field,
    read_caption_lines,
    read_json,
    vqa_answers,
)
from vit22b_transfer.data.image_folders import tell_others
from vit22b_transfer.data.images import IMAGE_FORMATS
from vit22b_transfer.data.indexed_source import IndexedSource
from vit22b_transfer.data.records import (
    PathLike,
    Record,
    resolve_path,
)

# The split in which an image stands once for each of its captions.
PER_CAPTION_SPLIT = "train"
IMAGE_SUFFIXES = tuple(IMAGE_FORMATS)
_MALFORMED = "malformed entry"


@dataclasses.dataclass(frozen=True)
class CaptionFiles:
    """A caption file and the folder that its file names are relative to."""

    captions: PathLike
    images: PathLike


@dataclasses.dataclass(frozen=True)
class VqaFiles:
    """VQAv2 files; without `annotations` the questions have no answers.

    `image_file` makes a file name from an image id; VQAv2 on the 2014 images needs
    for example "COCO_val2014_{image_id:012d}.jpg". An id of digits may be a text, too.
    """

    questions: PathLike
    images: PathLike
    annotations: PathLike | None = None
    image_file: str = "{image_id:012d}.jpg"


class _CaptionSource(IndexedSource):
    """Captions grouped by image: what both caption formats have in common."""

    def _resolved(self, files: CaptionFiles) -> CaptionFiles:
        return CaptionFiles(resolve_path(files.captions), resolve_path(files.images))

    def _origin(self, files: CaptionFiles) -> str:
        return str(files.captions)

    def _grouped_records(self, split, captions, bad):
        """Records from (path, image_id, caption) in file order, whose image exists."""
        by_image = collections.defaultdict(list)
        for _, image_id, caption in captions:
            by_image[image_id].append(caption)
        references = {image: tuple(texts) for image, texts in by_image.items()}
        records = []
        for path, image_id, caption in captions:
            if split != PER_CAPTION_SPLIT:
                if image_id not in references:
                    continue  # all its captions are in the record of the first one
                texts = references.pop(image_id)
            else:
                texts = references[image_id]
            records.append(Record(path, image_id, target=caption, references=texts))
        return records


class CocoCaptionsSource(_CaptionSource):
    """COCO captions JSON with an image folder.

    In the split "train" every caption is a record; in other splits every image is one,
    with its first caption as `target`. `references` are always all captions.
    """

    def _read(self, split, files, bad):
        content = read_json(files.captions)
        kind = "COCO captions"
        images = json_list(content, "images", files.captions, kind)
        annotations = json_list(content, "annotations", files.captions, kind)
        paths = coco_image_paths(images, self._folder(files.images), bad)
        captions, seen, described = [], set(), set()
        for number, entry in enumerate(annotations):
            problem = missing_field(
                entry, id=(int, str), image_id=(int, str), caption=str
            )
            if problem:
                bad.add("malformed entry", f"annotations[{number}]: {problem}")
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
        for image_id, path in paths.items():
            if image_id not in described:
                file = "" if path is None else f" ({os.path.basename(path)})"
                bad.add("image without captions", f"image {image_id}{file}")
        return self._grouped_records(split, captions, bad)


class CaptionFileSource(_CaptionSource):
    """An image folder with a `.jsonl`, `.csv` or `.txt` file of captions.

    `annotations.read_caption_lines` describes the three formats. The file name is the
    image id. Records are made as in `CocoCaptionsSource`.
    """

    def _read(self, split, files, bad):
        folder = self._folder(files.images)
        captions, names = [], {}
        for where, file_name, caption in read_caption_lines(files.captions, bad):
            path, problem = folder.find(file_name)
            if path is None:
                bad.add(problem, f"{where}: {file_name!r} is not in {folder.root}")
            elif not caption.strip():
                bad.add("empty caption", f"{where}: {file_name}")
            else:
                # An image that is written in several ways is one, by its first name.
                name = names.setdefault(path, file_name)
                captions.append((path, name, caption.strip()))
        return self._grouped_records(split, captions, bad)


class VqaSource(IndexedSource):
    """VQAv2 questions and annotations JSON with an image folder.

    Every question is a record. `references` are the answers of all annotators, `target`
    is the one that VQA accuracy rewards most (`answers.most_rewarded`); both are empty
    where no annotations are given. `answer_type` and `question_type` are theirs.
    """

    def _resolved(self, files: VqaFiles) -> VqaFiles:
        annotations = files.annotations
        return VqaFiles(
            resolve_path(files.questions),
            resolve_path(files.images),
            None if annotations is None else resolve_path(annotations),
            files.image_file,
        )

    def _origin(self, files: VqaFiles) -> str:
        return str(files.questions)

    def _read(self, split, files, bad):
        content = read_json(files.questions)
        entries = json_list(content, "questions", files.questions, "VQAv2 questions")
        answers = None
        if files.annotations is not None:
            answers = vqa_answers(files.annotations, bad)
        folder = self._folder(files.images)
        records, seen = [], set()
        for number, entry in enumerate(entries):
            try:
                record = _vqa_record(entry, files, folder, answers)
                if record.question_id in seen:
                    name = f"question {record.question_id}"
                    raise BadEntry("duplicate question id", name)
                records.append(record)
            except BadEntry as e:
                where = f"questions[{number}]: " if e.reason == _MALFORMED else ""
                bad.add(e.reason, f"{where}{e.detail}")
            if isinstance(entry, dict):
                seen.add(str(entry.get("question_id")))
        for question_id in sorted((answers or {}).keys() - seen):
            bad.add(
                "annotation without question",
                f"question id {question_id} of {files.annotations}",
            )
        return records


class BadEntry(Exception):
    """An entry that makes no record: why, and which."""

    def __init__(self, reason, detail):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _vqa_record(entry, files, folder, answers):
    """The record of a question; BadEntry if something about it is wrong."""
    problem = missing_field(
        entry, question_id=(int, str), image_id=(int, str), question=str
    )
    if problem:
        raise BadEntry(_MALFORMED, problem)
    question_id, image_id = str(entry["question_id"]), str(entry["image_id"])
    name = f"question {question_id}"
    question = entry["question"].strip()
    if not question:
        raise BadEntry("empty question", name)
    file_name = image_file_name(files.image_file, entry["image_id"])
    path, problem = folder.find(file_name)
    if path is None:
        raise BadEntry(problem, f"{name}: {file_name} is not in {folder.root}")
    if answers is None:
        return Record(path, image_id, question_id, question)
    if question_id not in answers:
        raise BadEntry("question without answers", f"{name} in {files.annotations}")
    said = answers[question_id]
    if said.image_id != image_id:
        detail = (
            f"{name}: image {image_id} in the questions, {said.image_id} in answers"
        )
        raise BadEntry("annotation of another image", detail)
    return Record(
        path, image_id, question_id, question, said.target, said.answers, **said.kinds
    )


def image_file_name(pattern: str, image_id: int | str) -> str:
    """The file name of an image; BadEntry if its id is none for the pattern.

    Where the pattern says how the id is written, such as with zeros in front, an id of
    digits is a number: zeros would stand behind those of a text.
    """
    values: list[int | str] = [image_id]
    try:
        if _says_how(pattern):
            values.append(str(image_id))
            if isinstance(image_id, str) and image_id.isascii() and image_id.isdigit():
                values.insert(0, int(image_id))
        return _filled(pattern, values)
    except ValueError as e:
        raise BadEntry(
            "image id that does not fit image_file",
            f"{pattern!r} cannot be filled with image_id {image_id!r} ({e}); use for "
            "example '{image_id}.jpg'",
        ) from e
    except (LookupError, AttributeError) as e:
        raise UserError(
            f"image_file {pattern!r} cannot be filled with an image_id ({e!r}); use "
            "for example '{image_id}.jpg'."
        ) from e


@functools.lru_cache
def _says_how(pattern):
    """Whether a pattern says how a value is written, as in `{image_id:012d}`."""
    return any(how for _, _, how, _ in string.Formatter().parse(pattern))


def _filled(pattern, values):
    """The pattern with the first of the values that it can be filled with."""
    *others, last = values
    for value in others:
        try:
            return pattern.format(image_id=value)
        except ValueError:
            pass
    return pattern.format(image_id=last)


class ImageFolderSource(IndexedSource):
    """All images below a folder, without text, in the order of their paths.

    For inference. An image's id is its path relative to the folder. A file whose name
    is no UTF-8 is an unreadable image; its id has escapes in place of those bytes. What
    is no image is left out, counted and logged, but for names that end in one of
    `beside`, which lie there for another reader.
    """

    def __init__(
        self, split_to_folder: Mapping[str, PathLike], *, beside: tuple[str, ...] = ()
    ):
        self._beside = beside
        super().__init__(split_to_folder)

    def _origin(self, files: PathLike) -> str:
        return str(files)

    def _read(self, split, files, bad):
        folder = self._folder(files)
        records, others = [], []
        for directory, names in folder.walk():
            for name in names:
                path = os.path.join(directory, name)
                if name.lower().endswith(IMAGE_SUFFIXES):
                    image_id = os.path.relpath(path, folder.root)
                    image_id = os.fsencode(image_id).decode(errors="backslashreplace")
                    records.append(Record(path, image_id))
                elif not name.lower().endswith(self._beside):
                    others.append(path)
        tell_others(folder.root, IMAGE_SUFFIXES, others)
        return sorted(records, key=lambda record: record.image_id)
