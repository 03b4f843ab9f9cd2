"""Annotation files: COCO captions, VQAv2, and captions listed beside an image folder.

Problems of a whole file (missing, empty, malformed) are always errors; problems of
single entries go to a `BadRecords`, which raises or counts them.
"""

import os
import pathlib
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from vit22b_transfer import UserError
from vit22b_transfer.data import answers, question_kinds, text_files
from vit22b_transfer.data.image_folders import ImageFolder
from vit22b_transfer.data.records import (
    BadRecords,
    PathLike,
    half_character,
    resolve_path,
)
from vit22b_transfer.host import json_files

# Of a bad entry, which may be of any size, depth and type.
_REPR = reprlib.Repr()
_REPR.maxdict, _REPR.maxlist, _REPR.maxlevel = 8, 4, 3
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
# One of them is the text of an entry of COCO's captions or of VQAv2.
_TEXT_FIELDS = ("caption", "question", "multiple_choice_answer")


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file; UserError as `json_files.parse`, or if it is none."""
    return json_files.parse(text_files.read_bytes(path), path)


def json_list(content: Any, key: str, path: pathlib.Path, kind: str) -> list:
    """The list under `key` of a JSON object; UserError saying what was found."""
    if isinstance(content, dict) and isinstance(content.get(key), list):
        return content[key]
    found = "no JSON object"
    if isinstance(content, dict):
        found = f"keys {_REPR.repr(sorted(content))}"
    raise UserError(
        f"{path} is not a {kind} file: a JSON object with a list {key!r} is expected, "
        f"found {found}."
    )


def missing_field(entry: Any, **types: type | tuple[type, ...]) -> str:
    """What an entry lacks: a field that is absent or of another type; "" if nothing.

    A text that UTF-8 cannot hold, such as half of an emoji, is of no type.
    """
    if not isinstance(entry, dict):
        return f"{_REPR.repr(entry)} is not a JSON object"
    for field, kind in types.items():
        if field not in entry:
            return f"field {field!r} is missing in {_REPR.repr(entry)}"
        value = entry[field]
        if not isinstance(value, kind) or isinstance(value, bool):
            found = type(value).__name__
            return f"field {field!r} has a wrong type ({found}) in {_REPR.repr(entry)}"
        if isinstance(value, str) and (problem := half_character(value)):
            return f"field {field!r} {problem} in {_REPR.repr(entry)}"
    return ""


def wrong_text(value: Any) -> str:
    """Why a value is no text that UTF-8 can hold; "" if it is one."""
    if not isinstance(value, str):
        return f"{_REPR.repr(value)} is no text"
    problem = half_character(value)
    return f"{_REPR.repr(value)} {problem}" if problem else ""


def read_caption_lines(
    path: pathlib.Path, bad: BadRecords
) -> Iterator[tuple[str, str, str]]:
    """(where, file name, caption) from a `.jsonl`, `.csv` or `.txt` file.

    - `.jsonl`: `{"file_name": ..., "caption": ...}` or `"captions": [...]` per line
    - `.csv`: a header with columns `file_name` and `caption`
    - `.txt`: file name, a tab, the caption

    Several lines may name the same file.
    """
    readers = {".jsonl": _jsonl_lines, ".csv": _csv_lines, ".txt": _txt_lines}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"{path} has suffix {path.suffix!r}; captions beside an image folder are "
            f"read from {', '.join(readers)}."
        )
    return readers[path.suffix.lower()](path, bad)


def jsonl_entries(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line of JSON; a malformed one is an error."""
    for number, line in text_files.lines(path):
        yield f"line {number}", json_files.parse(line, path, line=number)


def _jsonl_lines(path, bad):
    for where, entry in jsonl_entries(path):
        several = isinstance(entry, dict) and "captions" in entry
        problem = missing_field(
            entry, file_name=str, **{"captions": list} if several else {"caption": str}
        )
        if problem:
            bad.add("malformed entry", f"{where}: {problem}")
            continue
        captions = entry["captions"] if several else [entry["caption"]]
        if not captions:
            bad.add("image without captions", f"{where}: {entry['file_name']}")
        for caption in captions:
            if problem := wrong_text(caption):
                bad.add("malformed entry", f"{where}: caption {problem}")
            else:
                yield where, entry["file_name"], caption


def _csv_lines(path, bad):
    for where, name, _, caption in csv_cells(path, bad, ("caption",)):
        yield where, name, caption


def csv_cells(
    path: pathlib.Path, bad: BadRecords, columns: tuple[str, ...]
) -> Iterator[tuple[str, str, str, str]]:
    """(where, file name, column, cell) of each row of a CSV file with a header.

    The header has `file_name`, and of `columns` exactly one, once.
    """
    rows = text_files.csv_rows(path)
    _, header = next(rows, (1, []))
    found = [column for column in header if column in columns]
    if header.count("file_name") != 1 or len(found) != 1:
        raise UserError(
            f"{path}: the header must have columns file_name and "
            f"{' or '.join(columns)}, found {_REPR.repr(header)}."
        )
    name, cell = header.index("file_name"), header.index(found[0])
    for number, row in rows:
        where = f"line {number}"
        if len(row) != len(header):
            detail = f"{where}: {len(row)} columns, but {len(header)} in the header"
            bad.add("malformed entry", detail)
        elif _holds_a_row(row, name):
            raise UserError(
                f"{path}, {where}: a quote opens in this row and closes behind another "
                "row, as it seems: close it before the end of its field."
            )
        else:
            yield where, row[name], found[0], row[cell]


def _holds_a_row(row, place):
    """Whether a field that spans lines has one with a file's name where a row has it.

    place: the column of file names.
    """
    suffix = os.path.splitext(row[place])[1]
    for field in row:
        for line in field.split("\n")[1:]:
            cells = line.split(",")
            if len(cells) == len(row) and suffix:
                if os.path.splitext(cells[place])[1] == suffix:
                    return True
    return False


def _txt_lines(path, bad):
    for number, line in text_files.lines(path):
        name, tab, caption = line.partition("\t")
        if tab:
            yield f"line {number}", name, caption
        else:
            bad.add("malformed entry", f"line {number}: no tab after the file name")


def coco_image_paths(
    images: list, folder: ImageFolder, bad: BadRecords
) -> dict[str, str | None]:
    """Image id -> path of COCO's `images`; None where the file is not in the folder."""
    paths = {}
    for number, entry in enumerate(images):
        problem = missing_field(entry, id=(int, str), file_name=str)
        if problem:
            bad.add("malformed entry", f"images[{number}]: {problem}")
            continue
        image_id, file_name = str(entry["id"]), entry["file_name"]
        if image_id in paths:
            bad.add("duplicate image id", f"image {image_id} ({file_name})")
            continue
        paths[image_id], problem = folder.find(file_name)
        if problem:
            detail = f"image {image_id}: {file_name} is not in {folder.root}"
            bad.add(problem, detail)
    return paths


class VqaAnnotation(NamedTuple):
    """What VQAv2's annotations say of a question.

    target: the answer to learn, the one that `answers.most_rewarded` names.
    kinds: as `question_kinds.read_kinds` gives them.
    """

    image_id: str
    target: str
    answers: tuple[str, ...]
    kinds: dict[str, str]


def vqa_answers(path: pathlib.Path, bad: BadRecords) -> dict[str, VqaAnnotation]:
    """Question id -> what is said of it; questions without an answer are left out."""
    entries = json_list(read_json(path), "annotations", path, "VQAv2 annotations")
    result = {}
    for number, entry in enumerate(entries):
        problem = missing_field(
            entry, question_id=(int, str), image_id=(int, str), answers=list
        )
        if problem:
            bad.add("malformed entry", f"{path}: annotations[{number}]: {problem}")
            continue
        question_id = str(entry["question_id"])
        name = f"annotation of question {question_id} in {path}"
        given = _answers(entry["answers"])
        chosen = entry.get("multiple_choice_answer")
        if question_id in result:
            bad.add("duplicate annotation", name)
        elif isinstance(given, str):
            bad.add("malformed entry", f"{name}: {given}")
        elif chosen is not None and (problem := wrong_text(chosen)):
            bad.add("malformed entry", f"{name}: multiple_choice_answer {problem}")
        else:
            try:
                kinds = question_kinds.read_kinds(entry)
            except ValueError as problem:
                bad.add("malformed entry", f"{name}: {problem}")
                continue
            target = answers.most_rewarded(given, chosen or "")
            if target:  # else its question is reported
                image_id = str(entry["image_id"])
                result[question_id] = VqaAnnotation(image_id, target, given, kinds)
    return result


def _answers(entries):
    """The texts of the answers, or what is wrong with one of them."""
    given = tuple(
        entry["answer"]
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("answer"), str)
    )
    if len(given) == len(entries) and not half_character("".join(given)):
        return given
    problems = [missing_field(entry, answer=str) for entry in entries]
    number = next(number for number, problem in enumerate(problems) if problem)
    return f"answers[{number}]: {problems[number]}"


def read_texts(
    paths: Iterable[PathLike], on_bad_record: str = "error"
) -> Iterator[str]:
    """All captions, questions and answers in files of any format of this module.

    A `.txt` line without a tab is a text as a whole. Bad entries are errors, or with
    `on_bad_record='skip'` are left out, counted and logged.
    """
    for path in map(resolve_path, paths):
        bad = BadRecords(on_bad_record, str(path), "add --on_bad_record=skip")
        if path.suffix.lower() == ".txt":
            for _, line in text_files.lines(path):
                yield line.partition("\t")[2] or line
        elif path.suffix.lower() == ".json":
            yield from _json_texts(path, bad)
        else:
            for _, _, caption in read_caption_lines(path, bad):
                yield caption
        bad.log()


def _json_texts(path, bad):
    content = read_json(path)
    key = "questions" if isinstance(content, dict) and "questions" in content else ""
    key = key or "annotations"
    for number, entry in enumerate(json_list(content, key, path, "COCO or VQAv2")):
        there = entry if isinstance(entry, dict) else {}
        fields = [field for field in _TEXT_FIELDS if field in there]
        texts = [field for field in fields if isinstance(entry[field], str)]
        if not fields:
            bad.add(
                "an entry that is neither of COCO captions nor of VQAv2",
                f"{key}[{number}]: no caption, question or multiple_choice_answer in "
                f"{_REPR.repr(entry)}",
            )
        elif problem := missing_field(entry, **{(texts or fields)[0]: str}):
            bad.add("malformed entry", f"{key}[{number}]: {problem}")
        else:
            yield entry[texts[0]]
