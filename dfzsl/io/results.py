"""Write and read the results.json of a run: what was measured, of which run, with which versions.

Tables are made from these files and never from a log.

The keys of schema 1:
    trainer, dataset, backbone, classes ("base", "new", "all"), shots, seed: which run it is
    accuracy: in percent, over all test images; per_class: [{class, correct, total, new}]
    trained_parameters (a checkout's log tells none), images_used (for training), queries (to the teacher)
    curves: {name: a value an epoch}; concentration: [{class, recovered, true}] where the truth is known
    notes: sentences for the tables
    seconds: {stage: seconds of training}; elapsed: seconds of the whole run; peak_memory: bytes
    config: the whole config as YAML; versions: of Python, packages and the checkout (git revision)

The same command on the same machine gives the same values for all keys but CHANGING, interrupted or not.
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
    """2ab / (a + b), and 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def per_class_mean(per_class: Sequence[dict[str, Any]]) -> float:
    """Mean over classes of the accuracy within the class, in percent (the GZSL protocol's U and S)."""
    seen = [100.0 * row["correct"] / row["total"] for row in per_class if row["total"]]
    return sum(seen) / len(seen) if seen else 0.0


def per_class_counts(
    predictions: Tensor, labels: Tensor, classnames: Sequence[str], new_classnames: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows `per_class` of predicted (n,) and true labels (n,), in the order of `classnames`."""
    import torch

    correct, total = (
        torch.bincount(which, minlength=len(classnames)).tolist()
        for which in (labels[predictions == labels], labels)
    )
    new = set(new_classnames)
    return [
        {"class": name, "correct": c, "total": t, "new": name in new}
        for name, c, t in zip(classnames, correct, total, strict=True)
    ]


def peak_memory() -> int:
    """Highest memory of this process so far in bytes: of the GPU where one is used, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0  # it has no such count
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_results(path: str | os.PathLike[str], cfg: Any, **measured: Any) -> None:
    """Write one run's results with its whole config and the versions it ran on."""
    named = {
        "trainer": cfg.TRAINER.NAME,
        "dataset": cfg.DATASET.NAME,
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "classes": cfg.DATASET.SUBSAMPLE_CLASSES,
        "shots": cfg.DATASET.NUM_SHOTS,
        "seed": cfg.SEED,
    }
    write_result_values(path, **named, **measured, config=cfg.dump())


def write_result_values(path: str | os.PathLike[str], *, config: str, **values: Any) -> None:
    """Write results of a run whose config is known as text; `values` are the keys that the schema has."""
    about = {"config": abbreviate_home(config), "versions": _versions()}
    write_json(path, {"schema": SCHEMA, **values, **about})


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results.json. Raises UserError for a missing or broken file and for another schema."""
    results = read_json(path)
    if not isinstance(results, dict) or "schema" not in results:
        raise UserError(f"{path}: not a results file of this project")
    if (schema := results["schema"]) != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        how = "update this project" if newer else "delete it to repeat the run"
        raise UserError(f"{path}: schema {schema}, this version reads {SCHEMA}; {how}")
    return results


def abbreviate_home(text: str) -> str:
    """Results are passed on: a path below the home folder begins with ~, and names no user."""
    home = str(Path.home())
    return text.replace(f"{home}/", "~/") if len(home) > 1 else text


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("dfzsl", "dassl", "torch", "open_clip_torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        found["revision"] = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        found["revision"] = "unknown"
    return found
