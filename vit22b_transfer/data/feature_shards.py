"""Files of a feature cache: shards of examples, and of the tokens of their images.

A shard is an ArrayRecord file: first the rows, each the tokens of one image, then the
examples without their images, last an index in JSON. Examples name their image by the
hash of its pixels, so that an image that many of them show is encoded and stored once,
in any shard of the split. A shard is written under another name and renamed when it is
whole; that a file was cut off afterwards shows when it is opened, a changed byte when
the record is read.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)

from vit22b_transfer import UserError
from vit22b_transfer.data.converters import Example
from vit22b_transfer.data.indexed_source import RandomAccessSource
from vit22b_transfer.host import json_files, whole_files

STORAGES = ("exact", "int8")

# A row per group: random access reads no more than it needs.
_OPTIONS = "group_size:1,uncompressed"
_MOST_SHARDS = 100_000  # as many as their names can be numbered


@dataclasses.dataclass(frozen=True)
class TokenFormat:
    """How the tokens [length, width] of an image are stored.

    `exact`: in `dtype`, the tower's own. `int8`: each token as int8 with one float32
    scale, its largest value by 127; read back in `dtype`.
    """

    length: int
    width: int
    dtype: str
    storage: str

    @property
    def num_bytes(self) -> int:
        """Size of a row."""
        if self.storage == "int8":
            return self.length * (self.width + 4)
        return self.length * self.width * tf.as_dtype(self.dtype).size

    def decode(self, row: tf.Tensor) -> tf.Tensor:
        """The tokens in `dtype`, from the bytes of a row."""
        shape, dtype = [self.length, self.width], tf.as_dtype(self.dtype)
        if self.storage != "int8":
            return tf.reshape(tf.io.decode_raw(row, dtype), shape)
        cut = self.length * self.width
        values = tf.io.decode_raw(tf.strings.substr(row, 0, cut), tf.int8)
        scales = tf.io.decode_raw(tf.strings.substr(row, cut, -1), tf.float32)
        values = tf.cast(tf.reshape(values, shape), tf.float32)
        return tf.cast(values * scales[:, tf.newaxis], dtype)

    def array(self, row: bytes) -> np.ndarray:
        """As `decode`, without TensorFlow; what is exact is not copied."""
        shape, dtype = (self.length, self.width), tf.as_dtype(self.dtype).as_numpy_dtype
        if self.storage != "int8":
            return np.frombuffer(row, dtype).reshape(shape)
        cut = self.length * self.width
        values = np.frombuffer(row, np.int8, cut).reshape(shape).astype(np.float32)
        scales = np.frombuffer(row, np.float32, offset=cut)
        return (values * scales[:, None]).astype(dtype)


def unfinished(path: str) -> str:
    """The name of a shard while it is written."""
    return f"{path}.unfinished"


def image_hash(pixels: np.ndarray, *, varied: bool = False) -> str:
    """By which a cache knows a picture: of its pixels (uint8) alone.

    varied: of its shape too, where pictures may differ in that.
    """
    found = hashlib.blake2b(pixels.tobytes(), digest_size=16)
    if varied:
        found.update(repr(pixels.shape).encode())
    return found.hexdigest()


def read_layout(path: str) -> dict[str, Any]:
    """The content of a cache's `layout.json`, of which each value has its type.

    Raises:
      UserError: naming the file, if it is damaged.
    """
    advice = "Delete its folder and run `vit22b cache-features` again."
    content = json_files.read_object(path, advice=advice)
    fields = {"num_examples", "examples_per_shard", "tokens", "features", "fingerprint"}
    tokens, features = content.get("tokens"), content.get("features")
    is_whole = (
        content.keys() == fields
        and _is_size(content["num_examples"])
        and _is_size(content["examples_per_shard"])
        and content["num_examples"] <= _MOST_SHARDS * content["examples_per_shard"]
        and isinstance(content["fingerprint"], dict)
        and isinstance(tokens, dict)
        and tokens.keys() == {field.name for field in dataclasses.fields(TokenFormat)}
        and _is_size(tokens["length"])
        and _is_size(tokens["width"])
        and tokens["storage"] in STORAGES
        and _is_dtype(tokens["dtype"])
        and tf.as_dtype(tokens["dtype"]).is_floating
        and isinstance(features, dict)
        and all(map(_is_spec, features.values()))
    )
    if not is_whole:
        raise UserError(f"{path} is damaged or no layout of cached features. {advice}")
    return content


def _is_size(value):
    return type(value) is int and 0 < value < 1 << 62


def _is_dtype(value):
    try:
        return isinstance(value, str) and bool(tf.as_dtype(value))
    except TypeError:
        return False


def _is_spec(value):
    """Whether a value is [dtype, shape]."""
    if not isinstance(value, list) or len(value) != 2 or not _is_dtype(value[0]):
        return False
    shape = value[1]
    return isinstance(shape, list) and all(
        size is None or size == 0 or _is_size(size) for size in shape
    )


class ShardWriter:
    """Writes one shard; `path` is there when `finish` returns, else nothing is."""

    def __init__(self, path: str):
        self._path, self._unfinished = path, unfinished(path)
        self._writer = ArrayRecordWriter(self._unfinished, _OPTIONS)
        self._rows: list[str] = []

    def add_row(self, image: str, row: bytes) -> None:
        """Adds the tokens of the image with that hash."""
        self._writer.write(row)
        self._rows.append(image)

    def finish(self, examples: Sequence[tuple[str, bytes]]) -> None:
        """Adds the examples, each with the hash of its image, and closes the file."""
        for _, example in examples:
            self._writer.write(example)
        index = {"rows": self._rows, "examples": [image for image, _ in examples]}
        self._writer.write(json.dumps(index).encode())
        self._writer.close()
        # ArrayRecord writes to a name, not to an open file.
        with open(self._unfinished, "rb") as written:
            os.fsync(written.fileno())
        os.replace(self._unfinished, self._path)
        whole_files.sync_directory(os.path.dirname(os.path.abspath(self._path)))


class Shard:
    """A shard to read. `rows` and `examples` are the hashes of their images.

    Raises:
      UserError: naming the file, if it was cut off or is no shard.
    """

    def __init__(self, path: str):
        self.path = path
        self._reader = ArrayRecordReader(path)
        try:
            # Of a file that was cut off there are none, and reading says why.
            last = max(self._reader.num_records() - 1, 0)
            index = json_files.parse(self._read(last), f"its index, record {last}")
            self.rows = _hashes(index, "rows")
            self.examples = _hashes(index, "examples")
            if len(self.rows) + len(self.examples) != last:
                raise ValueError(f"its index is not of {last} records")
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the shard {path} of cached features is cut off or damaged "
                f"({str(error).partition(';')[0]}). Run `vit22b cache-features` again: "
                "it writes such a shard anew and keeps the others."
            ) from error

    def row(self, place: int) -> bytes:
        """The row at a place."""
        return self._checked(place)

    def example(self, place: int) -> bytes:
        """The example at a place."""
        return self._checked(len(self.rows) + place)

    def _checked(self, record):
        try:
            return self._read(record)
        except RuntimeError as error:
            raise UserError(
                f"record {record} of {self.path} is damaged ({error}). Delete that "
                "file and run `vit22b cache-features` again."
            ) from error

    def _read(self, record):
        return self._reader.read([record])[0]


def _hashes(index, name) -> list[str]:
    values = index.get(name) if isinstance(index, dict) else None
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"its index has no list of {name}")
    return values


def pack(example: Example) -> tf.Tensor:
    """The features of an example as one string, in the order of their names."""
    values = [tf.io.serialize_tensor(example[name]) for name in sorted(example)]
    return tf.io.serialize_tensor(tf.stack(values))


def unpack(packed: tf.Tensor, specs: dict[str, tf.TensorSpec]) -> Example:
    """The inverse of `pack`."""
    values = tf.io.parse_tensor(packed, tf.string)
    example = {}
    for place, (name, spec) in enumerate(sorted(specs.items())):
        value = tf.io.parse_tensor(values[place], spec.dtype)
        example[name] = tf.ensure_shape(value, spec.shape)
    return example


class ShardsSource(RandomAccessSource):
    """The examples of all shards as a SeqIO source with random access.

    Its examples have the tokens as their `images`, all else is as it was stored.
    """

    def __init__(
        self,
        split: str,
        shards: Sequence[Shard],
        tokens: TokenFormat,
        specs: dict[str, tf.TensorSpec],
    ):
        super().__init__(splits=[split], caching_permitted=False)
        self._shards, self._tokens, self._specs = shards, tokens, specs
        self._starts = np.cumsum([0, *(len(shard.examples) for shard in shards)])
        # Of each image the shard and the row in it.
        self._places = {
            image: (shard, row)
            for shard in shards
            for row, image in enumerate(shard.rows)
        }
        if self._starts[-1]:
            self._check_specs(next(shard for shard in shards if shard.examples))
        for shard in shards:
            for image in shard.examples:
                if image not in self._places:
                    raise UserError(
                        f"an image of {shard.path} is in none of the shards of cached "
                        "features beside it. Run `vit22b cache-features` again."
                    )

    def _check_specs(self, shard):
        """All examples are packed alike: the first one shows whether they fit."""
        try:
            unpack(tf.constant(shard.example(0)), self._specs)
        except (tf.errors.InvalidArgumentError, ValueError) as error:
            raise UserError(
                f"the examples of {shard.path} have not the features that the layout "
                "beside it says. Delete the folder and run `vit22b cache-features` "
                "again."
            ) from error

    def num_records(self, split: str) -> int:
        """The number of examples."""
        return int(self._starts[-1])

    def records(self, split: str, order: tf.data.Dataset) -> tf.data.Dataset:
        """One example for each index (int64) in `order`, in that order."""

        def look_up(index):
            packed, row = tf.numpy_function(
                self._read, [index], [tf.string, tf.string], stateful=False
            )
            packed, row = tf.ensure_shape(packed, []), tf.ensure_shape(row, [])
            example = unpack(packed, self._specs)
            return {**example, "images": self._tokens.decode(row)}

        function = tf.autograph.experimental.do_not_convert(look_up)
        return order.map(function, num_parallel_calls=tf.data.AUTOTUNE)

    def row(self, index: int) -> np.ndarray:
        """The tokens [length, width] of one example."""
        return self._tokens.array(self._row(*self._place(index)))

    def without_tokens(self) -> tf.data.Dataset:
        """All examples in order, without their `images`."""

        def packed_one(index):
            shard, place = self._place(index)
            return shard.example(place)

        def look_up(index):
            packed = tf.numpy_function(packed_one, [index], tf.string, stateful=False)
            return unpack(tf.ensure_shape(packed, []), self._specs)

        function = tf.autograph.experimental.do_not_convert(look_up)
        numbers = tf.data.Dataset.range(int(self._starts[-1]))
        return numbers.map(function, num_parallel_calls=tf.data.AUTOTUNE)

    def _place(self, index):
        """The shard of an example, and its place in it."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[number], int(index - self._starts[number])

    def _read(self, index):
        shard, place = self._place(index)
        return shard.example(place), self._row(shard, place)

    def _row(self, shard, place):
        owner, row = self._places[shard.examples[place]]
        tokens = owner.row(row)
        if len(tokens) != self._tokens.num_bytes:
            raise UserError(
                f"row {row} of {owner.path} has {len(tokens)} bytes, but tokens of the "
                f"layout beside it {self._tokens.num_bytes}. Delete the folder and run "
                "`vit22b cache-features` again."
            )
        return tokens
