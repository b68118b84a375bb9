"""Recover a teacher's rows and intercepts, up to one scale, from labels by a search for class boundaries.

Where the top class changes from c to k, (w_c - w_k).x + b_c - b_k = 0 (line search, Lowd and Meek 2005).
Enough such points determine all rows and intercepts but for a common row and a positive scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import MAX_ELEMENTS
from dfzsl.utils.progress import progress_bar

from .boundary_fit import HalfCircles, fit_boundaries
from .responses import Ask, Extracted
from .surrogate import fit_surrogate

MIN_BISECTIONS = 8  # of a circle: a budget that buys fewer is spent on labels of random points instead
MIN_CIRCLES = 1.1  # for each unknown
QUERIES_AT_ONCE = 2**14
MIN_AGREEMENT = 0.9  # share of labels that recovered rows must reproduce, else the boundaries are noise
ATTEMPTS = 50  # rounds of random points


def rows_from_labels(
    ask: Ask,
    classnames: Sequence[str],
    text: Tensor,
    *,
    rays: float = 1.5,
    bisections: int = 14,
    budget: int = 0,
    generator: torch.Generator | None = None,
) -> Extracted:
    """Recover rows and intercepts from labels.

    From a point of each class, `rays` * d half great circles leave in random directions. Each ends at the
    antipode, where the class is lost, and `bisections` labels halve the arc on which that happens. A class
    that an intercept makes large enough to contain the antipode is left towards random points outside it.
    This takes about C * d * rays * bisections queries. The error falls as 2^-bisections.

    A budget reduces bisections first, then rays. One that is too small for either buys labels of random
    points, on which a surrogate is fitted, as it is where noise moves the boundaries.

    Args:
        ask: returns labels (n,) of unit queries (n, d).
        classnames: C names, for messages.
        text: (C, d) unit text features: where to look for each class first.
        rays: half circles of a class for each dimension, more than 1.
        bisections: labels of a half circle.
        budget: most queries; 0 for any number.
        generator: of directions and random points.

    Returns:
        Rows and intercepts with sum zero and mean squared row 1.

    Raises:
        UserError: a class has no point, or never ends, or the budget or the labels do not suffice.
    """
    classes, d = text.shape
    if budget and budget < MIN_CIRCLES * MIN_BISECTIONS * classes * d:
        x = F.normalize(torch.randn(budget, d, generator=generator), dim=1)
        return fit_surrogate(x, ask(x), classes)
    ask = _Budgeted(ask, budget)
    starts = _points_of_classes(ask, classnames, text, generator)
    holds_antipode = ask(-starts) == torch.arange(classes)
    if budget:
        # An end that is no antipode costs two labels or more.
        samples_per_class = (budget - ask.spent) / (classes * d) - 2 * float(holds_antipode.any())
        bisections = min(bisections, int(samples_per_class / MIN_CIRCLES))
        rays = min(rays, samples_per_class / max(bisections, 1))
        if bisections < 1:
            raise UserError(f"TEACHER.BUDGET {budget:,} does not suffice to close in on boundaries; raise it")
    count = int(rays * d) if budget else math.ceil(rays * d)
    own = torch.arange(classes).repeat_interleave(count)
    circles = HalfCircles(starts, own, torch.randn(len(own), d, generator=generator))
    end = _end_circles(ask, circles, holds_antipode[own], classnames, generator)
    angle, other, history = _bisect(ask, circles, end, bisections)
    rows, error = fit_boundaries(circles, angle, other, generator)
    if _agreement(circles, rows, *history[0]) < MIN_AGREEMENT:
        parts = torch.arange(len(own)).split(QUERIES_AT_ONCE)
        x = torch.cat([circles.at(middle, part) for middle, _ in history for part in parts])
        labels = torch.cat([label for _, label in history])
        if budget and (left := min(budget - ask.spent, MAX_ELEMENTS // d)) > 0:
            more = F.normalize(torch.randn(left, d, generator=generator), dim=1)
            x, labels = torch.cat([x, more]), torch.cat([labels, ask(more)])
        return fit_surrogate(x, labels, classes)
    return Extracted(rows[:, :-1].contiguous(), rows[:, -1].contiguous(), error)


class _Budgeted:
    """The query function `ask` with its queries counted, up to `budget` (0 for any number)."""

    def __init__(self, ask: Ask, budget: int) -> None:
        self.ask, self.budget, self.spent = ask, budget, 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.budget and self.spent + len(x) > self.budget:
            raise UserError(
                f"TEACHER.BUDGET {self.budget:,} does not suffice to find a point of each class; raise it"
            )
        self.spent += len(x)
        return self.ask(x)


def _points_of_classes(
    ask: Ask, classnames: Sequence[str], text: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Find a unit feature (C, d) of each class: its centered text feature, or else a random point."""
    classes, d = text.shape
    points = torch.zeros(classes, d)
    missing = torch.ones(classes, dtype=torch.bool)
    guesses = F.normalize(text - text.mean(0), dim=1)
    for _ in range(ATTEMPTS):
        label = ask(guesses)
        # Only the first point of a class is used: `points[label] = guesses` would leave the choice open.
        for row in range(len(guesses)):
            if missing[c := int(label[row])]:
                points[c], missing[c] = guesses[row], False
        if not missing.any():
            return points
        guesses = F.normalize(torch.randn(4 * classes, d, generator=generator), dim=1)
    name = classnames[int(missing.nonzero()[0])]
    queries = 4 * classes * ATTEMPTS
    raise UserError(f"the teacher never answered '{name}' in {queries} queries; ask for logits instead")


def _end_circles(
    ask: Ask,
    circles: HalfCircles,
    open_ended: Tensor,
    classnames: Sequence[str],
    generator: torch.Generator | None,
) -> Tensor:
    """Make the directions (n, d) of circles unit rows, and find an angle (n,) where each has left its class.

    That is the antipode, except for the circles `open_ended` (n,), which are turned to points outside.
    """
    own, end = circles.own, torch.full((len(circles.own),), math.pi)
    parts = torch.arange(len(own)).split(QUERIES_AT_ONCE)
    for part in parts:
        circles.direction[part] = F.normalize(circles.direction[part], dim=1)
    if open_ended.any():
        circles.direction[open_ended] = _points_outside(
            ask, circles.direction[open_ended], own[open_ended], classnames, generator
        )
    for part in parts:
        end[part] = torch.where(open_ended[part], circles.turn(part), math.pi)
    return end


def _points_outside(
    ask: Ask, points: Tensor, own: Tensor, classnames: Sequence[str], generator: torch.Generator | None
) -> Tensor:
    """Find unit points (n, d), `points` or else random ones, whose class is not `own` (n,)."""
    points = points.clone()
    inside = torch.arange(len(points))
    for _ in range(ATTEMPTS):
        inside = inside[ask(points[inside]) == own[inside]]
        if not len(inside):
            return points
        points[inside] = F.normalize(torch.randn(len(inside), points.shape[1], generator=generator), dim=1)
    name = classnames[int(own[inside[0]])]
    raise UserError(f"the teacher answers '{name}' wherever it is asked; ask for logits instead")


def _bisect(
    ask: Ask, circles: HalfCircles, end: Tensor, bisections: int
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Bisect each circle for the angle where it leaves its class, between 0 and `end` (n,).

    Returns:
        The angles (n,); the classes (n,) behind them, -1 where no label showed one; and the first queries,
        as many as fit into memory, as pairs of angles (n,) and labels (n,).
    """
    own, d = circles.own, circles.starts.shape[1]
    parts = torch.arange(len(own)).split(QUERIES_AT_ONCE)
    low, high, other = torch.zeros(len(own)), end, torch.full_like(own, -1)
    history: list[tuple[Tensor, Tensor]] = []
    with progress_bar(
        total=bisections * len(own), desc="boundary search", unit="query", unit_scale=True
    ) as queries:
        for _ in range(bisections):
            middle, label = (low + high) / 2, torch.empty_like(own)
            for part in parts:
                label[part] = ask(circles.at(middle, part))
                queries.update(len(part))
            if len(history) * len(own) * d < MAX_ELEMENTS:
                history.append((middle, label))
            inside = label == own
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
            other = torch.where(inside, other, label)
    return (low + high) / 2, other, history


def _agreement(circles: HalfCircles, rows: Tensor, angle: Tensor, label: Tensor) -> float:
    """Return the share of labels (n,) at `angle` (n,) that rows and intercepts (C, d + 1) reproduce."""
    parts = torch.arange(len(label)).split(QUERIES_AT_ONCE)
    scores = (circles.at(angle, part) @ rows[:, :-1].T + rows[:, -1] for part in parts)
    equal = sum(
        int((score.argmax(1) == label[part]).sum()) for score, part in zip(scores, parts, strict=True)
    )
    return equal / len(label)
