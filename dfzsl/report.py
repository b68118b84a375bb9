"""Tables from the results.json files of a protocol's folder: `python -m dfzsl.report OUTPUT/base2new`."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from . import train
from .errors import UserError
from .results import RESULTS, harmonic_mean, per_class_mean, read_results


@dataclass(frozen=True, order=True)
class Method:
    """What a row of a table is about."""

    dataset: str
    shots: str
    name: str
    config: str

    @property
    def label(self) -> str:
        name, _, source = self.name.partition("@")
        return f"{name} (virtual features)" if source else name


@dataclass
class Outcome:
    """One method with one seed: what each part measured, and why it is missing where it failed."""

    method: Method
    seed: int
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: str = ""

    def scores(self) -> tuple[float, float] | None:
        """(base, new) in base-to-new, (S, U) in GZSL, in percent; None while a part is missing."""
        if "train_base" in self.parts and "test_new" in self.parts:
            return self.parts["train_base"]["accuracy"], self.parts["test_new"]["accuracy"]
        if "test_all" in self.parts and "train_base" in self.parts:
            rows = self.parts["test_all"]["per_class"]
            return (
                per_class_mean([row for row in rows if not row["new"]]),
                per_class_mean([row for row in rows if row["new"]]),
            )
        return None


def collect(root: Path) -> list[Outcome]:
    """Every outcome below `root` (OUTPUT/base2new or OUTPUT/gzsl), in order of method and seed.

    Raises UserError when there is none.
    """
    found: dict[tuple[Method, int], Outcome] = {}
    for path in sorted(root.glob("*/*/shots_*/*/*/seed*/*")):
        if path.name not in (RESULTS, "failed.txt"):
            continue
        part, dataset, shots, name, config, seed = path.parent.relative_to(root).parts
        key = Method(dataset, shots.removeprefix("shots_"), name, config), int(seed.removeprefix("seed"))
        outcome = found.setdefault(key, Outcome(*key))
        if path.name == RESULTS:
            outcome.parts[part] = read_results(path)
        else:
            outcome.failure = path.read_text(encoding="utf-8").strip()
    if not found:
        raise UserError(f"{root}: no results here; give the folder of a protocol, such as output/base2new")
    return [found[key] for key in sorted(found)]


def spread(values: Sequence[float]) -> str:
    """Mean and population standard deviation, as CoOp's parse_test_res.py computes it."""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.pstdev(values):.1f}" if len(values) > 1 else mean


def table(
    outcomes: Sequence[Outcome], columns: tuple[str, str]
) -> tuple[list[str], list[list[str]], list[str]]:
    """(headers, rows, notes) for the outcomes of one data set; `columns` names the two scores."""
    groups: dict[Method, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.method].append(outcome)
    rows, notes = [], []
    for method, members in groups.items():
        scored = [(member, score) for member in members if (score := member.scores())]
        for member in members:
            if member.failure and not member.scores():
                notes.append(f"{method.label}, seed {member.seed}: failed and left out: {member.failure}")
        if not scored:
            continue
        base, new = zip(*(score for _, score in scored), strict=True)
        runs = [member.parts["train_base"] for member, _ in scored]
        notes += sorted({f"{method.label}: {note}" for run in runs for note in run["notes"]})
        rows.append(
            [
                method.label,
                method.shots,
                spread(base),
                spread(new),
                f"{harmonic_mean(statistics.fmean(base), statistics.fmean(new)):.1f}",
                spread([harmonic_mean(b, n) for b, n in zip(base, new, strict=True)]),
                str(len(scored)),
                f"{statistics.fmean(sum(run['seconds'].values()) for run in runs):.1f}",
                f"{runs[0]['trained_parameters']:,}",
                f"{runs[0]['images_used']:,}",
                f"{runs[0]['queries']:,}",
            ]
        )
    rows.sort(key=lambda row: float(row[4]))
    headers = [
        "method",
        "shots",
        *columns,
        "H",
        "mean of H",
        "seeds",
        "seconds",
        "trained",
        "images",
        "queries",
    ]
    return headers, rows, notes


def show(root: Path, style: str = "simple") -> None:
    """Print one table per data set, and the average over data sets where there are several."""
    outcomes = collect(root)
    columns = ("seen S", "unseen U") if root.name == "gzsl" else ("base", "new")
    sets = sorted({outcome.method.dataset for outcome in outcomes})
    for dataset in sets:
        headers, rows, notes = table([o for o in outcomes if o.method.dataset == dataset], columns)
        print(f"\n{dataset}, {root.name} (accuracy in percent, mean ± standard deviation over seeds)")
        print(
            tabulate(
                rows, headers, tablefmt=style, disable_numparse=True, colalign=("left",) + ("right",) * 10
            )
        )
        for note in notes:
            print(f"  {note}")
    print("\nH: harmonic mean of the averaged scores, as published; mean of H: average of each seed's H.")


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m dfzsl.report", description=__doc__)
    flags.add_argument("folder", type=Path, help="a protocol's folder, such as output/base2new")
    flags.add_argument(
        "--style", default="simple", help="a tabulate format: simple, github, latex_booktabs, ..."
    )
    args = flags.parse_args()
    show(args.folder, args.style)


if __name__ == "__main__":
    train.cli(main)
