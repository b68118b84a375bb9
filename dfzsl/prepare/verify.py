"""What a data folder holds against what was published."""

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
    """What `check` found: counts, and every problem in words."""

    counts: tuple[int, int, int, int] = (0, 0, 0, 0)
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        return not (self.missing or self.broken or self.problems)


def open_leniently(name: str, root: Path) -> ClassDataset:
    """The data set with rows for Datums, so that a missing image is counted and not an error."""
    cls = DATASET_REGISTRY.get(name)
    cfg = get_cfg_default()
    cfg.merge_from_list(["DATASET.NAME", name, "DATASET.ROOT", str(root)])
    return type(cls.__name__, (cls,), {"datum": lambda self, row, label: row})(cfg)


def trouble(path: str) -> str:
    """What is wrong with an image file: "" if it can be decoded to its end."""
    try:
        read_image(path)
    except UserError as error:
        return str(error)
    return ""


def check(name: str, root: Path, workers: int) -> Report:
    """Counts, class names and splits of a data set, and every one of its images decoded."""
    report = Report()
    try:
        dataset = open_leniently(name, root)
    except UserError as error:
        report.problems.append(str(error))
        return report
    train = [] if dataset.test_only else dataset.train_x
    report.counts = (len(dataset.all_classnames), len(train), len(dataset.val), len(dataset.test))
    for what, found, expected in zip(
        ("classes", "training images", "validation images", "test images"),
        report.counts,
        RECIPES[name].counts,
        strict=True,
    ):
        if found != expected:
            report.problems.append(f"{found} {what}; the published data set has {expected}")
    twins = [called for called, count in Counter(dataset.all_classnames).items() if count > 1]
    report.problems += [f"two classes are called '{called}'" for called in twins]
    paths = list(dict.fromkeys(row.path for row in [*train, *dataset.val, *dataset.test]))
    report.missing = [path for path in paths if not os.path.isfile(path)]
    there = sorted(set(paths) - set(report.missing))
    with ProcessPoolExecutor(workers) as pool:
        told = pool.map(trouble, there, chunksize=64)
        report.broken = [said for said in tqdm(told, total=len(there), unit="img", desc=name) if said]
    return report


def table(reports: dict[str, Report]) -> str:
    """One row a data set, then what is wrong in words: the first five of each kind."""
    rows, words = [], []
    for name, report in reports.items():
        verdict = "fine" if report.fine else "see below"
        rows.append([name, *report.counts, len(report.missing), len(report.broken), verdict])
        for said in (report.problems, [f"{path}: missing" for path in report.missing], report.broken):
            words += [f"{name}: {line}" for line in said[:5]]
            words += [f"{name}: ... and {len(said) - 5} more"] if len(said) > 5 else []
    heads = ["data set", "classes", "train", "val", "test", "missing", "broken", "verdict"]
    return "\n".join([tabulate(rows, heads), *words])
