"""Provide the base class of all data sets, with CoOp's protocol of base, new and all classes and few shots.

A data set is a subclass of `ClassDataset` whose `read` method returns a `Split`.
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
    """One example of a split: an image at `path`, or a feature (d,) of the feature file at `path`."""

    path: str
    label: int
    classname: str
    feature: torch.Tensor | None = None


class Split(NamedTuple):
    """A whole data set: class names, rows, and the labels of the new classes (None: the second half)."""

    classnames: list[str]
    train: list[Row]
    val: list[Row]
    test: list[Row]
    new: Sequence[int] | None = None


class ClassDataset(DatasetBase):
    """A Dassl data set with CoOp's protocol. Subclasses define `read` and, if they need one, `folder`.

    Config keys: `DATASET.ROOT`, `DATASET.NUM_SHOTS` (all images if below 1), `SEED` (of the few-shot draw),
    `DATASET.SUBSAMPLE_CLASSES` (base, new or all) and `TEACHER.FILE`. If the last is set the run is
    data-free: no training or validation file is named, counted or opened.

    Args:
        cfg: the config.

    Attributes:
        classnames: classes of this run.
        all_classnames, base_classnames, new_classnames: classes of the data set, in label order.
        template: prompt template.
        templates: prompt ensemble.
        text_features: L2-normalized text embedding (d,) by class name, or None.
        test_only: there are no training images. `train_x` then repeats `test`, because Dassl's data manager
            requires one (CoOp does the same for ImageNet-A and the other variants).

    Raises:
        UserError: a folder, file, image or class is missing.
    """

    folder = ""
    template = "a photo of a {}."
    test_only = False
    text_features: dict[str, torch.Tensor] | None = None
    replaced: type | None = None  # the data set of the same name that a CoOp checkout has registered

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.data_free = bool(cfg.TEACHER.FILE)
        if not cfg.DATASET.ROOT:
            raise UserError("DATASET.ROOT is empty; set the folder of the data sets with --root")
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
        relabel = {label: index for index, label in enumerate(choices[subsample])}

        train, val = ([], []) if self.data_free else self.few_shots(split, cfg.DATASET.NUM_SHOTS, cfg.SEED)
        train, val, test = (self.datums(rows, relabel) for rows in (train, val, split.test))
        if not test:
            raise UserError(f"{self.dataset_dir}: no test image of the {subsample} classes")
        if not train and not self.data_free:
            self.test_only, train = True, test
        self._run_classnames = [split.classnames[label] for label in relabel]
        super().__init__(train_x=train, val=val, test=test)

    def read(self) -> Split:
        """Read the whole data set under `self.dataset_dir`, without training files if `self.data_free`."""
        raise NotImplementedError

    def repair_hint(self) -> str:
        """Return the instruction that ends an error message about a missing file."""
        return f"get it with: python -m dfzsl.prepare {type(self).__name__}"

    @property
    def templates(self) -> list[str]:
        """The prompt ensemble: the seven templates selected by CLIP's authors, and the data set's own."""
        return [*SELECTED_TEMPLATES, *([self.template] if self.template not in SELECTED_TEMPLATES else [])]

    def few_shots(self, split: Split, shots: int, seed: int) -> tuple[list[Row], list[Row]]:
        """Select `shots` training and min(shots, 4) validation rows per class; all rows if `shots` < 1.

        CoOp draws once with Python's `random`, seeded with `SEED`, train before val, and stores the draw in
        split_fewshot/shot_K-seed_S.pkl. If that file exists it is used, else the same draw is made again.
        The state of `random` is restored afterwards, so that every run continues with the same numbers.

        Args:
            split: the whole data set.
            shots: training rows per class.
            seed: seed of the draw.

        Returns:
            Training rows and validation rows.
        """
        if shots < 1:
            return split.train, split.val
        path = os.path.join(self.dataset_dir, "split_fewshot", f"shot_{shots}-seed_{seed}.pkl")
        if os.path.exists(path):
            drawn, drawn_val = read_fewshot(path)
            return relocate(drawn, split.train, path), relocate(drawn_val, split.val, path)
        state = random.getstate()
        if seed >= 0:
            random.seed(seed)
        train = self.generate_fewshot_dataset(split.train, num_shots=shots)
        val = self.generate_fewshot_dataset(split.val, num_shots=min(shots, 4))
        if seed >= 0:
            random.setstate(state)
        return train, val

    def datums(self, rows: Iterable[Row], relabel: dict[int, int]) -> list[Datum]:
        """Convert rows to datums, in their order, and skip rows whose label is not in `relabel`."""
        return [self.datum(row, relabel[row.label]) for row in rows if row.label in relabel]

    def datum(self, row: Row, label: int) -> Datum:
        """Convert a row to a datum. Raises UserError if its image does not exist."""
        if not os.path.isfile(row.path):
            problem = "a folder, not an image" if os.path.isdir(row.path) else "no such image"
            raise UserError(f"{row.path}: {problem} (class '{row.classname}'); {self.repair_hint()}")
        return Datum(impath=row.path, label=label, classname=row.classname)

    # Dassl counts the classes that have training images; a run has all classes of its split.
    def get_num_classes(self, data_source: object) -> int:
        return len(self._run_classnames)

    def get_lab2cname(self, data_source: object) -> tuple[dict[int, str], list[str]]:
        return dict(enumerate(self._run_classnames)), list(self._run_classnames)


def second_half_labels(n: int) -> list[int]:
    """Return the labels of CoOp's new classes: all after the first ceil(n / 2)."""
    return list(range(math.ceil(n / 2), n))


def require_path(path: str | os.PathLike[str], hint: str) -> str:
    """Return `path`. Raises UserError, ending in `hint`, if it does not exist."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such {'file' if os.path.splitext(path)[1] else 'folder'}; {hint}")
    return os.fspath(path)


def check_split(split: Split, source: str) -> None:
    """Check that each class has a name and an image, and each base class a training image.

    Args:
        split: the data set.
        source: its folder or file, for error messages.

    Raises:
        UserError: one of these is missing.
    """
    names, new = split.classnames, set(split.new or ())
    if len(names) < 2:
        raise UserError(f"{source}: {len(names)} class; a classification data set needs at least 2")
    train_labels = {row.label for row in split.train}
    labels = train_labels | {row.label for row in split.val} | {row.label for row in split.test}
    if unnamed := [label for label in labels if not 0 <= label < len(names)]:
        raise UserError(
            f"{source}: label {unnamed[0]} has no class name (labels must be 0 to {len(names) - 1})"
        )
    for label, name in enumerate(check_class_names(names, source)):
        if label not in labels:
            raise UserError(f"{source}: class '{name}' is in the split but has no image")
        if train_labels and label not in train_labels and label not in new:
            raise UserError(f"{source}: class '{name}' has no training image")


def escapes_folder(path: str) -> bool:
    """Return whether a path read from a file would leave the folder that it is joined to."""
    return os.path.isabs(path) or ".." in path.replace("\\", "/").split("/")


def read_split(path: str, image_dir: str, hint: str) -> Split:
    """Read a split_zhou_*.json: {"train": [[path, label, class name], ...], "val": ..., "test": ...}.

    Args:
        path: the file.
        image_dir: folder that the paths in it are relative to.
        hint: instruction that ends an error message about a missing file.

    Raises:
        UserError: the file is missing or not a split file.
    """
    require_path(path, hint)
    content = read_json(path)
    names: dict[int, str] = {}
    parts: dict[str, list[Row]] = {}
    for part in ("train", "val", "test"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise UserError(f"{path}: not a split file: the list '{part}' is missing; {hint}")
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
                raise UserError(f"{path}: '{image}' is outside of {image_dir}")
            if names.setdefault(label, name) != name:
                raise UserError(f"{path}: label {label} has two class names, '{names[label]}' and '{name}'")
            parts[part].append(Row(os.path.join(image_dir, image), label, name))
    if sorted(names) != list(range(len(names))):
        raise UserError(
            f"{path}: labels must be 0 to {len(names) - 1} without a gap, not {sorted(names)[:5]}..."
        )
    return Split([names[label] for label in range(len(names))], parts["train"], parts["val"], parts["test"])


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def list_folders(directory: str, hint: str) -> list[str]:
    """List the folders in `directory` by name, sorted, without hidden ones. Links are followed.

    Args:
        directory: the folder.
        hint: instruction that ends an error message if it is missing.

    Raises:
        UserError: a link is broken (its target may have been a class), or two names are links to one folder.
    """
    require_path(directory, hint)
    entries = [entry for entry in os.scandir(directory) if entry.name[0] != "."]
    if broken := [entry.path for entry in entries if not os.path.exists(entry.path)]:
        raise UserError(f"{min(broken)}: a broken link; repair or remove it")
    names = sorted(entry.name for entry in entries if entry.is_dir())
    check_distinct_files(os.path.join(directory, name) for name in names)
    return names


def check_distinct_files(paths: Iterable[str]) -> None:
    """Raise UserError if two of these paths are the same file or folder."""
    first_paths: dict[tuple[int, int], str] = {}
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # a missing file is reported when it is read
            continue
        if (key := (status.st_dev, status.st_ino)) in first_paths and status.st_ino:
            same = os.path.normpath(path) == os.path.normpath(first_paths[key])
            problem = "is listed twice" if same else f"and {first_paths[key]} are the same file"
            raise UserError(f"{path} {problem}; remove one of the two")
        first_paths[key] = path


def list_images(directory: str) -> list[str]:
    """List the paths of the images in `directory`, sorted by name, without hidden ones."""
    names = (entry.name for entry in os.scandir(directory))
    image_names = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".")
    return [os.path.join(directory, name) for name in image_names]


class _Item(Inert):
    """Placeholder for Dassl's Datum while a pickle is read."""


FEWSHOT_TYPES = {
    **PLAIN,
    **{(f"dassl.data.datasets{module}", "Datum"): _Item for module in ("", ".base_dataset")},
}


def read_fewshot(path: str | os.PathLike[str]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Read a few-shot file of CoOp without running code in it.

    Args:
        path: the pickle.

    Returns:
        (path, label) of the training images, and of the validation images.

    Raises:
        UserError: the file is not a few-shot file.
    """
    try:
        content = Unpickler(io.BytesIO(Path(path).read_bytes()), FEWSHOT_TYPES).load()
        train, val = (
            [(item._impath, item._label) for item in items]
            for items in (content["train"], content.get("val", []))
        )
        if any(type(image) is not str or type(label) is not int for image, label in train + val):
            raise TypeError("a path is not text or a label is not a number")
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path}: not a few-shot file of CoOp ({error}); delete it to draw again") from None
    return train, val


def relocate(drawn: Iterable[tuple[str, int]], rows: Sequence[Row], source: str) -> list[Row]:
    """Find the rows of the images in a few-shot file, whose absolute paths may be of another machine.

    Args:
        drawn: (path, label) of each image in the file.
        rows: rows of the split.
        source: path of the file, for error messages.

    Raises:
        UserError: the split lacks one of the images.
    """
    prefix = os.path.commonpath([os.path.dirname(row.path) for row in rows]) if rows else ""
    row_by_suffix = {row.path[len(prefix) :].lstrip(os.sep): row for row in rows}
    relocated = []
    # Suffixes are limited to the depth of the rows: a path of a million parts would take quadratic time.
    depth = max((len(Path(suffix).parts) for suffix in row_by_suffix), default=1)
    for path, label in drawn:
        parts = Path(path).parts[-depth:]
        suffixes = (os.path.join(*parts[start:]) for start in range(len(parts)))
        row = next((row_by_suffix[suffix] for suffix in suffixes if suffix in row_by_suffix), None)
        if row is None or row.label != label:
            raise UserError(
                f"{source}: {path} (label {label}) is not in the split; delete the file to draw again"
            )
        relocated.append(row)
    return relocated
