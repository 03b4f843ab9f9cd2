"""Annotation files: COCO captions, VQAv2, and captions listed beside an image folder.

Problems of a whole file (missing, empty, malformed) are always errors; problems of
single entries go to a `BadRecords`, which raises or counts them.
"""

import collections
import csv
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.data.records import BadRecords, ImageFolder, PathLike, resolve_path


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file; UserError with line and column if malformed."""
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as e:
        raise UserError(
            f"{path}, line {e.lineno}, column {e.colno}: malformed JSON: {e.msg}."
        ) from e


def _read_text(path):
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {kind}; an annotation file is expected there.")
    try:
        # utf-8-sig: files written on Windows may start with a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path} is not UTF-8 text ({e.reason} at byte {e.start})."
        ) from e
    if not text.strip():
        raise UserError(f"{path} is empty; an annotation file is expected there.")
    return text


def json_list(content: Any, key: str, path: pathlib.Path, kind: str) -> list:
    """The list under `key` of a JSON object; UserError saying what was found."""
    if isinstance(content, dict) and isinstance(content.get(key), list):
        return content[key]
    found = f"keys {sorted(content)}" if isinstance(content, dict) else "no JSON object"
    raise UserError(
        f"{path} is not a {kind} file: a JSON object with a list {key!r} is expected, "
        f"found {found}."
    )


def missing_field(entry: Any, **types: type | tuple[type, ...]) -> str:
    """What an entry lacks: a field that is absent or of another type; "" if nothing."""
    if not isinstance(entry, dict):
        return f"{entry!r} is not a JSON object"
    for field, kind in types.items():
        if field not in entry:
            return f"field {field!r} is missing in {_brief(entry)}"
        if not isinstance(entry[field], kind) or isinstance(entry[field], bool):
            return f"field {field!r} has a wrong type in {_brief(entry)}"
    return ""


def _brief(entry):
    text = json.dumps(entry)
    return text if len(text) <= 120 else f"{text[:117]}..."


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
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(
                f"{path}, line {number}, column {e.colno}: malformed JSON: {e.msg}."
            ) from e


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
            if isinstance(caption, str):
                yield where, entry["file_name"], caption
            else:
                bad.add("malformed entry", f"{where}: caption {caption!r} is no string")


def _csv_lines(path, bad):
    rows = csv.DictReader(_read_text(path).splitlines(keepends=True))
    if not {"file_name", "caption"} <= set(rows.fieldnames or ()):
        raise UserError(
            f"{path}: the header must have columns file_name and caption, found "
            f"{rows.fieldnames}."
        )
    for row in rows:
        where = f"line {rows.line_num}"
        if row["file_name"] is None or row["caption"] is None or None in row:
            bad.add("malformed entry", f"{where}: not as many columns as the header")
        else:
            yield where, row["file_name"], row["caption"]


def _txt_lines(path, bad):
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
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
    for entry in images:
        problem = missing_field(entry, id=(int, str), file_name=str)
        if problem:
            bad.add("malformed entry", problem)
            continue
        image_id = str(entry["id"])
        if image_id in paths:
            bad.add("duplicate image id", f"image {image_id} ({entry['file_name']})")
            continue
        paths[image_id], problem = folder.find(entry["file_name"])
        if problem:
            detail = f"image {image_id}: {entry['file_name']} is not in {folder.root}"
            bad.add(problem, detail)
    return paths


def vqa_answers(
    path: pathlib.Path, bad: BadRecords
) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Question id -> (image id, most frequent answer, all answers)."""
    entries = json_list(read_json(path), "annotations", path, "VQAv2 annotations")
    result = {}
    for entry in entries:
        problem = missing_field(
            entry, question_id=(int, str), image_id=(int, str), answers=list
        )
        if problem:
            bad.add("malformed entry", f"{path}: {problem}")
            continue
        question_id = str(entry["question_id"])
        name = f"annotation of question {question_id} in {path}"
        given = tuple(
            a["answer"] for a in entry["answers"] if not missing_field(a, answer=str)
        )
        if question_id in result:
            bad.add("duplicate annotation", name)
        elif len(given) < len(entry["answers"]):
            bad.add("malformed entry", f"{name}: an answer is no text")
        elif any(answer.strip() for answer in given):  # else its question is reported
            target = _most_frequent(given, entry.get("multiple_choice_answer"))
            result[question_id] = (str(entry["image_id"]), target, given)
    return result


def _most_frequent(answers, preferred):
    """The most frequent non-empty answer; of equals the preferred, else the first."""
    counts = collections.Counter(answer for answer in answers if answer.strip())
    most = max(counts.values())
    if counts.get(preferred) == most:
        return preferred
    return next(answer for answer in counts if counts[answer] == most)


def read_texts(paths: Iterable[PathLike]) -> Iterator[str]:
    """All captions, questions and answers in files of any format of this module.

    A `.txt` line without a tab is a text as a whole. Bad entries are errors.
    """
    for path in map(resolve_path, paths):
        if path.suffix.lower() == ".txt":
            for line in _read_text(path).splitlines():
                yield line.partition("\t")[2] or line
        elif path.suffix.lower() == ".json":
            yield from _json_texts(path)
        else:
            for _, _, caption in read_caption_lines(
                path, BadRecords("error", str(path))
            ):
                yield caption


def _json_texts(path):
    content = read_json(path)
    key = "questions" if isinstance(content, dict) and "questions" in content else ""
    entries = json_list(content, key or "annotations", path, "COCO or VQAv2")
    for entry in entries:
        for field in ("caption", "question", "multiple_choice_answer"):
            if isinstance(entry, dict) and isinstance(entry.get(field), str):
                yield entry[field]
                break
        else:
            raise UserError(
                f"{path} is neither COCO captions nor VQAv2: no caption, question or "
                f"multiple_choice_answer in {_brief(entry)}."
            )
