"""Plot real beside virtual features of a finished run, and confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from dfzsl.datasets.features import open_features, unit_rows
from dfzsl.trainers.recovery.virtual_classes import VirtualClasses
from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import class_sums

REAL, VIRTUAL = "#1b6ca8", "#e07b39"


def read_real(path: str, classnames: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Test features (n, d) of the named classes and their labels in the order of `classnames`."""
    arrays, about = open_features(path)
    if "x_test" not in arrays or "y_test" not in arrays:
        raise UserError(f"{path}: it has no test features (x_test, y_test)")
    place = {str(name): label for label, name in enumerate(about.get("classnames") or [])}
    if missing := [name for name in classnames if name not in place]:
        raise UserError(f"{path}: it has no class '{missing[0]}', which the run has")
    features, labels = unit_rows(arrays["x_test"](), f"{path}: x_test"), arrays["y_test"]().long()
    theirs = torch.tensor([place[name] for name in classnames])
    same = labels[:, None] == theirs
    rows = same.any(1)
    return features[rows], same[rows].int().argmax(1)


def mean_directions(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    return F.normalize(class_sums(features, labels, classes)[0], dim=1)


def angles(features: Tensor, directions: Tensor) -> np.ndarray:
    """Degrees between rows."""
    return torch.rad2deg(torch.acos((features * directions).sum(1).clamp(-1, 1))).numpy()


def margin(virtual: VirtualClasses, features: Tensor, labels: Tensor) -> np.ndarray:
    """The teacher's score of the own class minus the best other one: positive where it is right."""
    scores = virtual.logits(features)
    own = scores.gather(1, labels[:, None]).squeeze(1)
    return (own - scores.scatter(1, labels[:, None], -torch.inf).max(1).values).numpy()


def plot_run(run: Path, features: Path, classes: int = 6) -> Figure:
    """Plot the virtual features of a run beside real test features of the same classes.

    Left: the plane in which the real class means differ most. Middle: angles to the class's own mean
        direction.
    Right: the recovered teacher's margin of the true class.

    Args:
        run: folder of a finished run, with virtual.safetensors.
        features: feature file with x_test and y_test.
        classes: number of classes in the left panel.

    Raises:
        UserError: a file is missing, or the two do not fit together.
    """
    virtual = VirtualClasses.load(run / "virtual.safetensors")
    real = read_real(str(features), virtual.classnames)
    if real[0].shape[1] != virtual.mu.shape[1]:
        theirs, ours = real[0].shape[1], virtual.mu.shape[1]
        raise UserError(f"{features}: features of {theirs} dimensions, the run's have {ours}")
    if len(torch.unique(real[1])) < len(virtual.classnames):
        raise UserError(f"{features}: a class of the run has no test feature")
    title = f"{virtual.method}, {virtual.queries:,} queries"
    return draw(virtual, real, min(classes, len(virtual.classnames)), title)


def draw(virtual: VirtualClasses, real: tuple[Tensor, Tensor], shown: int, title: str) -> Figure:
    """The three panels."""
    x, y = real
    classes = len(virtual.classnames)
    v, u = virtual.sample(max(20, len(x) // classes), torch.Generator().manual_seed(0))
    means = mean_directions(x, y, classes)
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    # Each side is centered on its own class means: what all real features share is not known to the run.
    basis = torch.linalg.svd((means - means.mean(0))[:shown], full_matrices=False).Vh[:2].T
    colors = colormaps["tab10" if shown <= 10 else "tab20"]
    for c in range(shown):
        for features, labels, centre, marker in ((x, y, means, "o"), (v, u, virtual.mu, "x")):
            flat = ((features[labels == c] - centre.mean(0)) @ basis).numpy()[:60]
            name = virtual.classnames[c] if marker == "o" else None
            left.scatter(flat[:, 0], flat[:, 1], s=12, marker=marker, color=colors(c), alpha=0.6, label=name)
    left.legend(fontsize=7)
    left.set(title="class plane (o real, x virtual)", xlabel="", ylabel="")

    for values, color, label in (
        (angles(x, means[y]), REAL, "real, to their own mean"),
        (angles(v, virtual.mu[u]), VIRTUAL, "virtual, to their own mean"),
        (angles(x, virtual.mu[y]), "#7a7a7a", "real, to the virtual mean"),
    ):
        middle.hist(values, bins=60, density=True, alpha=0.6, color=color, label=label)
    middle.legend(fontsize=7)
    middle.set(title="angle to the mean direction", xlabel="degrees", yticks=[])

    for values, color, label in (
        (margin(virtual, x, y), REAL, "real"),
        (margin(virtual, v, u), VIRTUAL, "virtual"),
    ):
        share = f"{label}: {(values > 0).mean():.1%} right"
        right.hist(values, bins=60, density=True, alpha=0.6, color=color, label=share)
    right.axvline(0, color="black", linewidth=0.8)
    right.legend(fontsize=7)
    right.set(title="teacher's margin for the own class", yticks=[])
    figure.suptitle(title)
    return figure


def draw_confusion(counts: Tensor, classnames: Sequence[str], is_new: Sequence[bool]) -> Figure:
    """Shares of predicted classes (columns) in each true class (rows) of counts (C, C), base first."""
    order = sorted(range(len(classnames)), key=lambda c: is_new[c])
    shares = counts[order][:, order] / counts[order].sum(1, keepdim=True).clamp(min=1)
    size = min(4 + 0.16 * len(classnames), 24)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1)
    border = len(is_new) - sum(is_new) - 0.5
    if 0 < border < len(is_new) - 1:
        axes.axhline(border, color="white", linewidth=1)
        axes.axvline(border, color="white", linewidth=1)
    if len(classnames) <= 120:
        names = [classnames[c] for c in order]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set(xlabel="predicted", ylabel="true", title="base classes, then new ones")
    figure.colorbar(image, shrink=0.6, label="share of the true class")
    return figure
