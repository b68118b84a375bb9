"""Calibrate the bias of new classes on pseudo-novel classes (calibrated stacking, Chao et al., ECCV 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dfzsl.utils.numerics import split_rows
from dfzsl.utils.progress import progress_bar

from .classifier import ClassWeights

# Virtual features of all classes together, where class weights are in closed form.
MAX_CALIBRATION_SAMPLES = 20_000
MIN_FOLDS = 4
# Base classes times folds, where class weights are in closed form: with a dozen base classes, 4 folds give a
# noisy estimate.
MIN_CLASS_FOLDS = 480

# Computes class weights from the indices of the base classes and the text embeddings of the new classes.
ComputeWeights = Callable[[Tensor, Tensor], ClassWeights]


def pseudo_novel_folds(
    x: Tensor,
    y: Tensor,
    text: Tensor,
    num_new: int,
    compute_weights: ComputeWeights,
    rng: torch.Generator,
    min_folds: int = MIN_FOLDS,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hold out base classes as pseudo-novel classes, fold by fold.

    No feature of a new class is available to choose the bias by. Each fold therefore treats a share of the
    base classes as new, the same share as the new classes have of all classes (at most half), and computes
    the class weights from the other base classes. Every base class is pseudo-novel equally often.

    Args:
        x: (n, d) virtual features of all base classes.
        y: (n,) their labels.
        text: (C, d) text embeddings of the base classes.
        num_new: number of new classes, at least 1.
        compute_weights: computes class weights from base class indices and text embeddings of new classes.
        rng: source of the random partitions.
        min_folds: least number of folds.

    Yields:
        For all features: whether the class is a base class of the fold (n,), the highest base score minus the
        highest pseudo-novel score (n,), and whether the prediction within the class's own group is correct
        (n,).
    """
    classes = len(text)
    share = min(num_new / (classes + num_new), 0.5)
    folds = min(round(1 / share), 5, classes)
    order = torch.empty(0)
    for number in progress_bar(range(folds * -(-min_folds // folds)), "calibrate", unit="fold"):
        fold = number % folds
        if fold == 0:
            order = torch.randperm(classes, device=x.device, generator=rng)
        is_novel = torch.zeros(classes, dtype=torch.bool, device=x.device)
        is_novel[order[fold::folds]] = True
        base = (~is_novel).nonzero()[:, 0]
        relabel = torch.cat([base, is_novel.nonzero()[:, 0]]).argsort()
        margin, correct = _margins(x, relabel[y], compute_weights(base, text[is_novel]))
        yield ~is_novel[y], margin, correct


def fit_stacking_bias(folds: Iterable[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> float:
    """Choose the bias with the highest harmonic mean of the per-class accuracies of base and new classes.

    Args:
        folds: the output of `pseudo_novel_folds`.
        device: device of the folds.

    Returns:
        Bias of the new classes, in units of the cosine.
    """
    grid = torch.linspace(-0.15, 0.15, 301, device=device)
    seen, unseen = torch.zeros_like(grid), torch.zeros_like(grid)
    for is_base, margin, correct in folds:
        seen += _accuracy_curve(margin[is_base], correct[is_base], grid, above=True)
        unseen += _accuracy_curve(margin[~is_base], correct[~is_base], grid, above=False)
    harmonic = 2 * seen * unseen / (seen + unseen).clamp(min=1e-12)
    return float(grid[harmonic >= 0.999 * harmonic.max()].mean())


def _margins(x: Tensor, y: Tensor, weights: ClassWeights) -> tuple[Tensor, Tensor]:
    """Return the highest base minus the highest new score, and whether the top class of y's group is y."""
    base, new = weights.base_weight, weights.new_weight
    parts = split_rows(x, max(len(base), len(new)))
    maxima = [((part @ base.T + weights.base_bias).max(1), (part @ new.T).max(1)) for part in parts]
    (base_score, base_class), (new_score, new_class) = (
        (torch.cat([top.values for top in group]), torch.cat([top.indices for top in group]))
        for group in zip(*maxima, strict=True)
    )
    return base_score - new_score, torch.where(y < len(base), base_class == y, new_class + len(base) == y)


def _accuracy_curve(margin: Tensor, correct: Tensor, grid: Tensor, above: bool) -> Tensor:
    """Return the accuracy at each bias: the own group wins, and the prediction within it is correct."""
    # All classes have the same number of features: the mean over features is the mean over classes.
    margins = margin[correct].sort().values
    below = torch.searchsorted(margins, grid).to(grid)
    hits = len(margins) - below if above else below
    return hits / max(len(margin), 1)
