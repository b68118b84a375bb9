"""Anybody's own images: a folder of class folders, or a CSV file of paths and labels."""

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

PARTS = ("train", "val", "test")


def divide_rows(rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Half of each class for training, 20 % for validation, the rest for testing: CoOp's shares.

    The order is shuffled by a fixed seed, so that the same images always fall into the same part.
    """
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    by_label: dict[int, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    for own in by_label.values():
        random.Random(0).shuffle(own)
        first, second = round(0.5 * len(own)), round(0.7 * len(own))
        for part, piece in zip(parts, (own[:first], own[first:second], own[second:]), strict=True):
            part.extend(piece)
    return parts


class UserImages(ClassDataset):
    """Images that nobody has published, as a subclass has `read_all` them; each is one example of one class.

    Raises UserError for an image that is there twice: it would be learned and tested, or be of two classes.
    """

    def read_all(self) -> Split:
        raise NotImplementedError

    def read(self) -> Split:
        split = self.read_all()
        parts = (split.test,) if self.data_free else (split.train, split.val, split.test)
        check_distinct_files(row.path for part in parts for row in part)
        return split


def _normalize_unicode(name: str) -> str:
    """`name` in one form of Unicode: a Mac writes the marks of letters apart."""
    return unicodedata.normalize("NFC", name)


@register(DATASET_REGISTRY, replace=True)
class Folder(UserImages):
    """`DATASET.ROOT` holds a folder for each class, or train/, val/ and test/ that hold those.

    Classes are the folders in alphabetical order; a file classnames.txt of lines "folder name" gives them
    readable names and its own order, whatever form of Unicode the disk writes folders in. Of train/, val/
    and test/ only one of the last two is necessary; without test/, val/ is the test set. Undivided folders
    are divided by `divide_rows`.
    """

    def repair_hint(self) -> str:
        return "DATASET.ROOT names a folder that holds a folder of images for each class"

    def read_all(self) -> Split:
        root, hint = self.dataset_dir, self.repair_hint()
        present = {part for part in PARTS if os.path.isdir(os.path.join(root, part))}
        divided = bool(present & {"val", "test"})
        tested = "test" if "test" in present else "val"
        names_file = os.path.join(root, "classnames.txt")
        if os.path.exists(names_file):
            names = read_class_names(names_file, hint)
        else:
            names = {
                name: name for name in list_folders(os.path.join(root, tested) if divided else root, hint)
            }

        def rows(directory: str) -> list[Row]:
            found: dict[int, list[Row]] = {}
            for folder in list_folders(directory, hint):
                label = labels.get(_normalize_unicode(folder))
                if label is None:
                    raise UserError(
                        f"{directory}: '{folder}' is no class of the test set or of classnames.txt"
                    )
                if label in found:
                    raise UserError(f"{directory}: two folders '{folder}', written in two forms of Unicode")
                images = list_images(os.path.join(directory, folder))
                found[label] = [Row(path, label, classnames[label]) for path in images]
            return [row for label in sorted(found) for row in found[label]]

        classnames = list(names.values())
        labels = {_normalize_unicode(folder): label for label, folder in enumerate(names)}
        if not divided:
            train, val, test = divide_rows(rows(root))
            return Split(classnames, train, val, test)
        test = rows(os.path.join(root, tested))
        if self.data_free:
            return Split(classnames, [], [], test)
        parts = {part: rows(os.path.join(root, part)) if part in present else [] for part in ("train", "val")}
        return Split(classnames, parts["train"], parts["val"] if tested == "test" else [], test)


@register(DATASET_REGISTRY, replace=True)
class Csv(UserImages):
    """`DATASET.ROOT` is a CSV file with a header: `path`, `label` and, as you like, `classname` and `split`.

    Paths count from the file's folder and may lead out of it: the file is its owner's. Labels are class
    names, taken in alphabetical order, or, where there is a column `classname`, numbers from 0. `split` says
    train, val or test; without it the rows are divided by `divide_rows`.
    """

    def repair_hint(self) -> str:
        return "DATASET.ROOT names the CSV file; its paths count from its folder"

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
            raise UserError(f"{path}: its first line must name the columns path and label")
        if len(set(columns)) < len(columns):
            raise UserError(f"{path}: its first line names a column twice: {', '.join(columns)}")
        for line, entry in lines:
            if None in entry:
                raise UserError(
                    f"{path}: line {line} has more than {len(columns)} fields; a comma in a name or a path "
                    'stands in quotes ("a, b")'
                )
            if not entry["path"] or not entry["label"] or entry.get("split", "train") not in PARTS:
                raise UserError(
                    f"{path}: line {line} needs a path, a label, and train, val or test as its split"
                )
        entries = [entry for _, entry in lines]
        names = self._names(entries) if "classname" in columns else _labels_as_names(entries)
        number = {label: place for place, label in enumerate(names)}
        home = os.path.dirname(path)
        parts: dict[str, list[Row]] = {part: [] for part in PARTS}
        for entry in entries:
            label = entry["label"]
            row = Row(os.path.join(home, entry["path"]), number[label], names[label])
            parts[entry.get("split", "train")].append(row)
        if "split" not in columns:
            return Split(list(names.values()), *divide_rows(parts["train"]))
        return Split(list(names.values()), parts["train"], parts["val"], parts["test"])

    def _names(self, entries: list[dict[str, str]]) -> dict[str, str]:
        """Number as it is written to class name, in numerical order."""
        pairs = {(entry["label"], entry["classname"] or "") for entry in entries}
        names = dict(pairs)
        wanted = [str(label) for label in range(len(pairs))]
        if set(names) != set(wanted):
            raise UserError(
                f"{self.dataset_dir}: with a column classname, labels are 0 to C-1, with one name each"
            )
        return {label: names[label] for label in wanted}


def _labels_as_names(entries: list[dict[str, str]]) -> dict[str, str]:
    return {label: label for label in sorted({entry["label"] for entry in entries})}
