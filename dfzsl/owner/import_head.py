"""A linear classifier of another toolbox as a teacher: its rows, its intercepts, its classes' names."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dfzsl.io.class_names import checked_names
from dfzsl.io.files import read_json, read_text
from dfzsl.io.untrusted.archives import npz_names, read_npz_array
from dfzsl.io.untrusted.memory_limited import read_arrays
from dfzsl.safe_pickle import load as load_checkpoint
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import UserError, unknown

# Heads by name, as torch, scikit-learn, torchvision, timm and Hugging Face call them.
HEADS = (
    *("weight", "coef_", "fc.weight", "classifier.weight", "head.weight", "heads.head.weight"),
    *("classifier.1.weight", "head.fc.weight", "linear.weight", "score.weight", "last_linear.weight"),
)
NAME_COLUMNS = ("name", "class", "classname", "class_name", "label")


def import_teacher(
    path: str | os.PathLike[str],
    *,
    classnames: str | os.PathLike[str] | Sequence[str] = (),
    backbone: str = "",
    normalized: bool = False,
    weight: str = "",
    bias: str = "",
) -> Teacher:
    """A teacher from a file of another toolbox.

    Args:
        path: a state dict of torch (.pt, .pth, .bin, .ckpt; read as data, nothing in it runs), .safetensors,
            a scikit-learn classifier as .npz (coef_, intercept_, perhaps classes_) or .skops.
        classnames: a list, or a file: text (a name a line), JSON (a list, or Hugging Face's id2label), CSV (a
            column called name, class or label, or the only one). Left out, classes_ of scikit-learn.
        backbone: id of the image encoder whose features it reads, as `Backbone.identity` says it.
        normalized: serve it as a cosine classifier, cos(x, w) + b, and not as the linear one, x.w + b.
        weight, bias: names of its two tensors in the file; by default the names of common heads, or the only
            matrix there is. A head without intercept has none.

    One row is a binary classifier, whose score is positive for the second class: it becomes two rows.
    Raises UserError for a file that holds no such classifier, and for names that do not fit it.
    """
    tensors = _tensors(Path(path))
    name = weight or _head(tensors, path)
    rows = _tensor(tensors, name, path)
    beside = name.removesuffix("weight") + "bias" if name != "coef_" else "intercept_"
    offset = _tensor(tensors, bias or beside, path) if bias or beside in tensors else None
    rows = rows.reshape(1, -1) if rows.dim() == 1 else rows
    if rows.dim() != 2:
        raise UserError(
            f"{path}: '{name}' has shape {tuple(rows.shape)}; a head's weight is (classes, features)"
        )
    offset = None if offset is None else offset.reshape(-1)
    if offset is not None and len(offset) != len(rows):
        raise UserError(f"{path}: '{name}' has {len(rows)} rows, but there are {len(offset)} intercepts")
    if len(rows) == 1:
        rows = torch.cat([-rows, rows]) * (1.0 if normalized else 0.5)
        offset = None if offset is None else torch.cat([-offset, offset]) * (1.0 if normalized else 0.5)
    names = _names(classnames, tensors.get("classes_"), path)
    if len(names) != len(rows):
        raise UserError(f"{path}: a classifier of {len(rows)} classes, but {len(names)} names were given")
    try:
        return Teacher(
            rows.contiguous(),
            names,
            backbone,
            normalized,
            bias=None if offset is None else offset.contiguous(),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _tensors(path: Path) -> dict[str, Any]:
    """All arrays of a file as tensors, by name, and "classes_" as a list of texts."""
    kind = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if kind == ".npz":
            found = _from_scikit_learn({name: read_npz_array(path, name) for name in npz_names(path)})
        elif kind == ".skops":
            if importlib.util.find_spec("skops") is None:
                raise UserError(f"{path}: reading it takes skops (pip install skops), or save coef_ as .npz")
            reader = "dfzsl.io.untrusted.skops_reader:read_linear_classifier"
            found = _from_scikit_learn(read_arrays(reader, path))
        elif kind == ".safetensors":
            found = load_file(path)
        elif kind in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
            found = load_checkpoint(path)
        else:
            raise UserError(
                f"{path}: a teacher is imported from .pt, .pth, .bin, .safetensors, .npz or .skops; a "
                "pickle or joblib file runs what it likes: save coef_ and intercept_ with numpy.savez"
            )
    except UserError:
        raise
    except Exception as error:  # of a broken archive, numpy, zipfile, zlib and skops raise many kinds
        raise UserError(f"{path}: it cannot be read as {kind} ({error})") from None
    while isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        inner = [found[key] for key in ("state_dict", "model", "model_state_dict") if key in found]
        if not inner:
            break
        found = inner[0]
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: it holds no state dict but a {type(found).__name__}")
    kept = {
        str(key).removeprefix("module."): value.detach() if isinstance(value, Tensor) else value
        for key, value in found.items()
        if isinstance(value, Tensor) or key == "classes_"
    }
    return kept


def _from_scikit_learn(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tensors of the floating-point arrays, and "classes_" as a list of texts."""
    tensors: dict[str, Any] = {
        name: torch.from_numpy(array)
        for name, array in arrays.items()
        if array.dtype.kind == "f" and name != "classes_"
    }
    if "classes_" in arrays:
        tensors["classes_"] = [str(name) for name in arrays["classes_"].tolist()]
    return tensors


def _head(tensors: Mapping[str, Any], path: object) -> str:
    # A binary head's weight may be one vector.
    shapes = {name: value.dim() for name, value in tensors.items() if isinstance(value, Tensor)}
    matrices = [name for name, dim in shapes.items() if dim == 2 or (dim == 1 and name in HEADS)]
    known = [name for name in HEADS if name in matrices]
    if len(known) == 1 or (known and len(matrices) == 1):
        return known[0]
    if len(matrices) == 1:
        return matrices[0]
    said = ", ".join(matrices[:20]) or "none"
    raise UserError(f"{path}: which matrix is the head? name it with --weight; there are: {said}")


def _tensor(tensors: Mapping[str, Any], name: str, path: object) -> Tensor:
    """The tensor as float32, in which all that follows is computed."""
    value = tensors.get(name)
    if not isinstance(value, Tensor):
        raise unknown(f"tensor of {path}", name, [key for key in tensors if key != "classes_"])
    if not value.is_floating_point():
        raise UserError(f"{path}: '{name}' holds {value.dtype}, not floating-point numbers")
    return value.float()


def _names(
    given: str | os.PathLike[str] | Sequence[str], classes: Sequence[str] | None, path: object
) -> list[str]:
    if not isinstance(given, str | os.PathLike):
        if not given and classes is None:
            raise UserError(f"{path}: it does not name its classes; give their names with --classes")
        return checked_names(list(given or classes or ()), path)
    where = Path(given)
    if where.suffix.lower() == ".json":
        names = read_json(where)
        if isinstance(names, dict):
            if isinstance(names.get("id2label"), dict):  # Hugging Face's config.json
                names = names["id2label"]
            try:
                pairs = sorted((int(key), value) for key, value in names.items())
            except (ValueError, TypeError):
                raise UserError(
                    f"{where}: class names are a JSON list, or an object from 0, 1, ..."
                ) from None
            if [key for key, _ in pairs] != list(range(len(pairs))):
                raise UserError(f"{where}: the classes of the object are not numbered 0, 1, ...")
            names = [value for _, value in pairs]
    elif where.suffix.lower() == ".csv":
        names = _column(where)
    else:
        names = [line.strip() for line in read_text(where).splitlines() if line.strip()]
    return checked_names(names, where)


def _column(path: Path) -> list[str]:
    rows = [row for row in csv.reader(io.StringIO(read_text(path))) if any(cell.strip() for cell in row)]
    if not rows:
        raise UserError(f"{path}: it names no class")
    heads = [cell.strip().lower() for cell in rows[0]]
    at = next((heads.index(name) for name in NAME_COLUMNS if name in heads), None)
    if at is not None:
        rows = rows[1:]
    elif len(heads) == 1:
        at = 0
    else:
        raise UserError(f"{path}: no column is called {', '.join(NAME_COLUMNS[:-1])} or {NAME_COLUMNS[-1]}")
    if any(len(row) <= at for row in rows):
        raise UserError(f"{path}: a row has no column {at + 1}")
    return [row[at].strip() for row in rows]
