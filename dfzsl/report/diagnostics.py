"""Plot virtual against real features of a finished run, and confusion matrices."""

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

REAL_COLOR, VIRTUAL_COLOR, CROSS_COLOR = "#1b6ca8", "#e07b39", "#7a7a7a"


def read_real(path: str, classnames: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Read test features of the given classes.

    Args:
        path: feature file with x_test and y_test.
        classnames: C class names.

    Returns:
        L2-normalized features (n, d), and labels (n,) that index `classnames`.

    Raises:
        UserError: the file has no test features, or lacks a class.
    """
    arrays, metadata = open_features(path)
    if "x_test" not in arrays or "y_test" not in arrays:
        raise UserError(f"{path}: no test features (x_test, y_test) in the file")
    label_of = {str(name): label for label, name in enumerate(metadata.get("classnames") or [])}
    if missing := [name for name in classnames if name not in label_of]:
        raise UserError(f"{path}: no class '{missing[0]}' in the file, but in the run")
    features, labels = unit_rows(arrays["x_test"](), f"{path}: x_test"), arrays["y_test"]().long()
    file_labels = torch.tensor([label_of[name] for name in classnames])
    matches = labels[:, None] == file_labels
    rows = matches.any(1)
    return features[rows], matches[rows].int().argmax(1)


def mean_directions(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the L2-normalized class means (C, d) of features (n, d)."""
    return F.normalize(class_sums(features, labels, classes)[0], dim=1)


def angles(features: Tensor, directions: Tensor) -> np.ndarray:
    """Return the angles (n,) in degrees between the rows of features and directions, both (n, d)."""
    return torch.rad2deg(torch.acos((features * directions).sum(1).clamp(-1, 1))).numpy()


def margin(virtual: VirtualClasses, features: Tensor, labels: Tensor) -> np.ndarray:
    """Return the teacher's logit of the true class minus the best other logit, (n,): positive if correct."""
    scores = virtual.logits(features)
    own = scores.gather(1, labels[:, None]).squeeze(1)
    return (own - scores.scatter(1, labels[:, None], -torch.inf).max(1).values).numpy()


def plot_run(run: Path, features: Path, classes: int = 6) -> Figure:
    """Plot the virtual features of a run and real test features of the same classes.

    Left: the plane in which the real class means differ most. Middle: angles to the mean direction of the
    class. Right: the recovered teacher's margin of the true class.

    Args:
        run: folder of a finished run, with virtual.safetensors.
        features: feature file with x_test and y_test.
        classes: number of classes in the left panel.

    Raises:
        UserError: a file is missing, or classes or dimensions of the two differ.
    """
    virtual = VirtualClasses.load(run / "virtual.safetensors")
    real = read_real(str(features), virtual.classnames)
    if real[0].shape[1] != virtual.mu.shape[1]:
        file_dim, run_dim = real[0].shape[1], virtual.mu.shape[1]
        raise UserError(f"{features}: features of {file_dim} dimensions, those of the run have {run_dim}")
    if len(torch.unique(real[1])) < len(virtual.classnames):
        raise UserError(f"{features}: no test features of a class of the run")
    title = f"{virtual.method}, {virtual.queries:,} queries"
    return draw(virtual, real, min(classes, len(virtual.classnames)), title)


def draw(virtual: VirtualClasses, real: tuple[Tensor, Tensor], plane_classes: int, title: str) -> Figure:
    """Draw the three panels of `plot_run`, the left one with the first `plane_classes` classes."""
    x, y = real
    classes = len(virtual.classnames)
    v, u = virtual.sample(max(20, len(x) // classes), torch.Generator().manual_seed(0))
    means = mean_directions(x, y, classes)
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    # Real and virtual features are centered on their own class means, because the common mean of the real
    # ones is unknown to the run.
    basis = torch.linalg.svd((means - means.mean(0))[:plane_classes], full_matrices=False).Vh[:2].T
    colors = colormaps["tab10" if plane_classes <= 10 else "tab20"]
    for c in range(plane_classes):
        for features, labels, center, marker in ((x, y, means, "o"), (v, u, virtual.mu, "x")):
            points = ((features[labels == c] - center.mean(0)) @ basis).numpy()[:60]
            name = virtual.classnames[c] if marker == "o" else None
            left.scatter(
                points[:, 0], points[:, 1], s=12, marker=marker, color=colors(c), alpha=0.6, label=name
            )
    left.legend(fontsize=7)
    left.set(title="class plane (o real, x virtual)", xlabel="", ylabel="")

    for values, color, label in (
        (angles(x, means[y]), REAL_COLOR, "real to real mean"),
        (angles(v, virtual.mu[u]), VIRTUAL_COLOR, "virtual to virtual mean"),
        (angles(x, virtual.mu[y]), CROSS_COLOR, "real to virtual mean"),
    ):
        middle.hist(values, bins=60, density=True, alpha=0.6, color=color, label=label)
    middle.legend(fontsize=7)
    middle.set(title="angle to the mean direction", xlabel="degrees", yticks=[])

    for values, color, label in (
        (margin(virtual, x, y), REAL_COLOR, "real"),
        (margin(virtual, v, u), VIRTUAL_COLOR, "virtual"),
    ):
        legend = f"{label}: {(values > 0).mean():.1%} correct"
        right.hist(values, bins=60, density=True, alpha=0.6, color=color, label=legend)
    right.axvline(0, color="black", linewidth=0.8)
    right.legend(fontsize=7)
    right.set(title="teacher's margin of the true class", yticks=[])
    figure.suptitle(title)
    return figure


def draw_confusion(counts: Tensor, classnames: Sequence[str], is_new: Sequence[bool]) -> Figure:
    """Draw the confusion matrix with rows normalized, base classes first.

    Args:
        counts: (C, C) number of predictions, true classes in rows.
        classnames: C class names.
        is_new: C flags, true for new classes.
    """
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
    axes.set(xlabel="predicted", ylabel="true", title="base classes, then new classes")
    figure.colorbar(image, shrink=0.6, label="share of the true class")
    return figure
