"""What stage 3 decides on base classes that play new ones: whether to generate, and how to balance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfzsl.stages import portions

if TYPE_CHECKING:
    pass

from .training import StageThreeSettings, train


def plays(
    x: Tensor,
    y: Tensor,
    base_text: Tensor,
    num_new: int,
    s: StageThreeSettings,
    rng: torch.Generator,
    trust: float = 1.0,
    rehearsals: int = 4,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rehearsals of stage 3 in which base classes play the new ones.

    No new class has a feature to choose anything by, but base classes do: a part of them, as large a share
    as the new classes will be (at most half), is unseen while everything is trained on the others. Every base
    class plays equally often; there are at least so many `rehearsals`.

    Yields for all virtual features x: whether its class was trained on (n,), by how much the best base
    class beats the best playing one (n,), and whether it is right within its own part (n,).
    """
    classes = len(base_text)
    share = min(num_new / (classes + num_new), 0.5)
    folds = min(round(1 / share), 5, classes)
    # All drawn before any training, so that two settings are compared on the same rehearsals.
    orders = [torch.randperm(classes, device=x.device, generator=rng) for _ in range(-(-rehearsals // folds))]
    for order in orders:
        for fold in range(folds):
            playing = torch.zeros(classes, dtype=torch.bool, device=x.device)
            playing[order[fold::folds]] = True
            relabel = torch.cat([(~playing).nonzero()[:, 0], playing.nonzero()[:, 0]]).argsort()
            known = ~playing[y]
            base, new, _ = train(
                x[known], relabel[y[known]], base_text[~playing], base_text[playing], s, rng, trust
            )
            margin, correct = _margins(x, relabel[y], base, new)
            yield known, margin, correct


def choose_generator(
    x: Tensor, y: Tensor, base_text: Tensor, num_new: int, s: StageThreeSettings, rng: torch.Generator
) -> str:
    """Whether "vmf" beats "none" on classes that play new ones, by three standard errors; the name to take.

    Whether images of unseen classes can be foretold from text depends on the data: where classes are
    compositions it is easy, where base classes are few and unlike each other it does harm.
    """
    if num_new == 0 or len(base_text) < 4:
        return "none"
    right = {}
    # Without a generator rows of players are their text, whatever the training of the others' rows.
    for name, steps in (("none", 0), ("vmf", s.classifier_steps)):
        stream = torch.Generator(x.device)
        stream.set_state(rng.get_state())  # the same rehearsals for both
        settings = replace(s, name=name, classifier_steps=steps)
        played = plays(x, y, base_text, num_new, settings, stream, rehearsals=16)
        right[name] = torch.stack([correct[~known].float().mean() for known, _, correct in played])
    gain = right["vmf"] - right["none"]
    return "vmf" if gain.mean() > 3 * gain.std() / len(gain) ** 0.5 else "none"


def calibrate(
    x: Tensor,
    y: Tensor,
    base_text: Tensor,
    num_new: int,
    s: StageThreeSettings,
    rng: torch.Generator,
    trust: float = 1.0,
) -> float:
    """The bias of new classes, in units of the cosine, that balances them against base classes.

    It is the one with the highest harmonic mean of per-class accuracies in rehearsals (`plays`).
    """
    grid = torch.linspace(-0.15, 0.15, 301, device=x.device)
    seen, unseen = torch.zeros_like(grid), torch.zeros_like(grid)
    for known, margin, correct in plays(x, y, base_text, num_new, s, rng, trust):
        seen += _curve(margin[known], correct[known], grid, above=True)
        unseen += _curve(margin[~known], correct[~known], grid, above=False)
    harmonic = 2 * seen * unseen / (seen + unseen).clamp(min=1e-12)
    return float(grid[harmonic >= 0.999 * harmonic.max()].mean())


def _margins(x: Tensor, y: Tensor, base: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the best base class beats the best new one, and whether the best of y's own part is y."""
    parts = portions(x, max(len(base), len(new)))
    tops = [((part @ base.T).max(1), (part @ new.T).max(1)) for part in parts]
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
