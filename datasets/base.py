"""What every data set shares: a split's rows become CoOp's base, new or all classes, some shots or all.

A data set is a class with a `read` method that returns a `Split`; everything else happens here, once.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dassl.data.datasets import DatasetBase, Datum

from dfzsl.io.class_names import check_class_names
from dfzsl.io.files import read_json
from dfzsl.safe_pickle import PLAIN, Inert, Unpickler
from dfzsl.utils.dassl_plugin import add_keys
from dfzsl.utils.errors import UserError

from .templates import SELECTED_TEMPLATES

add_keys("DATASET", SUBSAMPLE_CLASSES="all")
add_keys("TEACHER", FILE="")


class Row(NamedTuple):
    """One example of a split. Making a Row touches no file; `feature` is its (d,) row in a feature file."""

    path: str
    label: int
    classname: str
    feature: torch.Tensor | None = None


class Split(NamedTuple):
    """A whole data set: `classnames[label]`, the rows, and which labels are new (None: the second half)."""

    classnames: list[str]
    train: list[Row]
    val: list[Row]
    test: list[Row]
    new: Sequence[int] | None = None


class ClassDataset(DatasetBase):
    """A Dassl data set with CoOp's protocol. Subclasses define `read`, and `folder` where they have one.

    Config: `DATASET.ROOT`, `DATASET.NUM_SHOTS` (every image if below 1), `SEED` (which shots),
    `DATASET.SUBSAMPLE_CLASSES` (base, new or all) and `TEACHER.FILE`. If the last is set the run is
    data-free: no training or validation file is named, counted or opened.

    Attributes: `classnames` of this run; `all_classnames`, `base_classnames`, `new_classnames` in label
    order; `template` and `templates` (prompt ensemble); `text_features` (dict of name to (d,) unit row, or
    None); `test_only`: there is nothing to train on and `train_x` merely repeats `test`, because Dassl's
    data manager wants one (as CoOp does for ImageNet-A and its like).

    Raises UserError for whatever is wrong with the data: a folder, file, image or class that is missing.
    """

    folder = ""
    template = "a photo of a {}."
    test_only = False
    text_features: dict[str, torch.Tensor] | None = None
    replaced: type | None = None  # a checkout's own data set of this name, where we are plugged in

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.data_free = bool(cfg.TEACHER.FILE)
        if not cfg.DATASET.ROOT:
            raise UserError("DATASET.ROOT is empty; name the folder of the data sets with --root")
        self.dataset_dir = os.path.join(os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT)), self.folder)
        self.dataset_dir = self.dataset_dir.rstrip(os.sep) or os.sep
        require_path(self.dataset_dir, self.repair_hint())

        split = self.read()
        check_split(split, self.dataset_dir)
        new = list(split.new) if split.new is not None else second_half_labels(len(split.classnames))
        base = sorted(set(range(len(split.classnames))) - set(new))
        self.all_classnames = list(split.classnames)
        self.base_classnames = [split.classnames[label] for label in base]
        self.new_classnames = [split.classnames[label] for label in new]

        choices = {"all": range(len(split.classnames)), "base": base, "new": new}
        if (subsample := cfg.DATASET.SUBSAMPLE_CLASSES) not in choices:
            raise UserError(f"DATASET.SUBSAMPLE_CLASSES is '{subsample}'; use base, new or all")
        relabel = {label: place for place, label in enumerate(choices[subsample])}

        train, val = ([], []) if self.data_free else self.few_shots(split, cfg.DATASET.NUM_SHOTS, cfg.SEED)
        train, val, test = (self.datums(rows, relabel) for rows in (train, val, split.test))
        if not test:
            raise UserError(f"{self.dataset_dir}: no test image of the {subsample} classes")
        if not train and not self.data_free:
            self.test_only, train = True, test
        self._run_classnames = [split.classnames[label] for label in relabel]
        super().__init__(train_x=train, val=val, test=test)

    def read(self) -> Split:
        """The whole data set under `self.dataset_dir`; no training files if `self.data_free`."""
        raise NotImplementedError

    def repair_hint(self) -> str:
        """What to do if a file is missing; ends the error's line."""
        return f"get it with: python -m dfzsl.prepare {type(self).__name__}"

    @property
    def templates(self) -> list[str]:
        """The prompt ensemble: the seven templates that CLIP's authors selected, and the data set's own."""
        return [*SELECTED_TEMPLATES, *([self.template] if self.template not in SELECTED_TEMPLATES else [])]

    def few_shots(self, split: Split, shots: int, seed: int) -> tuple[list[Row], list[Row]]:
        """`shots` training and min(shots, 4) validation rows a class; all rows if `shots` < 1.

        CoOp draws once with Python's `random` fresh from `SEED`, train before val, and keeps the draw in
        split_fewshot/shot_K-seed_S.pkl. Such a file decides where there is one; without one the same
        draw is made again, and the state of `random` is left as it was, so no run differs from the first.
        """
        if shots < 1:
            return split.train, split.val
        kept = os.path.join(self.dataset_dir, "split_fewshot", f"shot_{shots}-seed_{seed}.pkl")
        if os.path.exists(kept):
            drawn, drawn_val = read_fewshot(kept)
            return relocate(drawn, split.train, kept), relocate(drawn_val, split.val, kept)
        state = random.getstate()
        if seed >= 0:
            random.seed(seed)
        train = self.generate_fewshot_dataset(split.train, num_shots=shots)
        val = self.generate_fewshot_dataset(split.val, num_shots=min(shots, 4))
        if seed >= 0:
            random.setstate(state)
        return train, val

    def datums(self, rows: Iterable[Row], relabel: dict[int, int]) -> list[Datum]:
        """Datums of the rows whose label is in `relabel`, in their order."""
        return [self.datum(row, relabel[row.label]) for row in rows if row.label in relabel]

    def datum(self, row: Row, label: int) -> Datum:
        if not os.path.isfile(row.path):
            what = "a folder and no image" if os.path.isdir(row.path) else "no such image"
            raise UserError(f"{row.path}: {what} (class '{row.classname}'); {self.repair_hint()}")
        return Datum(impath=row.path, label=label, classname=row.classname)

    # The classes of a run are those of its split, not those that happen to have a training image.
    def get_num_classes(self, data_source: object) -> int:
        return len(self._run_classnames)

    def get_lab2cname(self, data_source: object) -> tuple[dict[int, str], list[str]]:
        return dict(enumerate(self._run_classnames)), list(self._run_classnames)


def second_half_labels(n: int) -> list[int]:
    """The labels of CoOp's new classes: all after the first ceil(n / 2)."""
    return list(range(math.ceil(n / 2), n))


def require_path(path: str | os.PathLike[str], hint: str) -> str:
    """`path` itself. Raises UserError if nothing is there; `hint` says how to get it."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such {'file' if os.path.splitext(path)[1] else 'folder'}; {hint}")
    return os.fspath(path)


def check_split(split: Split, place: str) -> None:
    """Raise UserError unless each class has a name and an image, and a training image if it is learned."""
    names, new = split.classnames, set(split.new or ())
    if len(names) < 2:
        raise UserError(f"{place}: {len(names)} class; a classification data set has at least 2")
    trained = {row.label for row in split.train}
    seen = trained | {row.label for row in split.val} | {row.label for row in split.test}
    if stray := [label for label in seen if not 0 <= label < len(names)]:
        raise UserError(
            f"{place}: label {stray[0]} has no class name (labels count from 0 to {len(names) - 1})"
        )
    for label, name in enumerate(check_class_names(names, place)):
        if label not in seen:
            raise UserError(f"{place}: class '{name}' is in the split but has no image")
        if trained and label not in trained and label not in new:
            raise UserError(f"{place}: class '{name}' has no training image")


def escapes_folder(path: str) -> bool:
    """Whether a path from a file would leave the folder that it is to be joined to."""
    return os.path.isabs(path) or ".." in path.replace("\\", "/").split("/")


def read_split(path: str, image_dir: str, hint: str) -> Split:
    """A split_zhou_*.json: {"train": [[path in image_dir, label, name], ...], "val": ..., "test": ...}."""
    require_path(path, hint)
    content = read_json(path)
    names: dict[int, str] = {}
    parts: dict[str, list[Row]] = {}
    for part in ("train", "val", "test"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise UserError(f"{path}: not a split file: it has no list '{part}'; {hint}")
        parts[part] = []
        for entry in content[part]:
            try:
                image, label, name = entry
                if not (isinstance(image, str) and type(label) is int and isinstance(name, str)):
                    raise TypeError
            except (TypeError, ValueError):
                text = json.dumps(entry)[:80]
                raise UserError(
                    f"{path}: an entry of '{part}' is not [path, label, class name]: {text}"
                ) from None
            if escapes_folder(image):
                raise UserError(f"{path}: '{image}' leads out of {image_dir}")
            if names.setdefault(label, name) != name:
                raise UserError(f"{path}: label {label} is called both '{names[label]}' and '{name}'")
            parts[part].append(Row(os.path.join(image_dir, image), label, name))
    if sorted(names) != list(range(len(names))):
        raise UserError(
            f"{path}: labels must be 0 to {len(names) - 1} without a gap; found {sorted(names)[:5]}..."
        )
    return Split([names[label] for label in range(len(names))], parts["train"], parts["val"], parts["test"])


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def list_folders(directory: str, hint: str) -> list[str]:
    """Names of the folders in `directory`, sorted, without hidden ones. Links are followed.

    Raises UserError for a link that leads nowhere, since it may have been a class, and for two names of one.
    """
    require_path(directory, hint)
    entries = [entry for entry in os.scandir(directory) if entry.name[0] != "."]
    if lost := [entry.path for entry in entries if not os.path.exists(entry.path)]:
        raise UserError(f"{min(lost)}: a link that leads nowhere; mend or remove it")
    names = sorted(entry.name for entry in entries if entry.is_dir())
    check_distinct_files(os.path.join(directory, name) for name in names)
    return names


def check_distinct_files(paths: Iterable[str]) -> None:
    """Raise UserError if two of these paths are one file or folder: listed twice, or by a link."""
    seen: dict[tuple[int, int], str] = {}
    for path in paths:
        try:
            about = os.stat(path)
        except (OSError, ValueError):  # that it is missing is told where it is read
            continue
        if (key := (about.st_dev, about.st_ino)) in seen and about.st_ino:
            same = os.path.normpath(path) == os.path.normpath(seen[key])
            hint = "is listed twice" if same else f"is a link to {seen[key]}, or the other way round"
            raise UserError(f"{path} {hint}; one of the two has to go")
        seen[key] = path


def list_images(directory: str) -> list[str]:
    """Paths of the images in `directory`, sorted by name, without hidden ones."""
    names = (entry.name for entry in os.scandir(directory))
    kept = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".")
    return [os.path.join(directory, name) for name in kept]


class _Item(Inert):
    """Stands for Dassl's Datum while a pickle is read."""


FEWSHOT = {**PLAIN, **{(f"dassl.data.datasets{place}", "Datum"): _Item for place in ("", ".base_dataset")}}


def read_fewshot(path: str | os.PathLike[str]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(path, label) of the training and of the validation images that CoOp drew; no code in it is run."""
    try:
        content = Unpickler(io.BytesIO(Path(path).read_bytes()), FEWSHOT).load()
        train, val = (
            [(item._impath, item._label) for item in items]
            for items in (content["train"], content.get("val", []))
        )
        if any(type(image) is not str or type(label) is not int for image, label in train + val):
            raise TypeError("an image or a label is none")
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path}: not a few-shot file of CoOp's ({error}); delete it to draw anew") from None
    return train, val


def relocate(drawn: Iterable[tuple[str, int]], rows: Sequence[Row], source: str) -> list[Row]:
    """The rows that a few-shot file names. It was written with absolute paths, perhaps on another machine."""
    prefix = os.path.commonpath([os.path.dirname(row.path) for row in rows]) if rows else ""
    known = {row.path[len(prefix) :].lstrip(os.sep): row for row in rows}
    found = []
    # Only as long an end as a row can have: a path of a million parts must not cost their square.
    depth = max((len(Path(end).parts) for end in known), default=1)
    for path, label in drawn:
        parts = Path(path).parts[-depth:]
        ends = (os.path.join(*parts[start:]) for start in range(len(parts)))
        row = next((known[end] for end in ends if end in known), None)
        if row is None or row.label != label:
            raise UserError(
                f"{source}: names {path} (label {label}), which the split does not have; delete the file"
            )
        found.append(row)
    return found
