"""Labelled pictures as anybody has them, or a feature file: to fit a teacher, to try a classifier."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dfzsl.io.class_names import check_class_names
from dfzsl.utils.errors import UserError
from dfzsl.utils.progress import bar, hidden

from .base import ClassDataset, list_folders, list_images
from .encoding import encode_files
from .features import check_labels, open_features, unit_rows
from .images import read_class_names

DATA_HINT = (
    "name a folder that holds a folder of pictures for each class, or a feature file (.npz, .safetensors)"
)


@dataclass(repr=False)
class LabeledFeatures:
    """Unit features (n, d) with labels (n,) into `classnames`.

    `backbone` is whose features they are, where that is known; `errors` says what is wrong with the pictures
    that could not be read. `text` (C, d) are the classes' text features and `template` their prompt template,
    where a feature file has them.
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
        of = self.backbone or "an unknown encoder"
        return f"Labelled({n:,} features of {len(self.classnames)} classes, d = {d}, {of})"

    def select_classes(self, classnames: Sequence[str]) -> LabeledFeatures:
        """These classes alone, in this order. Raises UserError for one that is not there."""
        place = {name: label for label, name in enumerate(self.classnames)}
        if missing := [name for name in classnames if name not in place]:
            raise UserError(
                f"there is no class '{missing[0]}'; there are {', '.join(self.classnames[:10])}, ..."
            )
        same = self.labels[:, None] == torch.tensor([place[name] for name in classnames])
        rows = same.any(1)
        labels = same[rows].int().argmax(1)
        text = None if self.text is None else self.text[[place[name] for name in classnames]]
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
    """A folder of class folders, or of a feature file (datasets/features.py) the named parts.

    Class folders are named like their classes, or a file classnames.txt of lines "folder name" says how.
    `open_backbone` is called where there are pictures. Raises UserError for data that are none.
    """
    path = os.fspath(data)
    if not os.path.isdir(path):
        return _features(path, parts)
    files, names = _pictures(path)
    backbone = open_backbone()
    place = dict(zip(files, names, strict=True))
    features, labels_read, errors = [], [], []
    with hidden(quiet), bar(total=len(files), unit="img", desc="encode", leave=True) as progress:
        for read, rows, batch_errors in encode_files(backbone, files, batch_size, num_workers, device):
            features.append(rows.cpu())
            labels_read += [place[file] for file in read]
            errors += batch_errors
            progress.update(len(read) + len(batch_errors))
    if not labels_read:
        raise UserError(f"{path}: no picture could be read ({errors[0]})")
    classnames = list(dict.fromkeys(names))
    labels = torch.tensor([classnames.index(name) for name in labels_read])
    return LabeledFeatures(torch.cat(features), labels, classnames, backbone.identity, errors)


def _pictures(folder: str) -> tuple[list[str], list[str]]:
    """Paths and class names of all pictures in the class folders of `folder`."""
    names_file = os.path.join(folder, "classnames.txt")
    called = read_class_names(names_file, DATA_HINT) if os.path.exists(names_file) else {}
    pairs = [
        (path, called.get(name, name))
        for name in list_folders(folder, DATA_HINT)
        for path in list_images(os.path.join(folder, name))
    ]
    if not pairs:
        raise UserError(f"{folder}: no picture in a folder of it; {DATA_HINT}")
    files, names = zip(*pairs, strict=True)
    return list(files), list(names)


def _features(path: str, parts: Sequence[str]) -> LabeledFeatures:
    arrays, about = open_features(path)
    there = [part for part in parts if f"x_{part}" in arrays and f"y_{part}" in arrays]
    if not there or not about.get("classnames"):
        wanted = " or ".join(f"x_{part}, y_{part}" for part in parts)
        raise UserError(f"{path}: it has no labelled features ({wanted}, classnames)")
    names = check_class_names(about["classnames"], path)
    rows, labels = [], []
    for part in there:
        rows.append(unit_rows(arrays[f"x_{part}"](), f"{path}: x_{part}"))
        labels.append(check_labels(arrays[f"y_{part}"](), len(rows[-1]), len(names), f"{path}: y_{part}"))
    if len({x.shape[1] for x in rows}) > 1 or not sum(map(len, rows)):
        raise UserError(f"{path}: its features are none, or of different dimensions")
    known = about.get("backbone") and about.get("weights")
    identity = f"{about['backbone']} ({about['weights']})" if known else ""
    text, template = None, ""
    if "text" in arrays:
        text = unit_rows(arrays["text"](), f"{path}: text")
        if text.shape != (len(names), rows[0].shape[1]):
            raise UserError(f"{path}: its text must be a row of {rows[0].shape[1]} numbers for each class")
        template = str(about.get("template") or ClassDataset.template)
    return LabeledFeatures(torch.cat(rows), torch.cat(labels), names, identity, [], text, template)
