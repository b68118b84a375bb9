"""Compare data folders with the published data sets."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from tabulate import tabulate
from tqdm import tqdm

from dfzsl.datasets.base import ClassDataset
from dfzsl.datasets.encoding import read_image
from dfzsl.utils.errors import UserError

from .recipes import RECIPES


@dataclass
class Report:
    """Result of checking a data set.

    Attributes:
        counts: number of classes, training, validation and test images.
        missing: paths of missing images.
        broken: messages about unreadable images.
        problems: other messages.
    """

    counts: tuple[int, int, int, int] = (0, 0, 0, 0)
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.broken or self.problems)


def open_leniently(name: str, root: Path) -> ClassDataset:
    """Open a data set whose items are table rows, so that a missing image does not raise an error."""
    cls = DATASET_REGISTRY.get(name)
    cfg = get_cfg_default()
    cfg.merge_from_list(["DATASET.NAME", name, "DATASET.ROOT", str(root)])
    return type(cls.__name__, (cls,), {"datum": lambda self, row, label: row})(cfg)


def image_error(path: str) -> str:
    """Decode an image file and return the error message, or "" if there is none."""
    try:
        read_image(path)
    except UserError as error:
        return str(error)
    return ""


def check(name: str, root: Path, workers: int) -> Report:
    """Check counts, class names and images of a data set. Every image is decoded."""
    report = Report()
    try:
        dataset = open_leniently(name, root)
    except UserError as error:
        report.problems.append(str(error))
        return report
    train = [] if dataset.test_only else dataset.train_x
    report.counts = (len(dataset.all_classnames), len(train), len(dataset.val), len(dataset.test))
    for noun, count, expected in zip(
        ("classes", "training images", "validation images", "test images"),
        report.counts,
        RECIPES[name].counts,
        strict=True,
    ):
        if count != expected:
            report.problems.append(f"{count} {noun}; the published data set has {expected}")
    duplicates = [name for name, count in Counter(dataset.all_classnames).items() if count > 1]
    report.problems += [f"class names must be unique: '{name}' occurs twice" for name in duplicates]
    paths = list(dict.fromkeys(row.path for row in [*train, *dataset.val, *dataset.test]))
    report.missing = [path for path in paths if not os.path.isfile(path)]
    existing = sorted(set(paths) - set(report.missing))
    with ProcessPoolExecutor(workers) as pool:
        errors = pool.map(image_error, existing, chunksize=64)
        report.broken = [error for error in tqdm(errors, total=len(existing), unit="img", desc=name) if error]
    return report


def table(reports: dict[str, Report]) -> str:
    """Return a table of one row per data set, and below it the first five problems of each kind."""
    rows, lines = [], []
    for name, report in reports.items():
        status = "ok" if report.ok else "see below"
        rows.append([name, *report.counts, len(report.missing), len(report.broken), status])
        for problems in (report.problems, [f"{path}: missing" for path in report.missing], report.broken):
            lines += [f"{name}: {problem}" for problem in problems[:5]]
            lines += [f"{name}: ... and {len(problems) - 5} more"] if len(problems) > 5 else []
    headers = ["data set", "classes", "train", "val", "test", "missing", "broken", "status"]
    return "\n".join([tabulate(rows, headers), *lines])
