"""results.json files as runs write them, made up: for tests of tables and pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ELEVEN = ["imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101"]
ELEVEN += ["fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"]
# Trainer -> gain on zero-shot CLIP on base and on new classes, in points.
GAINS: dict[str, tuple[float, float]] = {
    "ZeroshotCLIP": (0, 0),
    "TeacherZeroshot": (12, 0),
    "TextTeacherMix": (9, 0),
    "CoOp": (13, -11),
    "CoCoOp": (11, -2.5),
    "KgCoOp": (11, -0.5),
    "ProGrad": (11, -2.5),
    "DFZSL": (13, 2.5),
    "DFZSL:paper": (6, 0.5),
}
FIXED = ("ZeroshotCLIP", "TeacherZeroshot", "TextTeacherMix")  # the same whatever the seed


def write(
    root: Path, part: str, method: str, seed: int, accuracy: float, data: str = "animals", **changes
) -> Path:
    """One run's results.json as a trainer writes it, below a protocol's folder."""
    config = changes.pop("config", "vit")
    folder = root / part / data / "shots_16" / method / config / f"seed{seed}"
    folder.mkdir(parents=True)
    results = {
        "schema": 1,
        "backbone": "ViT-B-16",
        "accuracy": accuracy,
        "per_class": [],
        "trained_parameters": 2048,
        "images_used": 16,
        "queries": 0,
        "seconds": {"train": 1.5, "recovery": 0.5},
        "notes": [],
        "versions": {"dfzsl": "0.1.0"},
    }
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


def write_pair(root: Path, method: str, seed: int, base: float, new: float, **changes) -> None:
    write(root, "train_base", method, seed, base, **changes)
    write(root, "test_new", method, seed, new, **changes)


def write_failure(root: Path, method: str, seed: int, text: str, data: str = "animals") -> None:
    folder = root / "train_base" / data / "shots_16" / method / "vit" / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "failed.txt").write_text(text)


def write_world(
    root: Path,
    datasets: Sequence[str] = ("animals",),
    classes: int = 6,
    names: str = "class {}",
    methods: Sequence[str] = ("ZeroshotCLIP", "CoOp", "DFZSL"),
    seeds: Sequence[int] = (1, 2, 3),
) -> None:
    """Runs of base-to-new with `classes` classes in all; classes differ by 15 points, their gains by 5."""
    for data in datasets:
        rng = np.random.default_rng(len(data))
        hard = rng.normal(rng.uniform(55, 80), 15, classes)
        for method in methods:
            trainer, _, config = method.partition(":")
            gains = GAINS[method] + rng.normal(0, 5, (classes, 1))
            for seed in seeds:
                noise = 0 if method in FIXED else rng.normal(0, 1.5, (classes, 1))
                for part, side, new in (("train_base", 0, False), ("test_new", 1, True)):
                    mine = range(classes // 2, classes) if new else range(classes // 2)
                    moved = 0 if method == "ZeroshotCLIP" else (gains + noise)[:, side]
                    percent = np.clip(hard + moved, 0, 100).round().astype(int)
                    rows = [
                        {"class": names.format(i), "correct": int(percent[i]), "total": 100, "new": new}
                        for i in mine
                    ]
                    changes: dict = {"config": config or "vit", "per_class": rows}
                    if method not in FIXED and not new:
                        epochs = 1 if method == "CoCoOp" else 10 + seed
                        changes["curves"] = {"loss": [4 / (1 + epoch) for epoch in range(epochs)]}
                    accuracy = sum(row["correct"] for row in rows) / len(rows)
                    write(root, part, trainer, seed, accuracy, data, **changes)


def write_transfer(root: Path, methods: Sequence[str] = ("ZeroshotCLIP", "CoOp", "DFZSL")) -> None:
    """Runs of cross-data-set transfer, from ImageNet to the other ten and its variants, two classes each."""
    targets = [*ELEVEN[1:], "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
    rng = np.random.default_rng(0)
    for method in methods:
        for seed in (1, 2):
            for data in ("imagenet", *targets):
                correct = [int(x) for x in rng.integers(40, 90, 2)]
                rows = [
                    {"class": f"c{i}", "correct": c, "total": 100, "new": False}
                    for i, c in enumerate(correct)
                ]
                part = "train_all" if data == "imagenet" else "test_all"
                write(root, part, method, seed, sum(correct) / 2, data, per_class=rows)
