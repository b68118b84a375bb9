"""Import linear classifiers of PyTorch, safetensors, scikit-learn and skops files as teachers."""

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

from dfzsl.io.class_names import check_class_names
from dfzsl.io.files import read_json, read_text
from dfzsl.io.untrusted.archives import npz_names, read_npz_array
from dfzsl.io.untrusted.memory_limited import read_arrays
from dfzsl.safe_pickle import load as load_checkpoint
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import UserError, unknown_name

# Weights of heads in PyTorch, scikit-learn, torchvision, timm and Hugging Face.
WEIGHT_NAMES = (
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
    """Import a trained linear classifier as a teacher.

    A file with a single weight vector is a binary classifier whose score is positive for the second class. It
    becomes a teacher of two classes.

    Args:
        path: a PyTorch state dict (.pt, .pth, .bin, .ckpt; no code in it is executed), .safetensors, or a
            scikit-learn classifier as .npz (coef_, optionally intercept_ and classes_) or .skops.
        classnames: a list, or a file: text (one name per line), JSON (a list, or Hugging Face's id2label) or
            CSV (a column called name, class or label, or the only column); by default, scikit-learn's
            classes_.
        backbone: id of the image encoder that the features come from (`Backbone.identity`).
        normalized: serve a cosine classifier, cos(x, w) + b, instead of the linear one, x.w + b.
        weight: name of the weight tensor (C, d) in the file; by default that of common heads, or the only
            matrix.
        bias: name of the bias tensor (C,) in the file; by default the one that belongs to `weight`, if any.

    Returns:
        The teacher.

    Raises:
        UserError: the file has no such classifier, or the class names do not fit it.
    """
    tensors = _load_tensors(Path(path))
    weight_name = weight or _find_weight(tensors, path)
    bias_name = bias or _bias_name(weight_name)
    weights = _float_tensor(tensors, weight_name, path)
    biases = _float_tensor(tensors, bias_name, path).reshape(-1) if bias or bias_name in tensors else None
    weights = weights.reshape(1, -1) if weights.dim() == 1 else weights
    if weights.dim() != 2:
        shape = tuple(weights.shape)
        raise UserError(f"{path}: '{weight_name}' has shape {shape}; a head's weight is (classes, features)")
    if biases is not None and len(biases) != len(weights):
        raise UserError(
            f"{path}: '{weight_name}' has {len(weights)} rows, but there are {len(biases)} intercepts"
        )
    if len(weights) == 1:
        # The two linear scores differ by the binary score. Cosines do not depend on the length of a weight.
        scale = 1.0 if normalized else 0.5
        weights = torch.cat([-weights, weights]) * scale
        biases = None if biases is None else torch.cat([-biases, biases]) * scale
    names = _read_classnames(classnames, tensors.get("classes_"), path)
    if len(names) != len(weights):
        raise UserError(f"{path}: a classifier of {len(weights)} classes, but {len(names)} names were given")
    biases = None if biases is None else biases.contiguous()
    try:
        return Teacher(weights.contiguous(), names, backbone, normalized, bias=biases)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _load_tensors(path: Path) -> dict[str, Any]:
    """Load all tensors of a file by name, and "classes_" as a list of strings."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if suffix == ".npz":
            content = _as_tensors({name: read_npz_array(path, name) for name in npz_names(path)})
        elif suffix == ".skops":
            if importlib.util.find_spec("skops") is None:
                raise UserError(
                    f"{path}: install skops to read it (pip install skops), or save coef_ as .npz"
                )
            reader = "dfzsl.io.untrusted.skops_reader:read_linear_classifier"
            content = _as_tensors(read_arrays(reader, path))
        elif suffix == ".safetensors":
            content = load_file(path)
        elif suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
            content = load_checkpoint(path)
        else:
            raise UserError(
                f"{path}: a teacher is imported from .pt, .pth, .bin, .safetensors, .npz or .skops; a "
                "pickle or joblib file may execute code: save coef_ and intercept_ with numpy.savez"
            )
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile, zlib and skops raise many types for a broken archive
        raise UserError(f"{path}: it cannot be read as {suffix} ({error})") from None
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        nested = [content[key] for key in ("state_dict", "model", "model_state_dict") if key in content]
        if not nested:
            break
        content = nested[0]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: it has a {type(content).__name__} in place of a state dict")
    return {
        str(key).removeprefix("module."): value.detach() if isinstance(value, Tensor) else value
        for key, value in content.items()
        if isinstance(value, Tensor) or key == "classes_"
    }


def _as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the floating-point arrays of scikit-learn as tensors, and "classes_" as a list of names."""
    content: dict[str, Any] = {
        name: torch.from_numpy(array)
        for name, array in arrays.items()
        if array.dtype.kind == "f" and name != "classes_"
    }
    if "classes_" in arrays:
        content["classes_"] = [str(name) for name in arrays["classes_"].tolist()]
    return content


def _find_weight(tensors: Mapping[str, Any], path: object) -> str:
    """Return the name of the head's weight. Raises UserError where it is ambiguous."""
    dims = {name: value.dim() for name, value in tensors.items() if isinstance(value, Tensor)}
    # The weight of a binary head may be a vector.
    matrices = [name for name, dim in dims.items() if dim == 2 or (dim == 1 and name in WEIGHT_NAMES)]
    common = [name for name in WEIGHT_NAMES if name in matrices]
    if len(common) == 1 or (common and len(matrices) == 1):
        return common[0]
    if len(matrices) == 1:
        return matrices[0]
    listed = ", ".join(matrices[:20]) or "none"
    raise UserError(
        f"{path}: give the name of the weight matrix with --weight; matrices in the file: {listed}"
    )


def _bias_name(weight_name: str) -> str:
    return "intercept_" if weight_name == "coef_" else weight_name.removesuffix("weight") + "bias"


def _float_tensor(tensors: Mapping[str, Any], name: str, path: object) -> Tensor:
    """Return a tensor as float32, which the teacher computes with."""
    value = tensors.get(name)
    if not isinstance(value, Tensor):
        raise unknown_name(f"tensor of {path}", name, [key for key in tensors if key != "classes_"])
    if not value.is_floating_point():
        raise UserError(f"{path}: '{name}' holds {value.dtype}, not floating-point numbers")
    return value.float()


def _read_classnames(
    source: str | os.PathLike[str] | Sequence[str], classes: Sequence[str] | None, path: object
) -> list[str]:
    """Return class names from a list or a file, by default `classes` of the classifier."""
    if not isinstance(source, str | os.PathLike):
        if not source and classes is None:
            raise UserError(f"{path}: it has no class names; give them with --classes")
        return check_class_names(list(source or classes or ()), path)
    where = Path(source)
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
        names = _read_csv_column(where)
    else:
        names = [line.strip() for line in read_text(where).splitlines() if line.strip()]
    return check_class_names(names, where)


def _read_csv_column(path: Path) -> list[str]:
    """Return the column of class names."""
    rows = [row for row in csv.reader(io.StringIO(read_text(path))) if any(cell.strip() for cell in row)]
    if not rows:
        raise UserError(f"{path}: it has no class names")
    header = [cell.strip().lower() for cell in rows[0]]
    column = next((header.index(name) for name in NAME_COLUMNS if name in header), None)
    if column is not None:
        rows = rows[1:]
    elif len(header) == 1:
        column = 0
    else:
        raise UserError(f"{path}: no column is called {', '.join(NAME_COLUMNS[:-1])} or {NAME_COLUMNS[-1]}")
    if any(len(row) <= column for row in rows):
        raise UserError(f"{path}: a row has no column {column + 1}")
    return [row[column].strip() for row in rows]
