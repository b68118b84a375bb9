"""Checkpoints, those of the original too, which pickle whole schedulers, read without running code.

A pickle can call anything it names. Here it can name only what such a checkpoint needs: containers, tensors
and numpy numbers as they are, and schedulers and optimizers as inert objects that only hold their attributes.
"""

from __future__ import annotations

import pickle
import zipfile
from typing import Any

import torch

__all__ = ["Inert", "is_torchscript", "load_restricted"]

ADMITTED = {
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "set"),
    ("builtins", "tuple"),
    ("collections", "Counter"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "scalar"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.serialization", "_get_layout"),
}
INERT_MODULES = ("torch.optim", "dassl.optim")


class Inert:
    """Stands for an object of a checkpoint: holds its attributes, runs nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _bytes_of(text: str, encoding: str) -> bytes:
    """Bytes, in the pickle protocol of torch.save. Other encodings could double them, time and again."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}, which no checkpoint needs")
    return text.encode(encoding)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) == ("_codecs", "encode"):
            return _bytes_of
        if (module, name) in ADMITTED:
            return super().find_class(module, name)
        if module in ("torch", "torch.storage") and name.endswith("Storage") and name.isidentifier():
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if any(module == known or module.startswith(known + ".") for known in INERT_MODULES):
            return Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class _RestrictedPickle:
    """What torch.load uses of a pickle module."""

    __name__ = "dassl.utils.safe_pickle"
    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        return _Unpickler(file, **kwargs).load()


def is_torchscript(fpath: str) -> bool:
    """Whether torch.load would hand the file over to torch.jit.load, which some versions do in any case.

    Raises ValueError for an archive that grows when it is read, as those of torch.save never do.
    """
    if not zipfile.is_zipfile(fpath):
        return False
    with zipfile.ZipFile(fpath) as archive:
        members = archive.infolist()
    if any(member.filename.endswith("constants.pkl") for member in members):
        return True
    if any(member.file_size > member.compress_size for member in members):
        raise ValueError("it is a compressed archive, which torch.save never writes")
    return False


def load_restricted(fpath: str, map_location: Any = None) -> Any:
    """The checkpoint, its schedulers and optimizers as Inert. Raises pickle.UnpicklingError that says why."""
    try:
        return torch.load(
            fpath, map_location=map_location, pickle_module=_RestrictedPickle(), weights_only=False
        )
    except Exception as error:
        raise pickle.UnpicklingError(f"cannot load {fpath} as a checkpoint: {error}") from error
