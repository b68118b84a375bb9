"""Provide a file of image features as a data set."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from dassl.data.datasets import DATASET_REGISTRY, Datum
from safetensors import SafetensorError, safe_open

from dfzsl.io.class_names import check_class_names
from dfzsl.io.tensors import SUPPORTED_DTYPES
from dfzsl.io.untrusted.archives import npz_names, read_npz_array
from dfzsl.utils.dassl_plugin import register
from dfzsl.utils.errors import UserError

from .base import ClassDataset, Row, Split

TEXT_FIELDS = ("classnames", "backbone", "weights", "template")  # entries of a feature file that are text
INTEGER_TYPES = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class FeatureDatum(Datum):
    """A Datum with an L2-normalized feature (d,); `impath` is the feature file."""

    def __init__(self, feature: torch.Tensor, impath: str, label: int, domain: int = 0, classname: str = ""):
        super().__init__(impath=impath, label=label, domain=domain, classname=classname)
        self._feature = feature

    @property
    def feature(self) -> torch.Tensor:
        return self._feature


@register(DATASET_REGISTRY, replace=True)
class Features(ClassDataset):
    """A file of image features, .npz or .safetensors, at the path `DATASET.ROOT`.

    Its arrays are
        x_test (n, d), y_test (n,): test features and labels from 0.
        x_train, y_train, x_val, y_val: optional. Without x_train, x_val is the training set.
        text (C, d): text embeddings of the class names, optional.
        new (k,): labels of the new classes; by default the second half.
    and its texts are
        classnames (C,): an array of text in an npz, a JSON list in the metadata of a safetensors file.
        backbone, weights, template: optional, in the same form.
    Features may have any norm and float type; they are converted to float32 and L2-normalized.
    """

    backbone_id: str | None = None
    weights_id: str | None = None

    def repair_hint(self) -> str:
        return "DATASET.ROOT must be a feature file, .npz or .safetensors"

    def read(self) -> Split:
        path = self.dataset_dir
        arrays, about = open_features(path)
        classnames = check_class_names(about.get("classnames"), path)
        if not classnames:
            raise UserError(f"{path}: classnames is missing or empty")
        self.backbone_id, self.weights_id = about.get("backbone"), about.get("weights")
        if template := about.get("template"):
            if not isinstance(template, str) or re.findall("[{}]+", template) != ["{}"]:
                raise UserError(f"{path}: template must be a text with one {{}} for the class name")
            self.template = template

        def rows(part: str) -> list[Row]:
            if f"x_{part}" not in arrays:
                return []
            x = unit_rows(arrays[f"x_{part}"](), f"{path}: x_{part}")
            y = arrays[f"y_{part}"]() if f"y_{part}" in arrays else torch.empty(0)
            labels = check_labels(y, len(x), len(classnames), f"{path}: y_{part}").tolist()
            return [Row(path, c, classnames[c], feature) for feature, c in zip(x, labels, strict=True)]

        test = rows("test")
        if not test:
            raise UserError(f"{path}: no test features (x_test, y_test)")
        train = [] if self.data_free else rows("train")
        val = [] if self.data_free else rows("val")
        if not train:
            train, val = val, []
        widths = {
            f"x_{part}": parts[0].feature.shape[0]
            for part, parts in (("train", train), ("val", val), ("test", test))
            if parts and parts[0].feature is not None
        }
        if "text" in arrays:
            text = unit_rows(arrays["text"](), f"{path}: text")
            if len(text) != len(classnames):
                raise UserError(f"{path}: {len(text)} text rows for {len(classnames)} class names")
            widths["text"] = text.shape[1]
            self.text_features = dict(zip(classnames, text, strict=True))
        if len(set(widths.values())) > 1:
            dimensions = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise UserError(f"{path}: features must have one dimension, not {dimensions}")
        new = None
        if "new" in arrays:
            labels = arrays["new"]()
            new = sorted(labels.tolist()) if labels.ndim == 1 and labels.dtype in INTEGER_TYPES else [-1]
            if len(set(new)) < len(new) or not set(new) < set(range(len(classnames))):
                raise UserError(f"{path}: 'new' must contain some of the labels 0 to {len(classnames) - 1}")
        return Split(classnames, train, val, test, new)

    def datum(self, row: Row, label: int) -> FeatureDatum:
        assert row.feature is not None
        return FeatureDatum(row.feature, row.path, label, classname=row.classname)


def open_features(path: str) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, Any]]:
    """Open a feature file, .npz or .safetensors, without reading its features.

    Args:
        path: the file.

    Returns:
        A function for each array that reads it, and the texts of the file (classnames, backbone, ...).

    Raises:
        UserError: the file is of another kind or broken.
    """
    try:
        if path.endswith(".npz"):
            members = npz_names(path)
            names = [name for name in members if name not in TEXT_FIELDS]
            about = {name: read_array(path, name).tolist() for name in TEXT_FIELDS if name in members}
            return {name: partial(_array, path, name) for name in names}, about
        if path.endswith(".safetensors"):
            tensors = safe_open(path, framework="pt")
            about = {name: json.loads(value) for name, value in (tensors.metadata() or {}).items()}
            return {name: partial(_tensor, tensors, name, path) for name in tensors.keys()}, about  # noqa: SIM118
    except UserError:
        raise
    # zipfile raises RuntimeError for archives that need a password or a newer version.
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, SafetensorError) as error:
        raise UserError(f"{path}: not a readable feature file ({error})") from None
    raise UserError(f"{path}: the name of a feature file must end in .npz or .safetensors")


def read_array(path: str, name: str) -> np.ndarray:
    """Read the array `name` of an npz file. Raises UserError if it cannot be read."""
    try:
        return read_npz_array(path, name)
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many types for a broken archive
        raise UserError(f"{path}: '{name}' is not a readable array ({error})") from None


def _array(path: str, name: str) -> torch.Tensor:
    """Read an array of numbers of an npz file."""
    try:
        return torch.from_numpy(read_array(path, name))
    except TypeError as error:
        raise UserError(f"{path}: '{name}' is not a readable array of numbers ({error})") from None


def _tensor(tensors: Any, name: str, path: str) -> torch.Tensor:
    """Read a tensor of a safetensors file."""
    try:
        return tensors.get_tensor(name)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: '{name}' is not a readable array of numbers ({error})") from None


def check_labels(y: torch.Tensor, n: int, classes: int | None, source: str) -> torch.Tensor:
    """Check labels and convert them to int64.

    Args:
        y: (n,) labels from 0.
        n: number of features.
        classes: number of classes; None: any.
        source: file and array, for error messages.

    Raises:
        UserError: `y` has another shape or type, or a label is out of range.
    """
    if y.shape != (n,) or y.dtype not in INTEGER_TYPES:
        raise UserError(f"{source} must contain {n} integers, one per feature")
    y = y.long()
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < (1 << 40 if classes is None else classes):
        last = "..." if classes is None else classes - 1
        raise UserError(f"{source}: labels must be 0 to {last}")
    return y


def unit_rows(x: torch.Tensor, source: str) -> torch.Tensor:
    """Convert features to float32 and L2-normalize them.

    Args:
        x: (n, d), of any norm and float type.
        source: file and array, for error messages.

    Raises:
        UserError: `x` has another shape or type, or a row is zero or not finite.
    """
    if x.ndim != 2 or x.dtype not in SUPPORTED_DTYPES or not x.is_floating_point():
        raise UserError(
            f"{source} must be an array of floats of shape (n, d), not {x.dtype} of {tuple(x.shape)}"
        )
    x = x.float()
    norms = x.norm(dim=1, keepdim=True)
    if not torch.isfinite(norms).all() or (norms == 0).any():
        raise UserError(f"{source} has rows that are zero or not finite")
    return x / norms
