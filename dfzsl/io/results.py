"""Write and read results.json, the measurements of one run.

Tables are made from these files, not from logs.

The keys of schema 1:
    trainer, dataset, backbone, classes ("base", "new", "all"), shots, seed: identify the run
    accuracy: in percent, over all test images; per_class: [{class, correct, total, new}]
    trained_parameters (not known for a checkout), images_used (for training), queries (to the teacher)
    curves: {name: one value per epoch}; concentration: [{class, recovered, true}] if the truth is known
    notes: sentences for the report
    seconds: {stage: seconds of training}; elapsed: seconds of the whole run; peak_memory: bytes
    config: the whole config as YAML; versions: of Python, packages and the checkout (git revision)

The same command on the same machine reproduces the values of all keys except CHANGING, interrupted or not.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfzsl.utils.errors import UserError

from .files import read_json, write_json

if TYPE_CHECKING:  # tables are made without torch, which takes two seconds to import
    from torch import Tensor

SCHEMA = 1
RESULTS = "results.json"
VOLATILE_KEYS = ("seconds", "elapsed", "peak_memory")


def harmonic_mean(a: float, b: float) -> float:
    """Return 2ab / (a + b), or 0 if both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def per_class_mean(per_class: Sequence[dict[str, Any]]) -> float:
    """Return the mean over classes of the per-class accuracy in percent (U and S of the GZSL protocol)."""
    accuracies = [100.0 * row["correct"] / row["total"] for row in per_class if row["total"]]
    return sum(accuracies) / len(accuracies) if accuracies else 0.0


def per_class_counts(
    predictions: Tensor, labels: Tensor, classnames: Sequence[str], new_classnames: Sequence[str]
) -> list[dict[str, Any]]:
    """Count correct predictions by class, the value of the key `per_class`.

    Args:
        predictions: predicted labels, shape (n,).
        labels: true labels, shape (n,).
        classnames: names of the classes, by label.
        new_classnames: those of them that are new classes.

    Returns:
        {"class", "correct", "total", "new"} for each class.
    """
    import torch

    correct, total = (
        torch.bincount(subset, minlength=len(classnames)).tolist()
        for subset in (labels[predictions == labels], labels)
    )
    new = set(new_classnames)
    return [
        {"class": name, "correct": c, "total": t, "new": name in new}
        for name, c, t in zip(classnames, correct, total, strict=True)
    ]


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: of the GPU if there is one, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0  # Windows has no resource module
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_results(path: str | os.PathLike[str], cfg: Any, **measured: Any) -> None:
    """Write the results of a run, with its config and the package versions."""
    run = {
        "trainer": cfg.TRAINER.NAME,
        "dataset": cfg.DATASET.NAME,
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "classes": cfg.DATASET.SUBSAMPLE_CLASSES,
        "shots": cfg.DATASET.NUM_SHOTS,
        "seed": cfg.SEED,
    }
    write_result_values(path, **run, **measured, config=cfg.dump())


def write_result_values(path: str | os.PathLike[str], *, config: str, **values: Any) -> None:
    """Write the results of a run whose config is text. `values` are keys of the schema."""
    about = {"config": abbreviate_home(config), "versions": _versions()}
    write_json(path, {"schema": SCHEMA, **values, **about})


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results.json. Raises UserError if it is missing, broken or of another schema."""
    results = read_json(path)
    if not isinstance(results, dict) or "schema" not in results:
        raise UserError(f"{path}: not a results file of this project")
    if (schema := results["schema"]) != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        advice = "update this project" if newer else "delete it to repeat the run"
        raise UserError(f"{path}: schema {schema}, this version reads {SCHEMA}; {advice}")
    return results


def abbreviate_home(text: str) -> str:
    """Replace the home folder by ~ in a text, so that published results contain no user name."""
    home = str(Path.home())
    return text.replace(f"{home}/", "~/") if len(home) > 1 else text


def _versions() -> dict[str, str]:
    """Return the versions of Python, packages and this checkout."""
    versions = {"python": platform.python_version()}
    for package in ("dfzsl", "dassl", "torch", "open_clip_torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        versions["revision"] = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        versions["revision"] = "unknown"
    return versions
