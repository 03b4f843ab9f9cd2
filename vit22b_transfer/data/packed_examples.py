"""Images inside of `tf.train.Example`s in TFRecord and ArrayRecord files.

As TFDS and T5 write them: an image is encoded bytes, called `image`, `image/encoded`,
`jpg` or `png`. Places are `tfrecord:OFFSET:SIZE:PATH` and `arrayrecord:NUMBER::PATH`.
Files may be called `NAME.tfrecord-00000-of-00010` as well.
"""

import contextlib
import functools
import gzip
import os
import pathlib
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import packed_texts
from vit22b_transfer.data.records import Record
from vit22b_transfer.host.file_errors import brief

SUFFIXES = (".tfrecord", ".tfrecords", ".array_record", ".arrayrecord")
IMAGES = ("image", "image/encoded", "jpg", "png")
# Of an encoded image: what `images.MAX_PIXELS` take without any compression.
MAX_BYTES = 2**28
_SHARD = re.compile(r"-\d+-of-\d+$")
# A record: its length, a checksum of that, the bytes, a checksum of them.
_HEAD, _FOOT = struct.Struct("<QI"), 4


def kind(path: str | os.PathLike) -> str:
    """`tfrecord`, `arrayrecord`, or "" if the file is called as neither."""
    suffix = os.path.splitext(_SHARD.sub("", os.fspath(path)))[1].lower()
    if suffix not in SUFFIXES:
        return ""
    return "tfrecord" if suffix.startswith(".tf") else "arrayrecord"


def records(path: pathlib.Path) -> Iterator[Record]:
    """The images of a file, in its order; all of it is read once.

    Raises:
      UserError: if the file is damaged, or an example has no image.
    """
    what = kind(path)
    found = _tfrecords(path) if what == "tfrecord" else _array_records(path)
    for number, (place, content) in enumerate(found):
        values = _example(content, f"{path}, record {number}")
        if not any(name in values for name in IMAGES):
            raise UserError(
                f"{path}, record {number} has no image: none of {', '.join(IMAGES)} "
                f"among {', '.join(sorted(map(ascii, values))[:20]) or 'no features'}."
            )
        said = packed_texts.of_values(
            {name: values[name] for name in packed_texts.NAMES if name in values}
        )
        said["image_id"] = said.get("image_id") or f"{path.name}:{number}"
        yield Record(f"{what}:{place}:{path}", **said)


def image(what: str, first: int, size: int, path: str) -> bytes:
    """The encoded image at a place.

    Raises:
      UserError: if there is none any more.
    """
    if what == "tfrecord":
        with open(path, "rb") as file:
            file.seek(first)
            content = file.read(size)
    else:
        with _readable(path):
            reader = _array_reader(path)
            if first >= reader.num_records():
                raise UserError(f"{path} has no record {first} any more")
            content = reader.read([first])[0]
    values = _example(content, path)
    for name in IMAGES:
        if isinstance(found := values.get(name), list) and len(found) == 1:
            return found[0] if isinstance(found[0], bytes) else b""
    raise UserError(f"an example of {path} has no encoded image")


def _example(content: bytes, where: str) -> dict[str, list[Any]]:
    from google.protobuf import message

    try:
        example = tf.train.Example.FromString(content)
    except message.DecodeError as error:
        raise UserError(f"{where} is no tf.train.Example.") from error
    return {
        name: list(getattr(feature, feature.WhichOneof("kind") or "bytes_list").value)
        for name, feature in example.features.feature.items()
    }


def _is_compressed(file: BinaryIO) -> bool:
    """Whether gzip's bytes begin; those of its mark alone may be a record's length."""
    try:
        return bool(gzip.GzipFile(fileobj=file).read(1))
    except (OSError, EOFError, zlib.error):
        return False


def _tfrecords(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Offset and size, and the bytes, of each record."""
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size
        if _is_compressed(file):
            raise UserError(
                f"{path} is compressed; unpack it first (gunzip), for its images to be "
                "read in any order."
            )
        file.seek(0)
        while left:
            head = file.read(_HEAD.size)
            size = _HEAD.unpack(head)[0] if len(head) == _HEAD.size else left
            left -= _HEAD.size + size + _FOOT
            if left < 0 or size > MAX_BYTES:
                raise UserError(
                    f"{path} is damaged, cut off, or no TFRecord file: a record of "
                    f"{size:,} bytes at {file.tell() - len(head):,}."
                )
            offset = file.tell()
            content = file.read(size)
            file.seek(_FOOT, os.SEEK_CUR)
            yield f"{offset}:{size}", content


@functools.lru_cache(maxsize=16)
def _array_reader(path: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path)


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is no readable ArrayRecord file ({brief(str(error))})."
        ) from error


def _array_records(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    with _readable(str(path)):
        reader = _array_reader(str(path))
        for number in range(reader.num_records()):
            yield f"{number}:", reader.read([number])[0]
