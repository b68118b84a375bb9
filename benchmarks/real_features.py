"""Stage 3 on real image features: python benchmarks/real_features.py FILE.npz... [--shots 16] [--splits 5]

Files as the data set `Features` reads them (x_val, y_val, x_test, y_test, text, classnames). The owner fits a
teacher on the val features of the base classes; the client gets its rows, the names' text features and
nothing else. Prints base-to-new (accuracy in %) and GZSL (per-class means over the joint label space), mean
over seeds, against the free baselines:

    zero-shot         text rows
    teacher + zero    the teacher for base, text rows for new
    mix + zero        unit rows of 0.7 text + 0.3 teacher for base, text rows for new

GZSL rows in brackets had the scale of base rows against new ones and the offset between them chosen by the
TEST labels: the best that the baseline could do if somebody set its scales for it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from dfzsl.trainers.generation.build import build_classifier
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.trainers.generation.training import StageThreeSettings
from dfzsl.trainers.recovery.oracles import open_oracle
from dfzsl.trainers.recovery.recover import RecoverySettings, recover
from dfzsl.trainers.recovery.teacher import fit_teacher


def harmonic(a: float, b: float) -> float:
    return 2 * a * b / max(a + b, 1e-9)


class Task:
    """One data set with a base/new split: `order` lists its classes, base ones first."""

    def __init__(self, path: Path, order: np.ndarray | None) -> None:
        with np.load(path) as file:
            array = {name: file[name] for name in file.files}
        count = len(array["text"])
        order = np.arange(count) if order is None else order[:count]
        place = np.argsort(order)
        self.base = (count + 1) // 2
        self.names = [str(array["classnames"][i]) for i in order]
        self.text = F.normalize(torch.from_numpy(array["text"][order]).float(), dim=1)
        self.x_val, self.x_test = (
            F.normalize(torch.from_numpy(array[name]).float(), dim=1) for name in ("x_val", "x_test")
        )
        self.y_val, self.y_test = (torch.from_numpy(place[array[name]]) for name in ("y_val", "y_test"))

    def teacher(self, shots: int, generator: torch.Generator):
        mine = self.y_val < self.base
        names = self.names[: self.base]
        return fit_teacher(self.x_val[mine], self.y_val[mine], names, shots=shots, generator=generator)

    def base_to_new(self, logits: Tensor) -> list[float]:
        seen = self.y_test < self.base
        base = logits[seen, : self.base].argmax(1) == self.y_test[seen]
        new = logits[~seen, self.base :].argmax(1) == self.y_test[~seen] - self.base
        b, n = 100 * base.double().mean().item(), 100 * new.double().mean().item()
        return [b, n, harmonic(b, n)]

    def gzsl(self, logits: Tensor) -> list[float]:
        hit = (logits.argmax(1) == self.y_test).double()
        count = torch.bincount(self.y_test, minlength=len(self.names))
        rate = 100 * torch.zeros_like(count).double().index_add_(0, self.y_test, hit) / count.clamp(min=1)
        held = count > 0
        u, s = (
            rate[self.base :][held[self.base :]].mean().item(),
            rate[: self.base][held[: self.base]].mean().item(),
        )
        return [u, s, harmonic(u, s)]

    def gzsl_at_best(self, base: Tensor, new: Tensor) -> list[float]:
        """GZSL of base and new rows with the scale and the offset that the test labels like best."""
        left, right = self.x_test @ base.T, self.x_test @ new.T
        center = left.mean(1, keepdim=True)
        best = [0.0, 0.0, 0.0]
        for scale in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0):
            scaled = scale * (left - center)
            # New rows relative to the mean of all texts, so that offsets near 0 are tried.
            other = right - (self.x_test @ self.text.T).mean(1, keepdim=True)
            for offset in np.linspace(-0.06, 0.08, 36):
                best = max(best, self.gzsl(torch.cat([scaled, other + offset], 1)), key=lambda r: r[2])
        return best


def run(task: Task, shots: int, seed: int, recovery: dict, settings: dict) -> dict[str, list[float]]:
    """Rows of the table for one task and seed: B, N, H and U, S, H."""
    generator = torch.Generator().manual_seed(seed)
    teacher = task.teacher(shots, generator)
    base_text, new_text = task.text[: task.base], task.text[task.base :]
    rows = F.normalize(teacher.weight, dim=1)
    mix = F.normalize(0.7 * base_text + 0.3 * rows, dim=1)
    virtual = recover(
        open_oracle(teacher, "weights"), base_text, new_text=new_text, generator=generator, **recovery
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ours: Classifier = build_classifier(
            virtual,
            base_text,
            new_text,
            new_classnames=task.names[task.base :],
            settings=StageThreeSettings(**settings),
            generator=generator,
        )
    table = {}
    for name, base in (("zero-shot", base_text), ("teacher + zero", rows), ("mix + zero", mix)):
        logits = task.x_test @ torch.cat([base, new_text]).T
        table[name] = task.base_to_new(logits) + task.gzsl(logits)
        if name != "zero-shot":
            table[f"[{name}, scales in hindsight]"] = task.base_to_new(logits) + task.gzsl_at_best(
                base, new_text
            )
    logits = ours.logits(task.x_test)
    table["DFZSL"] = task.base_to_new(logits) + task.gzsl(logits)
    return table


def overrides(words: list[str], cls: type) -> dict:
    """KEY VALUE pairs as field values of the settings dataclass."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(cls)}
    values = {}
    for key, word in zip(words[::2], words[1::2], strict=True):
        values[key] = word == "True" if isinstance(defaults[key], bool) else type(defaults[key])(word)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--shots", type=int, default=0, help="teacher images per class; 0: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--splits", type=int, default=0, help="this many random class splits, not the official one"
    )
    parser.add_argument(
        "--generator", nargs="*", default=[], metavar="KEY VALUE", help="GENERATOR.* settings"
    )
    parser.add_argument("--recovery", nargs="*", default=[], metavar="KEY VALUE", help="RECOVERY.* settings")
    args = parser.parse_args()
    settings = overrides(args.generator, StageThreeSettings)
    recovery = overrides(args.recovery, RecoverySettings)
    for path in args.files:
        rows: dict[str, list[list[float]]] = {}
        for seed in range(args.seeds):
            for split in range(max(args.splits, 1)):
                order = None
                if args.splits:
                    with np.load(path) as file:
                        order = np.random.default_rng(split).permutation(len(file["text"]))
                for name, row in run(Task(path, order), args.shots, seed, recovery, settings).items():
                    rows.setdefault(name, []).append(row)
        mean = [[name, *np.mean(values, 0)] for name, values in rows.items()]
        spread = np.std(rows["DFZSL"], 0)
        teacher = f"{args.shots} shots" if args.shots else "all val images"
        split_name = f"{args.splits} random splits" if args.splits else "official split"
        print(f"\n{path.stem}: {split_name}, teacher on {teacher}, {args.seeds} seeds")
        print(
            tabulate(
                [*mean, ["  (standard deviation)", *spread]],
                headers=["", "base", "new", "H", "GZSL U", "S", "H"],
                floatfmt=".1f",
                tablefmt="github",
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
