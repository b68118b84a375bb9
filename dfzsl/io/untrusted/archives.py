"""Check the sizes that zip, npz and tar archives declare before reading them."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import math
import os
import tarfile
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from dfzsl.utils.errors import UserError

MIN_CONTENT, MAX_EXPANSION = (
    1 << 28,
    100,
)  # bytes that any archive may hold; and bytes of content per byte of archive
MAX_TAR_HEADER = 1 << 20  # bytes, with the long names and PAX records before a member
OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


def check_expansion(path: str | os.PathLike[str], size: int, floor: int = MIN_CONTENT) -> None:
    """Refuse an archive whose content is far larger than real data can be compressed.

    Args:
        path: the archive.
        size: bytes of its content when extracted.
        floor: bytes that any archive may hold, however small it is.

    Raises:
        UserError: `size` is above `floor` plus 100 times the size of the archive.
    """
    if size > floor + MAX_EXPANSION * os.stat(path).st_size:
        raise UserError(f"{path}: unsafe, not read (it expands to {size:,} bytes)")


def check_zip(path: str | os.PathLike[str], floor: int = MIN_CONTENT) -> None:
    """Refuse a zip archive that declares too much content, or that two readers could read differently.

    Raises:
        UserError: as `check_expansion`, or there are bytes before the archive, where readers differ in how
            they locate its members.
        OSError, zipfile.BadZipFile: the file is not a zip archive.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    check_expansion(path, sum(member.file_size for member in members), floor)
    if min((member.header_offset for member in members), default=0) > 0:
        raise UserError(f"{path}: unsafe, not read (there are bytes before the archive)")


def npz_names(path: str | os.PathLike[str]) -> list[str]:
    """List the arrays of an npz file. Raises OSError or zipfile.BadZipFile for another file."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_npz_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """Read the array `name` of an npz file in this machine's byte order.

    Arrays of objects are refused, because numpy pickles them.

    Raises:
        UserError: the archive or the array declares more content than it has.
        Exception: the file is broken; numpy, zipfile and zlib raise many kinds.
    """
    check_zip(path)
    with zipfile.ZipFile(path) as archive:
        _check_npy(archive, archive.getinfo(f"{name}.npy"))
    with np.load(path, allow_pickle=False) as file:
        array = file[name]
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuse an array whose header declares more numbers than the member holds; numpy would allocate them."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"version {version} of numpy's format")
    if max(math.prod(shape), 1) * dtype.itemsize > member.file_size:
        raise ValueError(f"its header claims {shape} {dtype}, but it has {member.file_size:,} bytes")


class _LimitedFile:
    """A file from which at most `remaining` bytes can be read; seeking is free."""

    def __init__(self, file: IO[bytes], remaining: int) -> None:
        self.file, self.remaining = file, remaining
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > self.remaining:
            raise tarfile.ReadError("a header is too large")
        self.remaining -= size
        return self.file.read(size)


@contextlib.contextmanager
def open_tar(path: str | os.PathLike[str]) -> Iterator[Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]]:
    """Open a tar archive, which may be compressed, and yield an iterator over (archive, member).

    tarfile reads long names, PAX records and sparse maps into memory without a limit; here they are limited
    to MAX_TAR_HEADER.

    Raises:
        tarfile.TarError: a header is broken or too large.
    """
    with open(path, "rb") as start:
        magic = start.read(6)
    opener = next((opener for mark, opener in OPENERS.items() if magic.startswith(mark)), open)
    with opener(path, "rb") as content:
        limited = _LimitedFile(content, MAX_TAR_HEADER)
        with tarfile.open(fileobj=limited, mode="r:") as archive:  # type: ignore[call-overload]
            yield _members(archive, limited)


def _members(
    archive: tarfile.TarFile, limited: _LimitedFile
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    while (member := archive.next()) is not None:
        limited.remaining = member.size
        yield archive, member
        limited.remaining = MAX_TAR_HEADER
        # tarfile keeps every header, and a small archive may have millions.
        archive.members.clear()  # type: ignore[attr-defined]
