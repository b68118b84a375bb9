"""What each access level costs and gives, and how far the geometry is from the truth, on real features.

    python benchmarks/recovery.py FOLDER

FOLDER holds .npz files of CLIP features (x_val, y_val, x_test, y_test, text, classnames). The teacher is
fitted on x_val of the base classes (the first half); x_test of those classes is the truth.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate

from dfzsl.trainers.recovery import vmf
from dfzsl.trainers.recovery.class_directions import (
    class_directions,
    common_direction,
    estimate_class_mean_cosine,
    paper_concentration,
    typical_concentration,
)
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.oracle import Oracle
from dfzsl.trainers.recovery.recover import recover
from dfzsl.trainers.recovery.teacher import fit_teacher
from dfzsl.utils.errors import UserError

METHODS: list[tuple[str, str, dict]] = [
    ("weights", "closed form", {}),
    ("logits", "closed form", {}),
    ("logits", "moments, 1000 steps", {"method": "moments", "epochs": 1000}),
    ("logits", "simulator, 300 x 8", {"method": "simulator", "epochs": 300, "draws": 8}),
    ("logits", "simulator, 1000 x 50", {"method": "simulator", "epochs": 1000, "draws": 50}),
    ("probabilities", "closed form", {}),
    ("labels", "boundary search, 1.1 x 8", {"rays": 1.1, "bisections": 8}),
    ("labels", "boundary search, 1.25 x 12", {}),
    ("labels", "boundary search, 1.5 x 16", {"rays": 1.5, "bisections": 16}),
]


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(a, b, dim=-1)


class RealSet:
    """The base classes of one file: a teacher, the text features, and the truth about the image features."""

    def __init__(self, path: Path) -> None:
        file = np.load(path)
        self.name = path.stem
        classes = (len(file["classnames"]) + 1) // 2
        self.classnames = [str(name) for name in file["classnames"][:classes]]
        self.all_text = F.normalize(torch.from_numpy(file["text"].astype("float32")), dim=1)
        self.text = self.all_text[:classes]

        def base(split: str) -> tuple[torch.Tensor, torch.Tensor]:
            labels = torch.from_numpy(file[f"y_{split}"].astype("int64"))
            features = F.normalize(torch.from_numpy(file[f"x_{split}"].astype("float32")), dim=1)
            return features[labels < classes], labels[labels < classes]

        self.teacher = fit_teacher(*base("val"), self.classnames)
        self.test = base("test")
        self.means, self.kappa = vmf.fit_classes(*self.test, classes)
        self.common = F.normalize(self.means.mean(0), dim=0)

    @property
    def coherence(self) -> float:
        return float(vmf.mean_resultant_length(self.kappa.median(), self.text.shape[1]))

    @property
    def cone(self) -> float:
        return float((self.means @ self.common).mean())


def recovery_table(data: RealSet) -> str:
    """Queries, seconds and cosine to the teacher's rows (with what is visible of them), by access level."""
    rows = F.normalize(data.teacher.weight, dim=1)
    features = data.test[0]
    table = []
    for level, method, settings in METHODS:
        started = time.perf_counter()
        oracle = open_oracle(data.teacher, level)
        paper: dict = {"directions": "teacher", "concentration": "paper"}
        generator = torch.Generator().manual_seed(0)
        virtual = recover(oracle, data.text, generator=generator, **paper | settings)
        taken = time.perf_counter() - started
        seen = rows - rows.mean(0) if level in ("probabilities", "labels") else rows
        near = cosine(virtual.weight, seen)
        agree = (virtual.logits(features).argmax(1) == (features @ rows.T).argmax(1)).float().mean()
        table.append(
            (
                level,
                method,
                virtual.queries,
                f"{taken:.2f}",
                float(near.mean()),
                float(near.min()),
                100 * agree,
            )
        )
    headers = ("access", "method", "queries", "seconds", "mean cosine", "lowest", "same answer %")
    return tabulate(
        table, headers, tablefmt="github", floatfmt=("", "", "", "", ".5f", ".5f", ".1f"), intfmt=","
    )


BUDGETS = (1_000, 5_000, 20_000, 80_000, 200_000)
ANSWERS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "logits, 2 decimals": ("logits", lambda answers: answers.round(decimals=2)),
    "probabilities, 4 decimals": ("probabilities", lambda answers: answers.round(decimals=4)),
    "labels": ("labels", lambda answers: answers),
}


def budget_table(data: RealSet) -> str:
    """The rows' error, estimated and true, and the recovered teacher's accuracy, by what may be asked."""
    rows = F.normalize(data.teacher.weight, dim=1)
    true = rows - rows.mean(0)
    features, labels = data.test
    table = []
    for name, (level, change) in ANSWERS.items():
        answer = open_oracle(data.teacher, level).answer
        for budget in BUDGETS:
            oracle = Oracle(
                lambda x, answer=answer, change=change: change(answer(x)),
                level,
                data.classnames,
                rows.shape[1],
                budget=budget,
            )
            row: list = [name, f"{budget:,}"]
            try:
                virtual = recover(oracle, data.text, generator=torch.Generator().manual_seed(0))
            except UserError:
                table.append([*row, f"{oracle.queries:,}", "", "", "", ""])
                continue
            found = virtual.weight - virtual.weight.mean(0)
            scale = (found * true).sum() / found.square().sum()  # labels show none
            top = virtual.logits(features).argmax(1)
            same = (top == (features @ rows.T).argmax(1)).float().mean()
            right = (top == labels).float().mean()
            error = (scale * found - true).norm() / true.norm()
            told = "" if virtual.error is None else f"{virtual.error:.3f}"
            row += [f"{virtual.queries:,}", told, f"{error:.3f}", f"{100 * same:.1f}", f"{100 * right:.1f}"]
            table.append(row)
    headers = ("answers", "budget", "queries", "error, estimated", "error", "same answer %", "accuracy %")
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def concentration_table(sets: list[RealSet]) -> str:
    """The true kappa (median over classes) beside the paper's rule and the coherence of the other sets."""
    table = []
    for data in sets:
        true, d = float(data.kappa.median()), data.text.shape[1]
        others = [other.coherence for other in sets if other is not data]
        left_out = typical_concentration(d, float(np.mean(others)))
        shipped = typical_concentration(d)
        rule = paper_concentration(data.text)
        spread = float(data.kappa.log().std())
        table.append(
            (data.name, true, spread, rule, true / rule, left_out, left_out / true, shipped, shipped / true)
        )
    headers = (
        *("set", "true kappa", "sd of log", "paper's rule", "true / rule"),
        *("leave one out", "ratio", "shipped", "ratio"),
    )
    return tabulate(
        table,
        headers,
        tablefmt="github",
        floatfmt=("", ".0f", ".2f", ".0f", ".1f", ".0f", ".2f", ".0f", ".2f"),
    )


def directions_table(sets: list[RealSet]) -> str:
    """Cosine of estimated class means to the true ones: as they are, and without their common part."""
    table = []
    for data in sets:
        weight = F.normalize(data.teacher.weight, dim=1)
        others = [other for other in sets if other is not data]
        elsewhere = F.normalize(torch.stack([other.common for other in others]).mean(0), dim=0)
        cone = float(np.mean([other.cone for other in others]))
        neutral = common_direction(data.all_text)
        estimates = {
            "text": data.text,
            "teacher's rows": weight,
            "geometry (shipped)": class_directions(weight, neutral, estimate_class_mean_cosine(data.text)),
            "geometry, cone left out": class_directions(weight, neutral, cone),
            "geometry, image cone of the other sets": class_directions(weight, elsewhere, cone),
            "geometry, own image cone (oracle)": class_directions(weight, data.common, data.cone),
        }
        truth = data.means - data.means.mean(0)
        features, labels = data.test
        for name, mu in estimates.items():
            right = ((features @ (mu - mu.mean(0)).T).argmax(1) == labels).float().mean()
            near = cosine(mu - mu.mean(0), truth).mean()
            table.append((data.name, name, float(cosine(mu, data.means).mean()), float(near), 100 * right))
    headers = ("set", "estimate", "cosine to class mean", "without the common part", "nearest centred mean %")
    return tabulate(table, headers, tablefmt="github", floatfmt=("", "", ".3f", ".3f", ".1f"))


def asked_for(description: str) -> tuple[Path, list[RealSet]]:
    """The folder on the command line and the data sets in it."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("folder", type=Path)
    folder = flags.parse_args().folder
    return folder, [RealSet(path) for path in sorted(folder.glob("*.npz"))]


def main() -> None:
    folder, sets = asked_for(__doc__)
    if len(sets) < 2:
        raise UserError(f"{folder}: at least two .npz files are needed")
    for data in sets:
        print(f"\n{data.name}: {len(data.classnames)} base classes, d = {data.text.shape[1]}\n")
        print(recovery_table(data), flush=True)
        print("\n" + budget_table(data), flush=True)
    print("\nConcentration\n\n" + concentration_table(sets))
    print("\nDirections\n\n" + directions_table(sets))


if __name__ == "__main__":
    main()
