"""Provide data sets of user images: a folder of class folders, or a CSV file of paths and labels."""

from __future__ import annotations

import csv
import os
import random
import unicodedata

from dassl.data.datasets import DATASET_REGISTRY

from dfzsl.utils.dassl_plugin import register
from dfzsl.utils.errors import UserError

from .base import ClassDataset, Row, Split, check_distinct_files, list_folders, list_images
from .images import read_class_names

SPLIT_NAMES = ("train", "val", "test")


def divide_rows(rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Divide each class into 50 % training, 20 % validation and 30 % test images, as CoOp does.

    A fixed seed shuffles the rows, so the same images are always divided in the same way.

    Args:
        rows: all rows.

    Returns:
        Training, validation and test rows.
    """
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    by_label: dict[int, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    for class_rows in by_label.values():
        random.Random(0).shuffle(class_rows)
        first, second = round(0.5 * len(class_rows)), round(0.7 * len(class_rows))
        pieces = (class_rows[:first], class_rows[first:second], class_rows[second:])
        for part, piece in zip(parts, pieces, strict=True):
            part.extend(piece)
    return parts


class UserImages(ClassDataset):
    """Base class of data sets of user images, each of which is one example of one class.

    Raises:
        UserError: an image is listed twice, since it might be in two splits or in two classes.
    """

    def read_all(self) -> Split:
        """Read the data set; `read` checks it."""
        raise NotImplementedError

    def read(self) -> Split:
        split = self.read_all()
        parts = (split.test,) if self.data_free else (split.train, split.val, split.test)
        check_distinct_files(row.path for part in parts for row in part)
        return split


def _normalize_unicode(name: str) -> str:
    """Return `name` in Unicode form NFC; macOS stores file names in form NFD."""
    return unicodedata.normalize("NFC", name)


@register(DATASET_REGISTRY, replace=True)
class Folder(UserImages):
    """A folder `DATASET.ROOT` of class folders, or of train/, val/ and test/ with class folders in them.

    Classes are the folders in alphabetical order. A file classnames.txt of lines "folder name" gives class
    names and their order. Its folder names may differ from those on disk in Unicode form. Of train/, val/
    and test/, only val/ or test/ is required; without test/, val/ is the test set. Without any of them,
    `divide_rows` divides the images.
    """

    def repair_hint(self) -> str:
        return "DATASET.ROOT must be a folder with a folder of images for each class"

    def read_all(self) -> Split:
        root, hint = self.dataset_dir, self.repair_hint()
        present = {part for part in SPLIT_NAMES if os.path.isdir(os.path.join(root, part))}
        divided = bool(present & {"val", "test"})
        test_name = "test" if "test" in present else "val"
        names_file = os.path.join(root, "classnames.txt")
        if os.path.exists(names_file):
            names = read_class_names(names_file, hint)
        else:
            names = {
                name: name for name in list_folders(os.path.join(root, test_name) if divided else root, hint)
            }

        def rows(directory: str) -> list[Row]:
            by_label: dict[int, list[Row]] = {}
            for folder in list_folders(directory, hint):
                label = labels.get(_normalize_unicode(folder))
                if label is None:
                    raise UserError(
                        f"{directory}: '{folder}' is not a class of the test set or of classnames.txt"
                    )
                if label in by_label:
                    raise UserError(f"{directory}: two folders '{folder}' differ in Unicode form only")
                images = list_images(os.path.join(directory, folder))
                by_label[label] = [Row(path, label, classnames[label]) for path in images]
            return [row for label in sorted(by_label) for row in by_label[label]]

        classnames = list(names.values())
        labels = {_normalize_unicode(folder): label for label, folder in enumerate(names)}
        if not divided:
            train, val, test = divide_rows(rows(root))
            return Split(classnames, train, val, test)
        test = rows(os.path.join(root, test_name))
        if self.data_free:
            return Split(classnames, [], [], test)
        parts = {part: rows(os.path.join(root, part)) if part in present else [] for part in ("train", "val")}
        return Split(classnames, parts["train"], parts["val"] if test_name == "test" else [], test)


@register(DATASET_REGISTRY, replace=True)
class Csv(UserImages):
    """A CSV file `DATASET.ROOT` with the columns `path` and `label`, and optionally `classname` and `split`.

    Paths are relative to the file's folder and may be outside of it, since the user wrote the file. Labels
    are class names, ordered alphabetically, or, with a column `classname`, numbers from 0. `split` is train,
    val or test; without it `divide_rows` divides the rows.
    """

    def repair_hint(self) -> str:
        return "DATASET.ROOT must be a CSV file; its paths are relative to its folder"

    def read_all(self) -> Split:
        path = self.dataset_dir
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                table = csv.DictReader(file, strict=True)
                columns = list(table.fieldnames or ())
                lines = [(table.line_num, entry) for entry in table]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: not a readable CSV file ({error})") from None
        if not {"path", "label"} <= set(columns):
            raise UserError(f"{path}: the first line must contain the columns path and label")
        if len(set(columns)) < len(columns):
            raise UserError(f"{path}: the first line contains a column twice: {', '.join(columns)}")
        for line, entry in lines:
            if None in entry:
                raise UserError(
                    f"{path}: line {line} has more than {len(columns)} fields; put a name or a path that "
                    'contains a comma in quotes ("a, b")'
                )
            if not entry["path"] or not entry["label"] or entry.get("split", "train") not in SPLIT_NAMES:
                raise UserError(f"{path}: line {line} needs a path, a label, and train, val or test as split")
        entries = [entry for _, entry in lines]
        names = self._names(entries) if "classname" in columns else _labels_as_names(entries)
        index = {label: position for position, label in enumerate(names)}
        directory = os.path.dirname(path)
        parts: dict[str, list[Row]] = {part: [] for part in SPLIT_NAMES}
        for entry in entries:
            label = entry["label"]
            row = Row(os.path.join(directory, entry["path"]), index[label], names[label])
            parts[entry.get("split", "train")].append(row)
        if "split" not in columns:
            return Split(list(names.values()), *divide_rows(parts["train"]))
        return Split(list(names.values()), parts["train"], parts["val"], parts["test"])

    def _names(self, entries: list[dict[str, str]]) -> dict[str, str]:
        """Return class names by label (as text), in numerical order."""
        pairs = {(entry["label"], entry["classname"] or "") for entry in entries}
        names = dict(pairs)
        expected = [str(label) for label in range(len(pairs))]
        if set(names) != set(expected):
            raise UserError(
                f"{self.dataset_dir}: with a column classname, labels must be 0 to C-1, one per class"
            )
        return {label: names[label] for label in expected}


def _labels_as_names(entries: list[dict[str, str]]) -> dict[str, str]:
    """Return the labels, which are class names, in alphabetical order."""
    return {label: label for label in sorted({entry["label"] for entry in entries})}
