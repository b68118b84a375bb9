"""Rehearsals in which base classes play the new ones: they find the balance of new against base classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dfzsl.utils.numerics import split_rows
from dfzsl.utils.progress import progress_bar

from .classifier import ClassWeights

MAX_CALIBRATION_SAMPLES = 20_000  # virtual features of all classes together, where rows are in closed form
MIN_FOLDS = 4  # at least
MIN_CLASS_FOLDS = (
    480  # base classes times rehearsals, where rows are in closed form: 4 of a dozen tell little
)
RowsOf = Callable[
    [Tensor, Tensor], ClassWeights
]  # from the indices of known base classes and the texts of others


def pseudo_novel_folds(
    x: Tensor,
    y: Tensor,
    text: Tensor,
    num_new: int,
    rows_of: RowsOf,
    rng: torch.Generator,
    rehearsals: int = MIN_FOLDS,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rehearsals of stage 3 in which base classes play the new ones.

    No new class has a feature to choose anything by, but base classes do: a part of them, as large a share
    as the new classes will be (at most half), is unseen while the rows are made from the others. Every base
    class plays equally often; there are at least so many `rehearsals`.

    text (C, d) is that of the base classes. Yields for all virtual features x (n, d) with labels y: whether
    its class was known (n,), by how much the best known class beats the best playing one (n,), and whether it
    is right within its own part (n,).
    """
    classes = len(text)
    share = min(num_new / (classes + num_new), 0.5)
    folds = min(round(1 / share), 5, classes)
    order = torch.empty(0)
    for number in progress_bar(range(folds * -(-rehearsals // folds)), "rehearse", unit="rehearsal"):
        fold = number % folds
        if fold == 0:
            order = torch.randperm(classes, device=x.device, generator=rng)
        playing = torch.zeros(classes, dtype=torch.bool, device=x.device)
        playing[order[fold::folds]] = True
        known = (~playing).nonzero()[:, 0]
        relabel = torch.cat([known, playing.nonzero()[:, 0]]).argsort()
        margin, correct = _margins(x, relabel[y], rows_of(known, text[playing]))
        yield ~playing[y], margin, correct


def calibrate(played: Iterable[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> float:
    """The bias of new classes, in units of the cosine, that balances them against base classes.

    It is the one with the highest harmonic mean of per-class accuracies in rehearsals (see `pseudo_novel_folds`).
    """
    grid = torch.linspace(-0.15, 0.15, 301, device=device)
    seen, unseen = torch.zeros_like(grid), torch.zeros_like(grid)
    for known, margin, correct in played:
        seen += _curve(margin[known], correct[known], grid, above=True)
        unseen += _curve(margin[~known], correct[~known], grid, above=False)
    harmonic = 2 * seen * unseen / (seen + unseen).clamp(min=1e-12)
    return float(grid[harmonic >= 0.999 * harmonic.max()].mean())


def _margins(x: Tensor, y: Tensor, rows: ClassWeights) -> tuple[Tensor, Tensor]:
    """By how much the best base class beats the best new one, and whether the best of y's own part is y."""
    base, new = rows.base, rows.new
    parts = split_rows(x, max(len(base), len(new)))
    tops = [((part @ base.T + rows.bias).max(1), (part @ new.T).max(1)) for part in parts]
    (base_top, base_class), (new_top, new_class) = (
        (torch.cat([top.values for top in part]), torch.cat([top.indices for top in part]))
        for part in zip(*tops, strict=True)
    )
    return base_top - new_top, torch.where(y < len(base), base_class == y, new_class + len(base) == y)


def _curve(margin: Tensor, correct: Tensor, grid: Tensor, above: bool) -> Tensor:
    """Accuracy at each bias of the grid: right within its part, and its part wins."""
    # The same number of features per class: the mean over features is the mean over classes.
    margins = margin[correct].sort().values
    below = torch.searchsorted(margins, grid).to(grid)
    hits = len(margins) - below if above else below
    return hits / max(len(margin), 1)
