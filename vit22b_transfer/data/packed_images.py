"""Images inside of other files: WebDataset's tar, parquet, requests in JSON lines.

A place of such an image is a text, `tar:OFFSET:SIZE:PATH`, `parquet:ROW::PATH`,
`request:OFFSET:SIZE:PATH` or one of `packed_examples`; so records of them are as small
as those of files.
"""

import base64
import binascii
import contextlib
import functools
import os
import pathlib
import re
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

from vit22b_transfer import UserError
from vit22b_transfer.data import packed_examples, packed_texts
from vit22b_transfer.data.images import IMAGE_FORMATS
from vit22b_transfer.data.packed_examples import MAX_BYTES
from vit22b_transfer.data.records import Record, half_character
from vit22b_transfer.host import json_files
from vit22b_transfer.host.file_errors import brief

SUFFIXES = (".tar", ".parquet", *packed_examples.SUFFIXES)
_KINDS = "tar|parquet|request|tfrecord|arrayrecord"
_PLACE = re.compile(rf"({_KINDS}):(\d+):(\d*):(.+)", re.DOTALL)
_DATA = re.compile(r"data:[\w./+-]*;base64,")

# A file of Arrow is for one thread at a time: with several, and their own threads below
# them, a process that has TensorFlow hangs or dies now and then.
_PARQUET = threading.Lock()

Find = Callable[[str], tuple[str | None, str]]


def is_packed(place: str) -> bool:
    """Whether the place of an image is inside of another file."""
    return _PLACE.fullmatch(place) is not None


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a file is called as one whose images `records` gives."""
    known = os.fspath(path).lower().endswith((".tar", ".parquet"))
    return known or bool(packed_examples.kind(path))


def records(
    path: pathlib.Path, *, beside: Literal["question", "caption"]
) -> Iterator[Record]:
    """The images of an archive, in its order, with the texts of `packed_texts`.

    beside: what KEY.txt beside an image of a tar file is.

    Raises:
      UserError: if the file is damaged, or has no image.
    """
    if path.suffix.lower() == ".tar":
        found = _tar(path, beside)
    elif packed_examples.kind(path):
        found = packed_examples.records(path)
    else:
        found = _parquet(path)
    empty = True
    for record in found:
        empty = False
        yield record
    if empty:
        raise UserError(f"{path} holds no image.")


def read(place: str) -> bytes:
    """The encoded image at a place, or in a file.

    Raises:
      UserError: if there is none any more, or it is larger than `MAX_BYTES`.
    """
    found = _PLACE.fullmatch(place)
    try:
        if found is None:
            return _file_bytes(place)
        kind, first, size, path = found.groups()
        if kind == "parquet":
            return _parquet_image(path, int(first))
        if kind in ("tfrecord", "arrayrecord"):
            return packed_examples.image(kind, int(first), int(size or 0), path)
        content = _part(path, int(first), int(size))
    except OSError as error:
        raise UserError(f"{place}: {error.strerror or error}") from error
    return content if kind == "tar" else _data_of(json_files.parse(content, path))


def _file_bytes(path: str) -> bytes:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file")
    return _part(path, 0, status.st_size)


def _part(path: str, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise UserError(f"{path}: an image of {size:,} bytes, more than {MAX_BYTES:,}")
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


# --- WebDataset: KEY.jpg, with KEY.txt or KEY.json behind or before it ---


def _tar(path: pathlib.Path, beside: str) -> Iterator[Record]:
    """As WebDataset groups files: those of one key stand together."""
    group: dict[str, tarfile.TarInfo] = {}
    last = None
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, name = os.path.split(member.name)
                key, _, suffix = name.partition(".")
                if (folder, key) != last:
                    yield from _of_group(path, group, beside)
                    group, last = {}, (folder, key)
                group[suffix.lower()] = member
            yield from _of_group(path, group, beside)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is no readable tar file ({brief(str(error))}). A compressed one "
            "has to be unpacked first (gunzip), for its images to be read in any order."
        ) from error


def _of_group(
    path: pathlib.Path, group: dict[str, tarfile.TarInfo], beside: str
) -> Iterator[Record]:
    values: dict[str, Any] = {}
    problem = ""
    for suffix in ("json", "txt"):
        if (member := group.get(suffix)) is None:
            continue
        if member.size > packed_texts.MOST_BYTES:
            problem = f"{member.size:,} bytes of text beside the image"
            continue
        content = _part(str(path), member.offset_data, member.size)
        if suffix == "txt":
            values[beside] = content.decode(errors="replace")
            continue
        try:
            known = json_files.parse(content, "the text beside the image")
        except UserError as error:
            problem = str(error)
            continue
        if isinstance(known, dict):
            values |= known
    said = packed_texts.of_values(values)
    for suffix, member in group.items():
        if f".{suffix}" in IMAGE_FORMATS:
            name = member.name.encode("utf-8", "backslashreplace").decode()
            image_id = said.get("image_id") or name
            fields = {**said, "image_id": image_id}
            if problem:
                fields["image_problem"] = problem
            if member.issparse():
                sparse = "a sparse member of a tar file"
                yield Record("", image_id, image_problem=sparse)
                continue
            place = f"tar:{member.offset_data}:{member.size}:{path}"
            yield Record(place, **fields)


# --- Parquet ---


@functools.lru_cache(maxsize=4)
def _parquet_file(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: parquet files are read by pyarrow, which is not installed: "
            "pip install pyarrow."
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(
            f"{path} is no readable parquet file ({brief(str(error))})."
        ) from error


def _parquet(path: pathlib.Path) -> Iterator[Record]:
    file = _parquet_file(str(path))
    names = set(file.schema_arrow.names)
    if "image" not in names:
        raise UserError(
            f"{path} has no column image; it has {', '.join(sorted(names)[:20])}."
        )
    texts = [name for name in packed_texts.NAMES if name in names]
    row = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        columns = {}
        if texts:
            with _PARQUET:
                columns = _columns(str(path), group, texts)
        # An image has a byte at least.
        if rows > path.stat().st_size or any(len(x) != rows for x in columns.values()):
            raise UserError(f"{path} is damaged: it has not the {rows} rows it says.")
        for inside in range(rows):
            values = {name: columns[name][inside] for name in texts}
            said = packed_texts.of_values(values)
            said["image_id"] = said.get("image_id") or f"{path.name}:{row}"
            yield Record(f"parquet:{row}::{path}", **said)
            row += 1


@contextlib.contextmanager
def _damage_said(path: str) -> Iterator[None]:
    """What pyarrow raises of a damaged file, as a UserError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path} is damaged ({brief(str(error))}).") from error


def _columns(path: str, group: int, names: list[str]) -> dict[str, list[Any]]:
    """Columns of a row group by name."""
    with _damage_said(path):
        table = _parquet_file(path).read_row_group(
            group, columns=names, use_threads=False
        )
        return {name: table.column(name).to_pylist() for name in names}


@functools.lru_cache(maxsize=2)
def _parquet_group(path: str, group: int) -> Any:
    with _damage_said(path):
        table = _parquet_file(path).read_row_group(
            group, columns=["image"], use_threads=False
        )
        return table.column("image")


def _parquet_image(path: str, row: int) -> bytes:
    metadata = _parquet_file(path).metadata
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < rows:
            break
        row -= rows
    else:
        raise UserError(f"{path} has no such row any more")
    with _PARQUET:
        column = _parquet_group(path, group)
        with _damage_said(path):
            value = column[row].as_py()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        # Names of a file from elsewhere do not lead out of its folder.
        folder = pathlib.Path(path).parent
        name = os.path.normpath(value)
        if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
            raise UserError("file name that leaves the folder of its parquet file")
        return _file_bytes(str(folder / name))
    raise UserError(f"row {row} of {path} has no image but {brief(value)}")


# --- OpenAI's batches: lines of {"custom_id": ..., "body": {"messages": [...]}} ---


def is_request(entry: Any) -> bool:
    """Whether a JSON line is a request of a batch, as `vllm run-batch` takes it."""
    return isinstance(entry, dict) and "custom_id" in entry and "body" in entry


def requested(path: pathlib.Path, offset: int, entry: Any, find: Find) -> Record:
    """The record of a request: its one image, and its text as the question.

    find: the path of a file name, or why there is none. An image is `data:` with
    base64, `file://` or a name; an address of the network is a problem, told in its
    line: no network is used.
    """
    custom_id = entry["custom_id"]
    if not isinstance(custom_id, str) or half_character(custom_id):
        raise UserError(f"{path}: custom_id is no text: {brief(custom_id)}.")
    texts, urls = [], []
    for kind, value in _contents(entry["body"]):
        (texts if kind == "text" else urls).append(value)
    text = "\n".join(texts).strip()
    if len(urls) != 1 or half_character(text):
        problem = f"{len(urls)} images in the request; one is expected"
        return Record("", custom_id, custom_id, image_problem=problem)
    url = urls[0]
    if _DATA.match(url):
        size = _line_length(path, offset)
        return Record(f"request:{offset}:{size}:{path}", custom_id, custom_id, text)
    if re.match(r"(?!file:)\w+:", url):
        problem = f"{brief(url)}: only data:, file: and names of files are read"
        return Record("", custom_id, custom_id, text, image_problem=problem)
    found, problem = find(url.removeprefix("file://"))
    problem = problem and f"{brief(url)}: {problem}"
    return Record(found or "", custom_id, custom_id, text, image_problem=problem)


def _contents(body: Any) -> Iterator[tuple[str, str]]:
    """("text" or "image_url", value) of all messages of a request."""
    messages = body.get("messages") if isinstance(body, dict) else None
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            yield "text", content
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict):
                continue
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                yield "text", part["text"]
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if part.get("type") == "image_url" and isinstance(url, str):
                yield "image_url", url


def _line_length(path: pathlib.Path, offset: int) -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        return len(file.readline())


def _data_of(entry: Any) -> bytes:
    for kind, url in _contents(entry.get("body")):
        if kind == "image_url" and (head := _DATA.match(url)):
            try:
                return base64.b64decode(url[head.end() :], validate=True)
            except binascii.Error as error:
                raise UserError(f"the image is no base64: {error}") from error
    raise UserError("the request has no image any more")
