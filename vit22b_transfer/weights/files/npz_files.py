"""NumPy's archives of arrays, read member by member; pickled objects are refused."""

import functools
import io
import os
import struct
import zipfile
import zlib
from typing import Any

import ml_dtypes
import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import damaged, quoted
from vit22b_transfer.weights.files.stored_tensors import (
    GET_AGAIN,
    StoredTensor,
    check_inflated,
    check_name,
    is_shape,
    plain_reader,
    read_bytes,
    refuse_other_content,
)
from vit22b_transfer.weights.mapping import num_bytes

# A member takes 46 bytes and its name of the archive's directory, which is read in one
# piece; published models have under 2,000 of them.
_MAX_DIRECTORY = 4 << 20
_MAX_MEMBERS = 20_000
# NumPy's own limit, which it looks at when it has read the header.
_MAX_HEADER = 10_000
_VERSIONS = {(1, 0): "<H", (2, 0): "<I"}
# Deflate cannot make more of one byte.
_MAX_FOLD_OF_MEMBER = 1_032


def open_npz(path: str) -> dict[str, StoredTensor]:
    """The arrays of an archive, unread; see `tensor_files.open_tensors`.

    What its members take in memory is bounded by `check_inflated`.
    """
    refuse_other_content(path)
    # One member that is compressed, for slices of stacked layers.
    inflate = functools.lru_cache(maxsize=1)(functools.partial(_inflate, path))
    with _SmallReads(io.FileIO(path)) as file, _opened(path, file) as archive:
        members = archive.infolist()
        if len(members) > _MAX_MEMBERS:
            raise UserError(
                f"{path} has {len(members)} members, more than the {_MAX_MEMBERS} that "
                f"a model may have. {GET_AGAIN}"
            )
        needed = sum(info.file_size for info in members)
        check_inflated(path, os.path.getsize(path), needed)
        tensors = {}
        for info in members:
            if not info.filename.endswith(".npy"):
                raise UserError(
                    f"{path} holds {quoted(info.filename)}, which is no array: the "
                    "file is no npz (PyTorch's pickles are zip files too; they are not "
                    "opened)."
                )
            name = info.filename.removesuffix(".npy")
            check_name(path, name)
            if name in tensors:
                raise UserError(f"{path}: {name} is there twice. {GET_AGAIN}")
            with damaged(f"{path}: {name}", GET_AGAIN):
                tensors[name] = _npz_member(path, archive, info, name, inflate)
    return tensors


class _SmallReads(io.BufferedReader):
    """A file of which not much is read at a time, as ZipFile does of a directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes; UserError for more than a directory may have."""
        if size is None or size < 0:
            size = os.path.getsize(self.name) - self.tell()
        if size > _MAX_DIRECTORY:
            raise UserError(
                f"{self.name} has a directory of {size} bytes, more than the "
                f"{_MAX_DIRECTORY} that the arrays of a model need. {GET_AGAIN}"
            )
        return super().read(size)


def _opened(path: str, file: io.BufferedReader) -> zipfile.ZipFile:
    with damaged(path, GET_AGAIN):
        try:
            return zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise UserError(
                f"{path} is no npz file, or truncated: {error}. {GET_AGAIN}"
            ) from error


def _npz_member(
    path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, inflate: Any
) -> StoredTensor:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
            f"{path}: {name} is compressed by method {info.compress_type}, which NumPy "
            "does not write. Save it again with numpy.savez."
        )
    shape, fortran, dtype, header = _npy_header(path, archive, info, name)
    needed = header + num_bytes(shape, dtype)
    if info.file_size != needed:
        raise UserError(
            f"{path}: {name} has {info.file_size} bytes, but shape {shape} of {dtype} "
            f"takes {needed}. {GET_AGAIN}"
        )
    if info.file_size > _MAX_FOLD_OF_MEMBER * (info.compress_size + 64):
        raise UserError(
            f"{path}: {name} has {info.compress_size} bytes, which cannot become the "
            f"{info.file_size} of its shape. {GET_AGAIN}"
        )
    if info.compress_type == zipfile.ZIP_STORED and not fortran:
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            lengths = struct.unpack("<HH", file.read(4))
        at = info.header_offset + 30 + sum(lengths)
        if at + info.file_size > os.path.getsize(path):
            raise UserError(
                f"{path}: {name} ends after the end of the file. {GET_AGAIN}"
            )
        plain = plain_reader(path, at + header, shape, dtype)
        return StoredTensor(shape, dtype, path, _checked(plain, path, at, header, info))

    def read(layer: int | None = None) -> np.ndarray:
        data = inflate(info.filename, header, num_bytes(shape, dtype)).view(dtype)
        whole = data.reshape(shape, order="F" if fortran else "C")
        return whole if layer is None else whole[layer]

    return StoredTensor(shape, dtype, path, read)


def _npy_header(path, archive, info, name):
    """(shape, fortran order, dtype, bytes of the header) of a member."""
    with (
        damaged(f"{path}: {name} has no readable header: it", GET_AGAIN),
        archive.open(info) as member,
    ):
        start = member.read(8)
        version = np.lib.format.read_magic(io.BytesIO(start))
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is unknown")
        field = member.read(struct.calcsize(_VERSIONS[version]))
        (length,) = struct.unpack(_VERSIONS[version], field)
        if length > _MAX_HEADER:
            raise ValueError(f"it announces {length} bytes of header")
        text = io.BytesIO(field + member.read(length))
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(text)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(text)
        header = len(start) + len(field) + length
        if not is_shape(shape):
            raise ValueError(f"its shape is {shape}")
    if dtype.hasobject:
        raise UserError(
            f"{path}: {name} holds pickled Python objects; to load them runs "
            "whatever code they hold, so they are not opened. Save plain arrays with "
            "numpy.savez."
        )
    if dtype == np.dtype("V2"):  # how NumPy saves bfloat16
        dtype = np.dtype(ml_dtypes.bfloat16)
    is_number = dtype.kind in "biuf" or dtype == ml_dtypes.bfloat16
    if not is_number or dtype.subdtype or not dtype.itemsize:
        raise UserError(f"{path}: {name} has the dtype {dtype}, which is no number.")
    return shape, fortran, dtype, header


def _checked(plain, path, at, header, info):
    """The reader `plain`, comparing a whole tensor with its checksum in the archive."""

    def read(layer: int | None = None) -> np.ndarray:
        data = plain(layer)
        if layer is None:
            with open(path, "rb") as file:
                file.seek(at)
                start = zlib.crc32(file.read(header))
            if zlib.crc32(data.reshape(-1).view(np.uint8), start) != info.CRC:
                raise UserError(
                    f"{path}: {info.filename} does not match its checksum. {GET_AGAIN}"
                )
        return data

    return read


def _inflate(path: str, member: str, header: int, count: int) -> np.ndarray:
    with (
        damaged(f"{path}: {member}", GET_AGAIN),
        zipfile.ZipFile(path) as archive,
        archive.open(member) as file,
    ):
        file.read(header)
        data = read_bytes(file, f"{path}: {member}", count)
        file.read(1)  # at the end the checksum is compared
        return data
