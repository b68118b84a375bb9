"""Accuracy on real image features: python benchmarks/real_features.py FILE.npz... [--geometry FILE...]

Files as the data set `Features` reads them (x_val, y_val, x_test, y_test, text, classnames). For each file,
each split of its classes into base and new (the official one and --splits random ones) and each kind of
teacher, the owner fits on the val features of the base classes; the client gets the teacher, the texts of all
names and nothing else. Base-to-new (accuracy in %) and GZSL (means over classes in the joint label space) on
test features.

The grid is held against what costs nothing: text alone, the teacher for base and text for new, and text + g
teacher (unit rows, the teacher's intercepts too) for g = 0.1, 0.2, 0.3, 0.43 and 1. `over best` is the mean H
above the fixed baseline that is best on average over all that is shown, `of its kind` above the one that is
best for that kind of teacher, `of the cell` above the best one in each cell, `worst` the worst of these.

--geometry takes a geometry file, or feature files of other pictures (x, and y if labelled) to measure one on;
the same teachers are then tried without and with it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from dfzsl.client.measure import measure_encoder
from dfzsl.trainers.clip.aligned_text import AlignedText
from dfzsl.trainers.generation.generate import generate
from dfzsl.trainers.recovery.feature_statistics import FeatureStatistics
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.recover import recover
from dfzsl.trainers.recovery.teacher import Teacher, fit_teacher
from dfzsl.utils.progress import hide_progress_bars

WEIGHTS = (0.1, 0.2, 0.3, 0.43, 1.0)
BASELINES = ("CLIP", "Linear probe + CLIP", *(f"text + {g} teacher" for g in WEIGHTS))


def harmonic(a: float, b: float) -> float:
    return 2 * a * b / max(a + b, 1e-9)


class Task:
    """One data set with a base/new split, or a part of one: `order` lists its classes, base ones first."""

    def __init__(self, path: Path, split: int, order: np.ndarray | None = None) -> None:
        with np.load(path) as file:
            array = {name: file[name] for name in file.files}
        count = len(array["text"])
        if order is None:
            order = np.random.default_rng(split - 1).permutation(count) if split else np.arange(count)
        place = np.full(count, -1)
        place[order] = np.arange(len(order))
        self.base, self.seed = (len(order) + 1) // 2, split
        self.names = [str(array["classnames"][i]) for i in order]
        self.text = F.normalize(torch.from_numpy(array["text"][order]).float(), dim=1)
        (self.x_val, self.y_val), (self.x_test, self.y_test) = (
            self._images(array[f"x_{part}"], place[array[f"y_{part}"]]) for part in ("val", "test")
        )

    @staticmethod
    def _images(features: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        x, y = features[labels >= 0], labels[labels >= 0]
        return F.normalize(torch.from_numpy(x).float(), dim=1), torch.from_numpy(y)

    def train(self, shots: int = 0) -> tuple[Tensor, Tensor]:
        """Features and labels of base classes, at most so many of each."""
        x, y = self.x_val[self.y_val < self.base], self.y_val[self.y_val < self.base]
        if not shots:
            return x, y
        rng = torch.Generator().manual_seed(self.seed)
        rows = [(y == c).nonzero().flatten() for c in range(self.base)]
        kept = torch.cat([own[torch.randperm(len(own), generator=rng)[:shots]] for own in rows])
        return x[kept], y[kept]

    def base_to_new(self, base: Tensor, new: Tensor) -> tuple[float, float]:
        """Accuracy of logits of base (n, C) and new classes (n, K) within each part."""
        seen = self.y_test < self.base
        hit_base = base[seen].argmax(1) == self.y_test[seen]
        hit_new = new[~seen].argmax(1) == self.y_test[~seen] - self.base
        return 100 * hit_base.double().mean().item(), 100 * hit_new.double().mean().item()

    def gzsl(self, base: Tensor, new: Tensor) -> float:
        hit = (torch.cat([base, new], 1).argmax(1) == self.y_test).double()
        count = torch.bincount(self.y_test, minlength=len(self.names))
        rate = 100 * torch.zeros(len(count)).double().index_add_(0, self.y_test, hit) / count.clamp(min=1)
        seen, unseen = rate[: self.base][count[: self.base] > 0], rate[self.base :][count[self.base :] > 0]
        return harmonic(seen.mean().item(), unseen.mean().item())


def sgd_head(x: Tensor, y: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """A linear head with intercepts, as most linear probes: SGD with momentum, 60 epochs, linear decay."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = torch.nn.Linear(x.shape[1], classes)
        optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-4)
        for epoch in range(60):
            optimizer.param_groups[0]["lr"] = 1 - epoch / 60
            for rows in torch.randperm(len(x)).split(256):
                optimizer.zero_grad()
                F.cross_entropy(head(x[rows]), y[rows]).backward()
                optimizer.step()
    return head.weight.detach(), head.bias.detach()


def anchored(x: Tensor, y: Tensor, text: Tensor, pull: float = 1.0) -> Tensor:
    """Rows trained from the text, CE(100 x.r) + pull/2 |r - t|^2: the teacher of someone who knows CLIP."""
    rows = text.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([rows], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(100 * x @ rows.T, y) + 0.5 * pull * (rows - text).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return rows.detach()


def teachers(task: Task) -> dict[str, Callable[[], Teacher]]:
    """How each kind of teacher comes about."""
    names, text = task.names[: task.base], task.text[: task.base]

    def paper(shots: int) -> Teacher:
        return fit_teacher(*task.train(shots), names)

    def tuned(shots: int) -> Teacher:
        return fit_teacher(*task.train(shots), names, text=text)

    def means() -> Teacher:
        x, y = task.train()
        return Teacher(torch.stack([x[y == c].mean(0) for c in range(len(names))]), names)

    def sgd() -> Teacher:
        weight, bias = sgd_head(*task.train(), len(names), task.seed)
        return Teacher(weight, names, normalized=False, bias=bias)

    return {
        "paper's, all images": lambda: paper(0),
        "paper's, 16": lambda: paper(16),
        "paper's, 4": lambda: paper(4),
        "paper's, 1": lambda: paper(1),
        "owner's, all images": lambda: tuned(0),
        "owner's, 16": lambda: tuned(16),
        "owner's, 4": lambda: tuned(4),
        "class means": means,
        "SGD head with intercepts": sgd,
        "trained from text": lambda: Teacher(anchored(*task.train(), text), names),
    }


def fixed_scores(task: Task, teacher: Teacher) -> dict[str, Tensor]:
    """Scores (n, C) of base classes on test features by each of BASELINES."""
    by_text = task.x_test @ task.text[: task.base].T
    own = task.x_test @ F.normalize(teacher.weight, dim=1).T
    if teacher.bias is not None:
        own = own + teacher.bias / teacher.weight.norm(dim=1)
    mixed = (by_text + g * own for g in WEIGHTS)
    return dict(zip(BASELINES, [by_text, teacher.logits(task.x_test), *mixed], strict=True))


def run(
    task: Task, teacher: Teacher, geometry: FeatureStatistics | None
) -> dict[str, tuple[float, float, float]]:
    """(base, new, GZSL's H) of every baseline and of DFZSL."""
    text, base = task.text, task.base
    new = task.x_test @ text[base:].T
    scores = fixed_scores(task, teacher)
    table = {name: (*task.base_to_new(score, new), task.gzsl(score, new)) for name, score in scores.items()}
    generator = torch.Generator().manual_seed(task.seed)
    with contextlib.redirect_stdout(io.StringIO()), hide_progress_bars():
        virtual = recover(
            open_oracle(teacher, "weights"),
            text[:base],
            new_text=text[base:],
            generator=generator,
            geometry=geometry,
        )
        ours = generate(
            virtual, AlignedText(text[:base], text[base:], task.names[base:]), generator=generator
        )
    logits = ours.logits(task.x_test)
    score = logits[:, :base], logits[:, base:]
    table["DFZSL"] = (*task.base_to_new(*score), task.gzsl(*score))
    return table


def read_geometry(files: list[Path]) -> FeatureStatistics | None:
    """From a geometry file, or measured on feature files of other pictures."""
    if not files:
        return None
    return FeatureStatistics.load(files[0]) if files[0].suffix == ".safetensors" else measure_encoder(files)


def cells(paths: list[Path], splits: int, kinds: list[str]) -> Iterator[tuple[str, int, str, Task, Teacher]]:
    for path in paths:
        for split in range(splits + 1):
            task = Task(path, split)
            for kind, make in teachers(task).items():
                if not kinds or kind in kinds:
                    yield path.stem, split, kind, task, make()


def summary(results: list[dict]) -> str:
    """One line for each kind of teacher, and one for all of them."""
    kinds = list(dict.fromkeys(result["kind"] for result in results))
    h = {
        name: np.array([harmonic(*result["table"][name][:2]) for result in results])
        for name in (*BASELINES, "DFZSL")
    }
    free = np.stack([h[name] for name in BASELINES])
    gzsl = {name: np.array([result["table"][name][2] for result in results]) for name in ("CLIP", "DFZSL")}
    best = int(free.mean(1).argmax())
    lines = []
    for kind in [*kinds, "all"]:
        own = np.array([kind in (result["kind"], "all") for result in results])
        mine = h["DFZSL"][own]
        of_kind = int(free[:, own].mean(1).argmax())
        over_cell = mine - free[:, own].max(0)
        rise = (gzsl["DFZSL"] - gzsl["CLIP"])[own]
        lines.append(
            [
                kind,
                h["CLIP"][own].mean(),
                h["Linear probe + CLIP"][own].mean(),
                free[:, own].mean(1).max(),
                mine.mean(),
                mine.mean() - free[best, own].mean(),
                mine.mean() - free[of_kind, own].mean(),
                over_cell.mean(),
                over_cell.min(),
                gzsl["CLIP"][own].mean(),
                gzsl["DFZSL"][own].mean(),
                rise.min(),
            ]
        )
    headers = ["teacher", "CLIP", "Linear probe + CLIP", "best fixed", "DFZSL", "over best"]
    headers += ["of its kind", "of the cell", "worst", "GZSL: CLIP", "DFZSL", "worst"]
    signed = "+.2f"
    formats = ("", ".1f", ".1f", ".1f", ".1f", signed, signed, signed, signed, ".1f", ".1f", signed)
    return f"Best fixed baseline on average: {BASELINES[best]}\n\n" + tabulate(
        lines, headers, tablefmt="github", floatfmt=formats
    )


def official(results: list[dict]) -> str:
    """Base / new / H and GZSL on the official split, for the paper's and for the owner's best teacher."""
    lines = []
    for result in results:
        if result["split"] or not result["kind"].endswith("all images"):
            continue
        for name in ("CLIP", "Linear probe + CLIP", "text + 0.2 teacher", "DFZSL"):
            base, new, gzsl = result["table"][name]
            lines.append([result["set"], result["kind"], name, base, new, harmonic(base, new), gzsl])
    headers = ["data set", "teacher", "method", "base", "new", "H", "GZSL H"]
    return tabulate(lines, headers, tablefmt="github", floatfmt=".1f")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--splits", type=int, default=5, help="random class splits beside the official one")
    parser.add_argument("--kinds", nargs="*", default=[], metavar="KIND", help="these teachers alone")
    parser.add_argument("--geometry", nargs="*", default=[], type=Path, metavar="FILE")
    args = parser.parse_args()
    geometry = read_geometry(args.geometry)
    tables: dict[str, list[dict]] = {"Without a geometry": []}
    if geometry is not None:
        tables[f"With {geometry}"] = []
    for name, split, kind, task, teacher in cells(args.files, args.splits, args.kinds):
        for results, known in zip(tables.values(), (None, geometry), strict=False):
            results.append({"set": name, "split": split, "kind": kind, "table": run(task, teacher, known)})
    for title, results in tables.items():
        print(f"{title}, {len(results)} cells", summary(results), official(results), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
