"""NumPy's archives of arrays, read member by member; pickled objects are refused."""

import functools
import os
import struct
import zipfile
import zlib
from typing import Any

import ml_dtypes
import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.weights.files.stored_tensors import (
    GET_AGAIN,
    StoredTensor,
    plain_reader,
    read_bytes,
)
from vit22b_transfer.weights.mapping import num_bytes


def open_npz(path: str) -> dict[str, StoredTensor]:
    """The arrays of an archive, unread; see `tensor_files.open_tensors`."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is no npz file, or truncated: {error}. {GET_AGAIN}"
        ) from error
    # One member that is compressed, for slices of stacked layers.
    inflate = functools.lru_cache(maxsize=1)(functools.partial(_inflate, path))
    with archive:
        tensors = {}
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                raise UserError(
                    f"{path} holds {info.filename}, which is no array: the file is no "
                    "npz (PyTorch's pickles are zip files too; they are not opened)."
                )
            name = info.filename.removesuffix(".npy")
            if name in tensors:
                raise UserError(f"{path}: {name} is there twice. {GET_AGAIN}")
            tensors[name] = _npz_member(path, archive, info, name, inflate)
    return tensors


def _npz_member(
    path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, inflate: Any
) -> StoredTensor:
    shape, fortran, dtype, header = _npy_header(path, archive, info, name)
    needed = header + num_bytes(shape, dtype)
    if info.file_size != needed:
        raise UserError(
            f"{path}: {name} has {info.file_size} bytes, but shape {shape} of {dtype} "
            f"takes {needed}. {GET_AGAIN}"
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
    try:
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(member)
            header = member.tell()
    except (ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: {name} has no readable header: {error}. {GET_AGAIN}"
        ) from error
    if dtype.hasobject:
        raise UserError(
            f"{path}: {name} holds pickled Python objects; to load them runs "
            "whatever code they hold, so they are not opened. Save plain arrays with "
            "numpy.savez."
        )
    if dtype == np.dtype("V2"):  # how NumPy saves bfloat16
        dtype = np.dtype(ml_dtypes.bfloat16)
    if dtype.kind not in "biufV" or dtype.names:
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
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            file.read(header)
            data = read_bytes(file, f"{path}: {member}", count)
            file.read(1)  # at the end the checksum is compared
            return data
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: {member}: {error}. {GET_AGAIN}") from error
