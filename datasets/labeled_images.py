"""Load labeled images or a feature file, to fit a teacher or to evaluate a classifier."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dfzsl.io.class_names import check_class_names
from dfzsl.utils.errors import UserError
from dfzsl.utils.progress import hide_progress_bars, progress_bar

from .base import ClassDataset, list_folders, list_images
from .encoding import encode_files
from .features import check_labels, open_features, unit_rows
from .images import read_class_names

DATA_HINT = "give a folder with a folder of images for each class, or a feature file (.npz, .safetensors)"


@dataclass(repr=False)
class LabeledFeatures:
    """Labeled features.

    Attributes:
        features: (n, d), L2-normalized.
        labels: (n,) indices into `classnames`.
        classnames: C class names.
        backbone: identity of the encoder, or "" if unknown.
        errors: an error message for each image that could not be read.
        text: (C, d) text embeddings, if a feature file has them.
        template: prompt template of `text`.
    """

    features: Tensor
    labels: Tensor
    classnames: list[str]
    backbone: str
    errors: list[str]
    text: Tensor | None = None
    template: str = ""

    def __repr__(self) -> str:
        n, d = self.features.shape
        encoder = self.backbone or "an unknown encoder"
        return f"LabeledFeatures({n:,} features of {len(self.classnames)} classes, d = {d}, {encoder})"

    def select_classes(self, classnames: Sequence[str]) -> LabeledFeatures:
        """Select classes, in the given order. Raises UserError for an unknown class."""
        index = {name: label for label, name in enumerate(self.classnames)}
        if missing := [name for name in classnames if name not in index]:
            raise UserError(
                f"no class '{missing[0]}'; the classes are {', '.join(self.classnames[:10])}, ..."
            )
        matches = self.labels[:, None] == torch.tensor([index[name] for name in classnames])
        rows = matches.any(1)
        labels = matches[rows].int().argmax(1)
        text = None if self.text is None else self.text[[index[name] for name in classnames]]
        return replace(
            self, features=self.features[rows], labels=labels, classnames=list(classnames), text=text
        )


def read_labeled_features(
    data: str | os.PathLike[str],
    open_backbone: Callable[[], Any],
    parts: Sequence[str] = ("test",),
    *,
    batch_size: int = 64,
    num_workers: int = 4,
    device: str | torch.device = "cpu",
    quiet: bool = True,
) -> LabeledFeatures:
    """Read labeled images from a folder of class folders, or features from a feature file.

    Class names are the names of the folders, or are given by a file classnames.txt of lines "folder name".

    Args:
        data: a folder, or a feature file (datasets/features.py).
        open_backbone: returns the encoder; called for images only.
        parts: splits to read from a feature file.
        batch_size: images per batch.
        num_workers: processes that decode images.
        device: device of the encoder.
        quiet: show no progress bar.

    Raises:
        UserError: there is no readable image, or the file has no labeled features.
    """
    path = os.fspath(data)
    if not os.path.isdir(path):
        return _features(path, parts)
    files, names = _list_labeled_images(path)
    backbone = open_backbone()
    classname = dict(zip(files, names, strict=True))
    features, read_classnames, errors = [], [], []
    with (
        hide_progress_bars(quiet),
        progress_bar(total=len(files), unit="img", desc="encode", leave=True) as progress,
    ):
        for batch_files, batch_features, batch_errors in encode_files(
            backbone, files, batch_size, num_workers, device
        ):
            features.append(batch_features.cpu())
            read_classnames += [classname[file] for file in batch_files]
            errors += batch_errors
            progress.update(len(batch_files) + len(batch_errors))
    if not read_classnames:
        raise UserError(f"{path}: no image could be read ({errors[0]})")
    classnames = list(dict.fromkeys(names))
    labels = torch.tensor([classnames.index(name) for name in read_classnames])
    return LabeledFeatures(torch.cat(features), labels, classnames, backbone.identity, errors)


def _list_labeled_images(folder: str) -> tuple[list[str], list[str]]:
    """List paths and class names of all images in the class folders of `folder`."""
    names_file = os.path.join(folder, "classnames.txt")
    classnames = read_class_names(names_file, DATA_HINT) if os.path.exists(names_file) else {}
    pairs = [
        (path, classnames.get(name, name))
        for name in list_folders(folder, DATA_HINT)
        for path in list_images(os.path.join(folder, name))
    ]
    if not pairs:
        raise UserError(f"{folder}: no class folder with an image; {DATA_HINT}")
    files, names = zip(*pairs, strict=True)
    return list(files), list(names)


def _features(path: str, parts: Sequence[str]) -> LabeledFeatures:
    """Read the given splits of a feature file."""
    arrays, about = open_features(path)
    present = [part for part in parts if f"x_{part}" in arrays and f"y_{part}" in arrays]
    if not present or not about.get("classnames"):
        required = " or ".join(f"x_{part}, y_{part}" for part in parts)
        raise UserError(f"{path}: no labeled features ({required}, classnames)")
    names = check_class_names(about["classnames"], path)
    rows, labels = [], []
    for part in present:
        rows.append(unit_rows(arrays[f"x_{part}"](), f"{path}: x_{part}"))
        labels.append(check_labels(arrays[f"y_{part}"](), len(rows[-1]), len(names), f"{path}: y_{part}"))
    if len({x.shape[1] for x in rows}) > 1 or not sum(map(len, rows)):
        raise UserError(f"{path}: the features are empty or of different dimensions")
    has_identity = about.get("backbone") and about.get("weights")
    identity = f"{about['backbone']} ({about['weights']})" if has_identity else ""
    text, template = None, ""
    if "text" in arrays:
        text = unit_rows(arrays["text"](), f"{path}: text")
        if text.shape != (len(names), rows[0].shape[1]):
            raise UserError(
                f"{path}: text must be ({len(names)}, {rows[0].shape[1]}); it is {tuple(text.shape)}"
            )
        template = str(about.get("template") or ClassDataset.template)
    return LabeledFeatures(torch.cat(rows), torch.cat(labels), names, identity, [], text, template)
