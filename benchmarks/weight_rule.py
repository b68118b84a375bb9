"""How the rule for the teacher's weight was fitted: python benchmarks/weight_rule.py FILE.npz...

trainers/recovery/mixture.py foretells the weight g of text + g teacher from what a client can see:

    ln g = a - b ln(1 - near) + c found [- d ln(spread), with --geometry FILE...]

For every cell of `real_features.py` (a data set, a split into base and new, a kind of teacher) and for parts
of the data sets (random classes, and classes that are alike in words), this tries 32 weights and notes the
harmonic mean H of base and new accuracy on test features. The numbers a to d are those with the highest mean
H over the cells, parts at half weight. Each data set is tried with the numbers that the others gave: `left
out` is the honest column. `in use` has the numbers of mixture.py, `best` the best weight in each cell, which
nobody knows beforehand. Gains are over the fixed baseline that is best on average.

Teachers whose rows hold the text already and owners' teachers, which come with a weight of their own, are no
part of the fit. At least two data sets are needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from real_features import BASELINES, Task, fixed_scores, harmonic, read_geometry, teachers
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import minimize
from tabulate import tabulate

from dfzsl.trainers.generation.closed_form import closed_form
from dfzsl.trainers.recovery.feature_statistics import FeatureStatistics
from dfzsl.trainers.recovery.mixture import (
    MAX_TEXT_TEACHER_COSINE,
    WEIGHT_COEFFICIENTS,
    WHITENED_WEIGHT_COEFFICIENTS,
    mix,
    relative_scatter,
    teacher_rows,
    text_teacher_statistics,
)
from dfzsl.trainers.recovery.teacher import Teacher

GRID = np.linspace(np.log(0.005), np.log(10), 32)  # of ln g
KINDS = ("paper's, all images", "paper's, 16", "paper's, 4", "paper's, 1", "class means")
KINDS += ("SGD head with intercepts",)
PARTS = ("paper's, all images", "paper's, 4", "paper's, 1", "class means", "SGD head with intercepts")
PART_WEIGHT = 0.5
DECAY = 0.005  # of standardised coefficients


@dataclass(frozen=True)
class Cell:
    """One teacher of one split. seen: what the rule sees; h: H at each of GRID; free: of each baseline."""

    set: str
    seen: tuple[float, ...]
    h: np.ndarray
    free: np.ndarray
    weight: float = 1.0


def cell(
    name: str, task: Task, teacher: Teacher, geometry: FeatureStatistics | None, weight: float
) -> Cell | None:
    base, new = task.text[: task.base], task.text[task.base :]
    mixture = mix(base, teacher.weight, teacher.bias, geometry=geometry)
    plain = teacher_rows(teacher.weight)[0]
    nearest_text_cosine, retrieval_accuracy, text_teacher_cosine = text_teacher_statistics(base, plain)
    if text_teacher_cosine > MAX_TEXT_TEACHER_COSINE:
        return None
    seen = (-np.log(max(1 - nearest_text_cosine, 1e-3)), retrieval_accuracy)
    if geometry is not None:
        seen += (-np.log(max(relative_scatter(plain, geometry), 1e-3)),)
    rows, bias = (
        (mixture.class_weights - base) / mixture.teacher_weight,
        mixture.bias / mixture.teacher_weight,
    )
    by_text, by_teacher = task.x_test @ base.T, task.x_test @ rows.T + bias
    made = closed_form(base, new, teacher.weight, teacher.bias, geometry=geometry)
    ours = task.x_test @ made.new_weight.T
    h = [harmonic(*task.base_to_new(by_text + g * by_teacher, ours)) for g in np.exp(GRID)]
    by_new = task.x_test @ new.T
    free = [harmonic(*task.base_to_new(s, by_new)) for s in fixed_scores(task, teacher).values()]
    return Cell(name, seen, np.array(h), np.array(free), weight)


def parts(path: Path, seed: int = 7) -> Iterator[np.ndarray]:
    """Classes of parts of a data set: a half and a quarter at random, and as many that are alike in words."""
    with np.load(path) as file:
        text = file["text"].astype(float)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    for share in (2, 4):
        size = max(len(text) // share, 10)
        yield rng.permutation(len(text))[:size]
        nearest = np.argsort(-(text @ text[rng.integers(len(text))]))[:size]
        yield rng.permutation(nearest)


def cells(paths: list[Path], splits: int, geometry: FeatureStatistics | None) -> Iterator[Cell]:
    for path in paths:
        tasks = [(Task(path, split), KINDS, 1.0) for split in range(splits + 1)]
        tasks += [(Task(path, 0, order), PARTS, PART_WEIGHT) for order in parts(path)]
        for task, kinds, weight in tasks:
            make = teachers(task)
            for kind in kinds:
                if (made := cell(path.stem, task, make[kind](), geometry, weight)) is not None:
                    yield made


def value(h: np.ndarray, logarithm: np.ndarray) -> np.ndarray:
    """(n,) H at ln g, linear between the points of GRID. h (n, len(GRID)), logarithm (n,)."""
    place = np.clip((logarithm - GRID[0]) / (GRID[1] - GRID[0]), 0, len(GRID) - 1.001)
    left = place.astype(int)
    rest, row = place - left, np.arange(len(h))
    return h[row, left] * (1 - rest) + h[row, left + 1] * rest


def fit(h: np.ndarray, seen: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(1 + k,) coefficients of ln g on what is seen (n, k), with the highest mean H.

    H over ln g is smoothed by one step of the grid: single test images make it jagged.
    """
    mean, deviation = seen.mean(0), seen.std(0).clip(min=1e-6)
    x = np.column_stack([np.ones(len(seen)), (seen - mean) / deviation])
    smooth = gaussian_filter1d(h, 1.0, axis=1, mode="nearest")
    best = GRID[smooth.argmax(1)]
    start = np.linalg.lstsq(x * weight[:, None] ** 0.5, best * weight**0.5, rcond=None)[0]

    def loss(w: np.ndarray) -> float:
        decay = DECAY * np.square(w[1:]).sum()
        return float(decay - (weight * value(smooth, x @ w)).sum() / weight.sum())

    options = {"maxiter": 3000, "xatol": 1e-3, "fatol": 1e-5, "adaptive": True}
    w = minimize(loss, start, method="Nelder-Mead", options=options).x
    slope = w[1:] / deviation
    return np.concatenate([[w[0] - slope @ mean], slope])


def table(cells: list[Cell]) -> str:
    """Each set with the rule fitted on the others and on all, and the rules."""
    names = list(dict.fromkeys(cell.set for cell in cells))
    of = np.array([cell.set for cell in cells])
    h, free = np.stack([cell.h for cell in cells]), np.stack([cell.free for cell in cells])
    seen, weight = np.array([cell.seen for cell in cells]), np.array([cell.weight for cell in cells])
    whole = weight == 1
    best = int(free[whole].mean(0).argmax())
    over = free[:, best]

    def tried(rule: np.ndarray) -> np.ndarray:
        return value(h, rule[0] + seen @ rule[1:])

    everywhere = fit(h, seen, weight)
    in_use = np.array(WEIGHT_COEFFICIENTS[:3] if seen.shape[1] == 2 else WHITENED_WEIGHT_COEFFICIENTS)
    left_out = np.empty(len(cells))
    lines = []
    for name in [*names, "all"]:
        here = of == name if name != "all" else np.ones(len(of), bool)
        rule = everywhere if name == "all" else fit(h[~here], seen[~here], weight[~here])
        if name != "all":
            left_out[here] = tried(rule)[here]
        shown = here & whole
        gains = (left_out, tried(everywhere), tried(in_use), h.max(1))
        lines.append([name, *((gain - over)[shown].mean() for gain in gains), *rule])
    headers = ["set", "left out", "fitted on all", "in use", "best", *"abcd"[: 1 + seen.shape[1]]]
    title = f"Points of H over the best fixed baseline ({BASELINES[best]}); a to d: fitted without the set"
    formats = ("", *["+.2f"] * 4, *[".1f"] * 4)
    return f"{title}\n\n" + tabulate(lines, headers, tablefmt="github", floatfmt=formats)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--splits", type=int, default=5, help="random class splits beside the official one")
    parser.add_argument("--geometry", nargs="*", default=[], type=Path, metavar="FILE")
    args = parser.parse_args()
    if len({path.stem for path in args.files}) < 2:
        parser.error("a rule is tried on a data set that it was not fitted on: name two or more")
    torch.manual_seed(0)
    geometry = read_geometry(args.geometry)
    for known in (None, geometry)[: 1 + (geometry is not None)]:
        print(known or "Without a geometry", table(list(cells(args.files, args.splits, known))), sep="\n\n")
        print()


if __name__ == "__main__":
    main()
