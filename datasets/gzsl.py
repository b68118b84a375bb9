"""Provide five data sets of generalized zero-shot learning in the xlsa17 format (Xian et al., TPAMI 2019).

Base classes are the seen classes, new classes the unseen ones. `DATASET.SUBSAMPLE_CLASSES` base selects seen
classes with trainval and test_seen, new selects unseen classes with test_unseen, and all selects every class
in the files' order with both test sets. U, S and H are per-class accuracies over `all`, with the harmonic
mean H = 2US / (U + S).
"""

from __future__ import annotations

import os
import re
import zlib
from typing import Any

import numpy as np
import torch
from dassl.data.datasets import DATASET_REGISTRY, Datum

from dfzsl.utils.dassl_plugin import add_keys, register
from dfzsl.utils.errors import UserError

from .base import ClassDataset, Row, Split, escapes_folder, require_path
from .features import FeatureDatum, unit_rows
from .images import read_lines
from .mat import read_mat

add_keys("DATASET", FEATURES="")


class XLSA17(ClassDataset):
    """A data set in the xlsa17 format: `folder` contains att_splits.mat or clip_splits.mat (preferred).

    - With `DATASET.FEATURES` empty, the examples are the images in `folder/images` that res101.mat lists.
    - With `DATASET.FEATURES` a file, for example ViTB16.mat with `features` (d, n), they are image features.

    A splits file contains `trainval_loc`, `test_seen_loc` and `test_unseen_loc`, indices of examples from 1,
    and `allclasses_names`. Without the latter (FLO), classnames.txt has a class name per line in label order.
    `cls_features` (d, C) of a clip_splits.mat are read as `text_features`. `labels` count from 1.
    """

    def read(self) -> Split:
        hint = self.repair_hint()
        clip = os.path.join(self.dataset_dir, "clip_splits.mat")
        path = clip if os.path.exists(clip) else os.path.join(self.dataset_dir, "att_splits.mat")
        splits = load_mat(path, hint)
        source = os.path.join(self.dataset_dir, self.features_file or "res101.mat")
        data = load_mat(source, hint, ["labels", "features" if self.features_file else "image_files"])
        labels = _read_integers(data, "labels", source) - 1
        n = len(labels)
        names = self._classnames_of(splits, path)
        if n == 0 or labels.min() < 0 or labels.max() >= len(names):
            raise UserError(f"{source}: labels must be 1 to {len(names)}, the classes of {path}")

        indices = {
            name: _read_indices(splits, name, n, path)
            for name in ("trainval_loc", "test_seen_loc", "test_unseen_loc")
        }
        if len(np.unique(np.concatenate(list(indices.values())))) < sum(map(len, indices.values())):
            raise UserError(f"{path}: trainval_loc, test_seen_loc and test_unseen_loc share images")
        seen, unseen = (np.unique(labels[indices[name]]) for name in ("test_seen_loc", "test_unseen_loc"))
        if np.intersect1d(seen, unseen).size or not np.isin(labels[indices["trainval_loc"]], seen).all():
            raise UserError(f"{path}: a class is both seen and unseen; {hint}")
        if "cls_features" in splits:
            self.text_features = self._text_features(splits["cls_features"], names, path)

        make_rows = self._feature_rows if self.features_file else self._image_rows
        train = [] if self.data_free else make_rows(data, labels, names, indices["trainval_loc"], source)
        test = np.sort(np.concatenate([indices["test_seen_loc"], indices["test_unseen_loc"]]))
        return Split(names, train, [], make_rows(data, labels, names, test, source), unseen.tolist())

    def __init__(self, cfg: Any) -> None:
        self.features_file = cfg.DATASET.FEATURES
        super().__init__(cfg)

    def datum(self, row: Row, label: int) -> Datum:
        if row.feature is None:
            return super().datum(row, label)
        return FeatureDatum(row.feature, row.path, label, classname=row.classname)

    def _classnames_of(self, splits: dict[str, np.ndarray], path: str) -> list[str]:
        if "allclasses_names" in splits:
            return [readable_name(name) for name in _read_texts(splits, "allclasses_names", path)]
        names = os.path.join(self.dataset_dir, "classnames.txt")
        return read_lines(
            names, f"{path} has no allclasses_names; write one class name per line in label order"
        )

    def _text_features(self, table: np.ndarray, names: list[str], path: str) -> dict[str, torch.Tensor]:
        """Return text embeddings (d,) by class name."""
        if table.ndim != 2 or table.shape[1] != len(names):
            raise UserError(
                f"{path}: cls_features must be (d, {len(names)}), a column per class; it is {table.shape}"
            )
        return dict(zip(names, _unit_columns(table, f"{path}: cls_features"), strict=True))

    def _feature_rows(self, data, labels, names, indices, source: str) -> list[Row]:
        """Return the rows of image features."""
        table = data["features"]
        if table.ndim != 2 or table.shape[1] != len(labels):
            raise UserError(
                f"{source}: features must be (d, {len(labels)}), a column per image; they are {table.shape}"
            )
        rows = _unit_columns(table[:, indices], f"{source}: features")
        return [Row(source, int(c), names[c], row) for row, c in zip(rows, labels[indices], strict=True)]

    def _image_rows(self, data, labels, names, indices, source: str) -> list[Row]:
        """Return the rows of image files."""
        files = _read_texts(data, "image_files", source)
        if len(files) != len(labels):
            raise UserError(f"{source}: {len(files)} image_files for {len(labels)} labels")
        image_dir = require_path(os.path.join(self.dataset_dir, "images"), self.repair_hint())
        num_skipped = _count_foreign_parts(files[indices[0]], image_dir)
        if outside := [file for file in files if escapes_folder("/".join(file.split("/")[num_skipped:]))]:
            raise UserError(f"{source}: '{outside[0]}' is outside of {image_dir}")
        paths = [os.path.join(image_dir, *files[index].split("/")[num_skipped:]) for index in indices]
        return [Row(path, int(c), names[c]) for path, c in zip(paths, labels[indices], strict=True)]


@register(DATASET_REGISTRY, replace=True)
class AWA2(XLSA17):
    folder = "AWA2"
    template = "a photo of a {}, a type of animal."


@register(DATASET_REGISTRY, replace=True)
class CUB(XLSA17):
    folder = "CUB"
    template = "a photo of a {}, a type of bird."


@register(DATASET_REGISTRY, replace=True)
class SUN(XLSA17):
    folder = "SUN"


@register(DATASET_REGISTRY, replace=True)
class FLO(XLSA17):
    folder = "FLO"
    template = "a photo of a {}, a type of flower."


@register(DATASET_REGISTRY, replace=True)
class APY(XLSA17):
    folder = "APY"


def load_mat(path: str, hint: str, names: list[str] | None = None) -> dict[str, np.ndarray]:
    """Read a MATLAB file (v5 to v7).

    Args:
        path: the file.
        hint: instruction that ends an error message.
        names: read only these arrays, all of which are required.

    Raises:
        UserError: the file is missing or broken, or lacks one of `names`.
    """
    require_path(path, hint)
    try:
        arrays = read_mat(path, names)
    except (ValueError, OSError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}: not a readable MATLAB file ({error}); {hint}") from None
    for name in names or []:
        if name not in arrays:
            raise UserError(f"{path}: '{name}' is missing; {hint}")
    return arrays


def readable_name(name: str) -> str:
    """Convert a class name: '001.Black_footed_Albatross' to 'Black footed Albatross', 'a+b' to 'a b'."""
    return re.sub(r"[+_]", " ", re.sub(r"^\d+\.", "", name.strip())).strip()


def _read_texts(content: dict[str, np.ndarray], name: str, path: str) -> list[str]:
    """Read a column of cells with one text each."""
    texts = [np.squeeze(cell) for cell in content[name].ravel()]
    if not all(text.ndim == 0 and isinstance(text.item(), str) for text in texts):
        raise UserError(f"{path}: '{name}' must be a column of cells with one text each")
    return [text.item().strip() for text in texts]


def _unit_columns(table: np.ndarray, source: str) -> torch.Tensor:
    """Convert the columns of a table (d, n) to L2-normalized rows (n, d)."""
    if table.dtype.kind != "f":
        raise UserError(f"{source} must be floating-point numbers; they are {table.dtype}")
    return unit_rows(torch.from_numpy(np.ascontiguousarray(table.T)), source)


def _read_integers(content: dict[str, np.ndarray], name: str, path: str) -> np.ndarray:
    """Read a column or row of integers as int64."""
    if name not in content:
        raise UserError(f"{path}: '{name}' is missing")
    array = content[name]
    flat = array.ravel()
    if (
        flat.size != max(array.shape, default=0)
        or flat.dtype.kind not in "iuf"
        or (flat != np.floor(flat)).any()
    ):
        raise UserError(
            f"{path}: '{name}' must be one column of integers; it is {array.dtype}, {array.shape}"
        )
    return flat.astype(np.int64)


def _read_indices(splits: dict[str, np.ndarray], name: str, n: int, path: str) -> np.ndarray:
    """Read the indices, from 0, of the images of a split."""
    indices = _read_integers(splits, name, path)
    if indices.size == 0:
        raise UserError(f"{path}: '{name}' is empty")
    if indices.min() < 1:
        raise UserError(f"{path}: '{name}' counts from {indices.min()}; xlsa17 counts from 1")
    if indices.max() > n:
        raise UserError(f"{path}: '{name}' names image {indices.max()} of {n}")
    return indices - 1


def _count_foreign_parts(file: str, image_dir: str) -> int:
    """Count the leading parts of a path on the authors' machine that the path in `image_dir` lacks."""
    parts = file.split("/") if len(file) < 4096 else []  # no system has longer paths
    for num_skipped in range(len(parts)):
        suffix = parts[num_skipped:]
        if ".." not in suffix and os.path.isfile(os.path.join(image_dir, *suffix)):
            return num_skipped
    raise UserError(f"{image_dir}: '{file}' is not in it; copy the data set's images there")
