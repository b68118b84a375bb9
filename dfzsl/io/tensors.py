"""Save and load tensors and their metadata as safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dfzsl.utils.errors import UserError

from .files import atomic

SUPPORTED_DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
SUPPORTED_DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], about: Mapping[str, object]
) -> None:
    """Write a safetensors file atomically. The same content gives the same bytes.

    Args:
        path: the file to write.
        tensors: tensors by name.
        about: metadata of values that JSON can represent.

    Raises:
        OSError: the file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {name: json.dumps(value) for name, value in about.items()}
    with atomic(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from None
        _order_header(temporary)


def _order_header(path: Path) -> None:
    """Sort the header of a safetensors file, whose order is random otherwise."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


def load_tensors(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Load a file that `save_tensors` wrote. No code in the file is executed.

    Args:
        path: the file to read.
        kind: expected value of "kind" in the metadata.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        UserError: the file is missing, is not safetensors or of another kind, or a tensor has an unsupported
            type or values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} file") from None
    except (SafetensorError, OSError, ValueError, RecursionError, RuntimeError) as error:
        raise UserError(f"{path}: not a {kind} file ({error})") from None
    if about.get("kind") != kind:
        raise UserError(f"{path}: expected a {kind} file, found {about.get('kind') or 'plain tensors'}")
    for name, tensor in tensors.items():
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise UserError(f"{path}: tensor '{name}' has the unsupported type {tensor.dtype}")
        # aminmax propagates NaN and needs one pass over memory; isfinite would make a copy.
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not torch.stack(tensor.aminmax()).isfinite().all()
        ):
            raise UserError(f"{path}: tensor '{name}' has values that are not finite")
    return tensors, about
