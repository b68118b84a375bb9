"""Classify image files and write predictions as a table, CSV or JSON lines."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

import torch
from tabulate import tabulate

from dfzsl.datasets.base import IMAGE_SUFFIXES
from dfzsl.datasets.encoding import encode_files
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.utils.errors import UserError

TopClasses = list[tuple[str, float]]  # (class name, probability), most probable first


def find_images(patterns: Iterable[str]) -> list[str]:
    """List image files.

    Args:
        patterns: files, folders (searched recursively) and globs. A file is listed whatever its suffix.

    Returns:
        The paths in the order of `patterns`, without duplicates.

    Raises:
        UserError: a folder or glob has no image.
    """
    images: dict[str, None] = {}
    for pattern in patterns:
        is_path = os.path.exists(pattern) or not glob.has_magic(pattern)
        matches = [pattern] if is_path else sorted(glob.glob(pattern, recursive=True))
        paths = [path for match in matches for path in (_walk(match) if os.path.isdir(match) else [match])]
        if not paths:
            raise UserError(f"{pattern}: no images found ({', '.join(IMAGE_SUFFIXES)})")
        images |= dict.fromkeys(paths)
    return list(images)


def _walk(folder: str) -> Iterator[str]:
    """Yield the images of a folder and its subfolders, except hidden ones."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (
            os.path.join(parent, name)
            for name in sorted(names)
            if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."
        )


def predict(
    classifier: Classifier,
    backbone: Any,
    paths: Sequence[str],
    top: int = 1,
    batch_size: int = 64,
    num_workers: int = 4,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[list[tuple[str, TopClasses]], list[str]]]:
    """Classify image files batch by batch.

    Args:
        classifier: the classifier.
        backbone: the image encoder whose features the classifier reads.
        paths: image files.
        top: number of classes per image.
        batch_size: images per batch.
        num_workers: processes that decode images.
        device: device of the encoder.

    Yields:
        (path, its `top` classes) of the images of a batch, and messages about its unreadable files.
    """
    for readable, features, errors in encode_files(backbone, paths, batch_size, num_workers, device):
        probabilities = classifier.logits(features).softmax(1).topk(min(top, len(classifier.classnames)))
        classes = [
            [(classifier.classnames[label], probability) for probability, label in zip(*row, strict=True)]
            for row in zip(probabilities.values.tolist(), probabilities.indices.tolist(), strict=True)
        ]
        yield list(zip(readable, classes, strict=True)), errors


class Table:
    """Writes one table when it is closed."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.rows = file, []  # type: ignore[var-annotated]

    def add(self, path: str, classes: TopClasses) -> None:
        self.rows += [
            (path if rank == 0 else "", name, f"{probability:.1%}")
            for rank, (name, probability) in enumerate(classes)
        ]

    def close(self) -> None:
        if self.rows:
            text = tabulate(
                self.rows,
                headers=("image", "class", "probability"),
                disable_numparse=True,
                colalign=("left", "left", "right"),
            )
            self.file.write(text + "\n")


class Csv:
    """Writes one line per image and rank."""

    def __init__(self, file: TextIO) -> None:
        self.writer = csv.writer(file, lineterminator="\n")
        self.writer.writerow(("image", "rank", "class", "probability"))

    def add(self, path: str, classes: TopClasses) -> None:
        self.writer.writerows(
            (path, rank, name, f"{probability:.6f}") for rank, (name, probability) in enumerate(classes, 1)
        )

    def close(self) -> None:
        pass


class Jsonl:
    """Writes one JSON object per image and line."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def add(self, path: str, classes: TopClasses) -> None:
        values = [{"class": name, "probability": round(probability, 6)} for name, probability in classes]
        self.file.write(json.dumps({"image": path, "classes": values}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        pass


FORMATS: dict[str, Callable[[TextIO], Table | Csv | Jsonl]] = {"table": Table, "csv": Csv, "jsonl": Jsonl}
