"""Checkpoints of torch.save, in both of its formats, without torch.load.

torch.load guards against code, not against files that lie: it trusts what a pickle says of storages, calls
numpy with any bytes, and hashes any key.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch

from .unpickler import PLAIN, Call, Inert, Unpickler

__all__ = ["check_script", "load"]

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # at the start of the format before torch 1.6
MOST_DIMENSIONS = 64
INERT_MODULES = ("torch.optim", "dassl.optim", "__torch__")


class _Kind(NamedTuple):
    """A class of storages."""

    dtype: torch.dtype


class _Storage(NamedTuple):
    """`data` (bytes,) uint8, that is `count` numbers of `dtype`."""

    data: torch.Tensor
    dtype: torch.dtype
    count: int


def _size(numbers: Any) -> tuple[int, ...]:
    if type(numbers) not in (tuple, torch.Size) or len(numbers) > MOST_DIMENSIONS:
        raise pickle.UnpicklingError("it has a size that is none")
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
        raise pickle.UnpicklingError("it has a size that is none")
    return numbers


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> torch.Tensor:
    """A tensor of which every number is in its storage, and none is there twice over."""
    if type(storage) is not _Storage or len(_size(size)) != len(_size(stride)):
        raise pickle.UnpicklingError("it has a tensor of what is not stored")
    count = math.prod(size)
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + sum(_size((offset,)))
    if count > storage.count or (count and last >= storage.count):
        raise pickle.UnpicklingError("it has a tensor with more numbers than are stored")
    tensor = torch.empty(0, dtype=storage.dtype)
    if count:
        tensor.set_(storage.data.untyped_storage(), offset, size, stride)
    else:
        tensor = tensor.new_empty(size)
    return tensor.requires_grad_(requires_grad is True)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> torch.nn.Parameter:
    if not isinstance(data, torch.Tensor):
        raise pickle.UnpicklingError("it has a parameter that is not a tensor")
    return torch.nn.Parameter(data, requires_grad is True)


def _device(name: Any, index: Any = None) -> torch.device:
    if type(name) is not str or len(name) > 20 or type(index) not in (int, type(None)):
        raise pickle.UnpicklingError("it has a device that is none")
    return torch.device(name) if index is None else torch.device(name, index)


STORAGES = {
    "BFloat16": torch.bfloat16,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Short": torch.int16,
}

LISTS = ("bool", "double", "int", "tensor")  # of TorchScript

ADMITTED: Mapping[tuple[str, str], Any] = {
    **PLAIN,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{("torch", f"{name}Storage"): _Kind(dtype) for name, dtype in STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _Kind(torch.uint8),
    ("torch", "Size"): Call(lambda size: torch.Size(_size(size))),
    ("torch", "device"): Call(_device),
    **{("torch.jit._pickle", f"build_{kind}list"): Call(lambda values: values) for kind in LISTS},
    ("torch.jit._pickle", "restore_type_tag"): Call(lambda value, kind: value),
    ("torch._utils", "_rebuild_parameter"): Call(_parameter),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_tensor),
}


class _CheckpointUnpickler(Unpickler):
    """With storages: `stored` gives the bytes, (size,) uint8, of a key that claims to have `size` of them."""

    def __init__(self, file: BinaryIO, stored: Callable[[str, int], torch.Tensor]) -> None:
        super().__init__(file, ADMITTED)
        self.stored, self.storages = stored, dict[str, _Storage]()

    def find_class(self, module: str, name: str) -> Any:
        if any(module == known or module.startswith(known + ".") for known in INERT_MODULES):
            return Inert
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or [type(part) for part in pid[:5]] != [str, _Kind, str, str, int]:
            raise pickle.UnpicklingError("it asks for what is not a storage")
        word, kind, key, _, count, *view = pid
        if word != "storage" or any(part is not None for part in view) or count < 0:
            raise pickle.UnpicklingError("it asks for what is not a storage")
        size = count * kind.dtype.itemsize
        data = self.stored(key, size)
        if len(data) != size:
            raise pickle.UnpicklingError(f"its storage {key} has {len(data)} bytes, not the {size} it claims")
        self.storages[key] = _Storage(data, kind.dtype, count)
        return self.storages[key]


def check_script(pickled: bytes, length: Callable[[str], int]) -> None:
    """Raise unless one of the pickles of a TorchScript archive is as it says. torch.jit.load believes it, and
    reads memory beyond a storage that is shorter. `length` gives the bytes of a storage by its key."""
    unpickler = _CheckpointUnpickler(
        io.BytesIO(pickled), lambda key, _: torch.empty(length(key), dtype=torch.uint8)
    )
    try:
        unpickler.load()
    except Exception as error:
        raise pickle.UnpicklingError(str(error) or type(error).__name__) from error


def _member(file: BinaryIO, member: zipfile.ZipInfo) -> torch.Tensor:
    """The bytes of a member of an archive, (size,) uint8; zipfile would copy them several times over."""
    file.seek(member.header_offset + 26)
    file.seek(member.header_offset + 30 + sum(struct.unpack("<2H", file.read(4))))
    data = torch.empty(member.file_size, dtype=torch.uint8)
    if file.readinto(data.numpy()) != len(data) or zlib.crc32(data.numpy()) != member.CRC:  # type: ignore[attr-defined]
        raise pickle.UnpicklingError(f"its part {member.filename} is damaged")
    return data


def _load_archive(file: BinaryIO, size: int) -> Any:
    """The format since torch 1.6: an archive, not compressed, of one pickle and a member for each storage."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if any(name.endswith("constants.pkl") for name in members):
            raise pickle.UnpicklingError("it is a TorchScript program")
        if any(member.file_size != member.compress_size for member in archive.infolist()):
            raise pickle.UnpicklingError("it is a compressed archive, which torch.save never writes")
        # Else a thousand members could lie in one place.
        if sum(member.file_size for member in archive.infolist()) > size:
            raise pickle.UnpicklingError("its parts are longer than the whole")
        folder = next((name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")), "")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != sys.byteorder.encode():
            raise pickle.UnpicklingError("it is of a machine with another order of bytes")
        read: dict[str, torch.Tensor] = {}

        def stored(key: str, size: int) -> torch.Tensor:
            if key not in read:
                member = members.get(f"{folder}data/{key}")
                if member is None:
                    raise pickle.UnpicklingError(f"it does not hold its storage {key}")
                read[key] = _member(file, member)
            return read[key]

        return _CheckpointUnpickler(io.BytesIO(archive.read(f"{folder}data.pkl")), stored).load()


def _load_stream(file: Any, size: int) -> Any:
    """The format before: pickles of a magic number, a version, the writer's machine, the content and the keys
    of the storages; then each storage's count of numbers, in 8 bytes, and its numbers."""
    first = [Unpickler(file, PLAIN).load() for _ in range(3)]
    if first[:2] != [MAGIC, PROTOCOL]:
        raise pickle.UnpicklingError("it does not begin as torch's files do")
    claimed: dict[str, torch.Tensor] = {}

    def claim(key: str, its_size: int) -> torch.Tensor:
        if key not in claimed:
            if its_size + sum(map(len, claimed.values())) > size:
                raise pickle.UnpicklingError("its parts are longer than the whole")
            claimed[key] = torch.empty(its_size, dtype=torch.uint8)
        return claimed[key]

    unpickler = _CheckpointUnpickler(file, claim)
    content = unpickler.load()
    keys = Unpickler(file, PLAIN).load()
    if type(keys) is not list or {str} != {type(key) for key in keys} or sorted(keys) != sorted(claimed):
        raise pickle.UnpicklingError("it does not store what it names")
    for key in keys:
        if file.read(8) != struct.pack("<q", unpickler.storages[key].count):
            raise pickle.UnpicklingError(f"its storage {key} is not as long as it claims")
        memoryview(claimed[key].numpy())[:] = file.read(len(claimed[key]))
    return content


def load(path: str | os.PathLike[str]) -> Any:
    """What torch.save wrote, on the CPU, its schedulers and optimizers as Inert.

    Numpy's numbers are read as Python's. Raises OSError, or UnpicklingError that names the file and says what
    is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(4)
            file.seek(0)
            if start == b"PK\3\4":
                return _load_archive(file, size)
            # Asked for more than there is, a file makes room for it, a mapped one does not.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _load_stream(mapped, size)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a broken file leads to nearly any
        said = str(error) or type(error).__name__
        raise pickle.UnpicklingError(f"cannot load {os.fspath(path)} as a checkpoint: {said}") from error
