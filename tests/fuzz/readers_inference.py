"""Readers of what an inference is given, and of what many jobs of it left."""

import base64
import io
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import seqio
from harness import Reader
from PIL import Image

from vit22b_transfer import UserError
from vit22b_transfer.data import images, packed_images, text_files
from vit22b_transfer.data.given_images import SPLIT, GivenImagesSource
from vit22b_transfer.inference import answer_lists, batch_requests
from vit22b_transfer.inference.prediction_files import PredictionFiles
from vit22b_transfer.inference.prediction_shards import ShardFiles, merge_file
from vit22b_transfer.training import curves

TOTAL = 4


def readers() -> list[Reader]:
    lists = [
        Reader(
            f"given {name}", make, lambda folder, f=file, a=asked: _read(folder, f, a)
        )
        for name, make, file, asked in (
            ("jsonl", _jsonl, "list.jsonl", True),
            ("csv", _csv, "list.csv", True),
            ("coco", _coco, "coco.json", False),
            ("vqa", _vqa, "questions.json", True),
            ("requests", _requests, "requests.jsonl", True),
            ("tar", _tar, "images.tar", True),
            ("parquet", _parquet, "rows.parquet", True),
        )
    ]
    return [
        *lists,
        Reader("answer list", _answers, _read_answers),
        Reader("responses", _whole, _read_responses, names=["out.jsonl"]),
        Reader("prediction shards", _shards, _read_shards, names=["out.jsonl"]),
        Reader("watch", _watched, _read_watched, share=0.3),
    ]


def _write(folder, name, content):
    Path(folder, name).write_text(content, encoding="utf-8")


def _json_lines(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


# --- Given images ---


def _png():
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), 7, np.uint8)).save(file, "png")
    return file.getvalue()


def _image(folder, name="1.png"):
    Path(folder, name).write_bytes(_png())


def _jsonl(folder):
    _image(folder)
    line = {"image": "1.png", "question": "how many?", "image_id": 3}
    _write(folder, "list.jsonl", _json_lines([line, line | {"question_id": "q"}]))


def _csv(folder):
    _image(folder)
    rows = 'file_name,question,image_id\n1.png,"how, many?",3\n1.png,why?,4\n'
    _write(folder, "list.csv", rows)


def _coco(folder):
    _image(folder)
    entries = [{"id": 1, "file_name": "1.png"}, {"id": "b", "file_name": "2.png"}]
    _write(folder, "coco.json", json.dumps({"images": entries}))


def _vqa(folder):
    _image(folder, f"{7:012d}.jpg")
    entry = {"question_id": 1, "image_id": 7, "question": "how many?"}
    entries = [entry, entry | {"question_id": "2", "image_id": "8"}]
    _write(folder, "questions.json", json.dumps({"questions": entries}))


def _requests(folder):
    _image(folder)
    lines = []
    data = f"data:image/png;base64,{base64.b64encode(_png()).decode()}"
    for number, url in enumerate((data, "file://1.png", "https://nowhere/1.png")):
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "how many?"},
        ]
        body = {"model": "m", "messages": [{"role": "user", "content": content}]}
        line = {"custom_id": f"r{number}", "method": "POST", "body": body}
        lines.append(line | {"url": "/v1/chat/completions"})
    _write(folder, "requests.jsonl", _json_lines(lines))


def _tar(folder):
    with tarfile.open(os.path.join(folder, "images.tar"), "w") as archive:
        for name, content in (
            ("a.png", _png()),
            ("a.txt", b"how many?"),
            ("b.png", _png()),
            ("b.txt", "wo? größer".encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _parquet(folder):
    images_of = [{"bytes": _png(), "path": None}, {"bytes": None, "path": "1.png"}]
    table = pyarrow.table({"image": images_of, "question": ["how?", "why?"]})
    path = os.path.join(folder, "rows.parquet")
    pyarrow.parquet.write_table(table, path, row_group_size=1)


def _read(folder, file, asked):
    """As `vit22b caption` and `answer`: records, then each image of an archive."""
    source = GivenImagesSource([os.path.join(folder, file)], asked=asked)
    source.digest()
    for record in source._load(SPLIT):
        json.dumps([record.image_id, record.question, record.image_problem]).encode()
        if record.image_problem or not packed_images.is_packed(record.image_path):
            continue
        try:  # what a single image has wrong is the error of its line
            images.decode(packed_images.read(record.image_path))
        except UserError as error:
            str(error).encode("utf-8", "backslashreplace")


# --- Lists of answers, predictions ---


def _answers(folder):
    _write(folder, "answers.txt", "yes\nno\n\ntwo dogs\nyes \n")


def _read_answers(folder):
    """As `answer_lists.from_list` reads them."""
    encode = seqio.ByteVocabulary().encode
    path = Path(folder, "answers.txt")
    texts = [line.strip() for _, line in text_files.lines(path)]
    try:
        answer_lists.trie([encode(text) for text in texts], eos_id=1)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _lines():
    for index in range(TOTAL):
        line = {"index": index, "image_id": str(index), "prompt": "caption en"}
        yield line | {"prediction": "a cube", "score": -0.5}


def _files(folder):
    return PredictionFiles(os.path.join(folder, "out.jsonl"), {"num_examples": TOTAL})


def _whole(folder):
    files = _files(folder)
    files.recover(2)
    with files.writer() as writer:
        writer.write(list(_lines()))
    files.merge()


def _read_responses(folder):
    with tempfile.TemporaryDirectory() as root:
        to = os.path.join(root, "responses.jsonl")
        path = os.path.join(folder, "out.jsonl")
        batch_requests.write_responses(path, to, model="m")


def _shards(folder):
    for index in range(2):
        with ShardFiles(_files(folder)).entered(index, 2) as part, part() as writer:
            writer.write(list(_lines())[2 * index : 2 * index + 2])


def _read_shards(folder):
    """As `vit22b merge`; in a copy, as it removes the parts."""
    with tempfile.TemporaryDirectory() as root:
        copy = os.path.join(root, "copy")
        shutil.copytree(folder, copy)
        assert merge_file(os.path.join(copy, "out.jsonl"))["num_examples"] == TOTAL


def _watched(folder):
    values = [{"step": n, "watch/tiny/CIDEr": 0.5 / n} for n in (1, 2, 3)]
    _write(folder, "watch.jsonl", _json_lines(values))


def _read_watched(folder):
    found = curves.read(folder)
    assert len(found.points.get("watch/tiny/CIDEr", [])) <= 9
