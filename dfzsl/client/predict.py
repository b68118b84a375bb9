"""The classes of picture files, for `dfzsl predict`: batch after batch, as they come."""

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

Best = list[tuple[str, float]]  # (class, probability), the most probable first


def find_pictures(given: Iterable[str]) -> list[str]:
    """The files that paths, folders (with all below them) and globs name, each once, in the order given.

    A file that is named itself is taken whatever its ending. Raises UserError where a glob or folder holds no
    picture.
    """
    found: dict[str, None] = {}
    for name in given:
        places = (
            [name]
            if os.path.exists(name) or not glob.has_magic(name)
            else sorted(glob.glob(name, recursive=True))
        )
        pictures = [path for place in places for path in (_below(place) if os.path.isdir(place) else [place])]
        if not pictures:
            raise UserError(f"{name}: no picture there ({', '.join(IMAGE_SUFFIXES)})")
        found |= dict.fromkeys(pictures)
    return list(found)


def _below(folder: str) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (
            os.path.join(place, name)
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
) -> Iterator[tuple[list[tuple[str, Best]], list[str]]]:
    """For each batch: (path, its `top` classes) of pictures, and what is wrong with files that are none."""
    for good, features, wrong in encode_files(backbone, paths, batch_size, num_workers, device):
        chances = classifier.logits(features).softmax(1).topk(min(top, len(classifier.classnames)))
        best = [
            [(classifier.classnames[label], chance) for chance, label in zip(*row, strict=True)]
            for row in zip(chances.values.tolist(), chances.indices.tolist(), strict=True)
        ]
        yield list(zip(good, best, strict=True)), wrong


class Table:
    """A table at the end."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.rows = file, []  # type: ignore[var-annotated]

    def add(self, path: str, best: Best) -> None:
        self.rows += [
            (path if rank == 0 else "", name, f"{chance:.1%}") for rank, (name, chance) in enumerate(best)
        ]

    def close(self) -> None:
        if self.rows:
            text = tabulate(
                self.rows,
                headers=("picture", "class", "probability"),
                disable_numparse=True,
                colalign=("left", "left", "right"),
            )
            self.file.write(text + "\n")


class Csv:
    """A line for each picture and rank."""

    def __init__(self, file: TextIO) -> None:
        self.writer = csv.writer(file, lineterminator="\n")
        self.writer.writerow(("picture", "rank", "class", "probability"))

    def add(self, path: str, best: Best) -> None:
        self.writer.writerows(
            (path, rank, name, f"{chance:.6f}") for rank, (name, chance) in enumerate(best, 1)
        )

    def close(self) -> None:
        pass


class Jsonl:
    """A JSON object for each picture, on a line of its own."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def add(self, path: str, best: Best) -> None:
        classes = [{"class": name, "probability": round(chance, 6)} for name, chance in best]
        self.file.write(json.dumps({"picture": path, "classes": classes}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        pass


FORMATS: dict[str, Callable[[TextIO], Table | Csv | Jsonl]] = {"table": Table, "csv": Csv, "jsonl": Jsonl}
