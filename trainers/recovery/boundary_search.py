"""Recover a teacher's class weights, up to scale, from labels by a search for class boundaries.

On the boundary between classes c and k, (w_c - w_k).x + b_c - b_k = 0 (line search, Lowd and Meek, 2005).
Enough such points determine all weights and intercepts up to their mean over classes and a positive scale.
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
from .responses import QueryFunction, RecoveredWeights
from .surrogate import fit_surrogate

MIN_BISECTIONS = 8  # per circle; a budget that allows fewer is used for labels of random points
MIN_CIRCLES_PER_UNKNOWN = 1.1
MAX_QUERIES_PER_BATCH = 2**14
MIN_AGREEMENT = 0.9  # share of labels that recovered weights must reproduce, else the boundaries are noise
MAX_ATTEMPTS = 50  # rounds of random points


def weights_from_labels(
    query: QueryFunction,
    classnames: Sequence[str],
    text: Tensor,
    *,
    rays: float = 1.5,
    bisections: int = 14,
    budget: int = 0,
    generator: torch.Generator | None = None,
) -> RecoveredWeights:
    """Recover class weights and intercepts from labels.

    `rays` * d half great circles start in random directions from a point inside each class. Each ends at the
    antipode, which is usually in another class, and `bisections` labels halve the arc that contains the
    boundary. If an intercept makes the class so large that it contains the antipode, the circles end at
    random points outside the class. This takes about C * d * rays * bisections queries. The error falls as
    2^-bisections.

    A budget reduces bisections first, then rays. With a budget too small for both, a surrogate is fitted to
    labels of random points. If noise moves the boundaries, a surrogate is fitted to all labels.

    Args:
        query: returns labels (n,) of unit queries (n, d).
        classnames: C names, for messages.
        text: (C, d) L2-normalized text embeddings, the first points to try for each class.
        rays: half circles per class and dimension, more than 1.
        bisections: labels per half circle.
        budget: limit on the number of queries; 0 for none.
        generator: source of directions and random points.

    Returns:
        Class weights and intercepts with sum zero and mean squared length 1.

    Raises:
        UserError: a class has no point or no end, or budget or labels do not suffice.
    """
    classes, d = text.shape
    if budget and budget < MIN_CIRCLES_PER_UNKNOWN * MIN_BISECTIONS * classes * d:
        x = F.normalize(torch.randn(budget, d, generator=generator), dim=1)
        return fit_surrogate(x, query(x), classes)
    query = _Budgeted(query, budget)
    starts = _find_points_inside(query, classnames, text, generator)
    holds_antipode = query(-starts) == torch.arange(classes)
    if budget:
        # The end of a circle costs at least two labels if it is not the antipode.
        queries_per_unknown = (budget - query.spent) / (classes * d) - 2 * float(holds_antipode.any())
        bisections = min(bisections, int(queries_per_unknown / MIN_CIRCLES_PER_UNKNOWN))
        rays = min(rays, queries_per_unknown / max(bisections, 1))
        if bisections < 1:
            raise UserError(f"TEACHER.BUDGET {budget:,} is too small for a search for boundaries; raise it")
    count = int(rays * d) if budget else math.ceil(rays * d)
    own_class = torch.arange(classes).repeat_interleave(count)
    circles = HalfCircles(starts, own_class, torch.randn(len(own_class), d, generator=generator))
    end = _end_circles(query, circles, holds_antipode[own_class], classnames, generator)
    angle, other_class, history = _bisect(query, circles, end, bisections)
    rows, error = fit_boundaries(circles, angle, other_class, generator)
    if _label_agreement(circles, rows, *history[0]) < MIN_AGREEMENT:
        parts = torch.arange(len(own_class)).split(MAX_QUERIES_PER_BATCH)
        x = torch.cat([circles.at(middle, part) for middle, _ in history for part in parts])
        labels = torch.cat([label for _, label in history])
        if budget and (remaining := min(budget - query.spent, MAX_ELEMENTS // d)) > 0:
            random_points = F.normalize(torch.randn(remaining, d, generator=generator), dim=1)
            x, labels = torch.cat([x, random_points]), torch.cat([labels, query(random_points)])
        return fit_surrogate(x, labels, classes)
    return RecoveredWeights(rows[:, :-1].contiguous(), rows[:, -1].contiguous(), error)


class _Budgeted:
    """Query function that counts its queries.

    Args:
        query: the query function.
        budget: limit on the number of queries; 0 for none.

    Raises:
        UserError: on a call that exceeds the budget.
    """

    def __init__(self, query: QueryFunction, budget: int) -> None:
        self.query, self.budget, self.spent = query, budget, 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.budget and self.spent + len(x) > self.budget:
            raise UserError(
                f"TEACHER.BUDGET {self.budget:,} is too small to find a point of each class; raise it"
            )
        self.spent += len(x)
        return self.query(x)


def _find_points_inside(
    query: QueryFunction, classnames: Sequence[str], text: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Find a unit vector (C, d) inside each class, first among centered text embeddings, then at random."""
    classes, d = text.shape
    points = torch.zeros(classes, d)
    missing = torch.ones(classes, dtype=torch.bool)
    guesses = F.normalize(text - text.mean(0), dim=1)
    for _ in range(MAX_ATTEMPTS):
        label = query(guesses)
        # `points[label] = guesses` would not be deterministic with several points of one class.
        for row in range(len(guesses)):
            if missing[c := int(label[row])]:
                points[c], missing[c] = guesses[row], False
        if not missing.any():
            return points
        guesses = F.normalize(torch.randn(4 * classes, d, generator=generator), dim=1)
    name = classnames[int(missing.nonzero()[0])]
    queries = 4 * classes * MAX_ATTEMPTS
    raise UserError(f"the teacher never returned '{name}' in {queries} queries; set TEACHER.ACCESS to logits")


def _end_circles(
    query: QueryFunction,
    circles: HalfCircles,
    open_ended: Tensor,
    classnames: Sequence[str],
    generator: torch.Generator | None,
) -> Tensor:
    """Normalize the directions of circles, and find an angle (n,) at which each is outside its class.

    This is the antipode, except for the circles `open_ended` (n,), which are turned to points outside.
    """
    own_class, end = circles.own_class, torch.full((len(circles.own_class),), math.pi)
    parts = torch.arange(len(own_class)).split(MAX_QUERIES_PER_BATCH)
    for part in parts:
        circles.direction[part] = F.normalize(circles.direction[part], dim=1)
    if open_ended.any():
        circles.direction[open_ended] = _find_points_outside(
            query, circles.direction[open_ended], own_class[open_ended], classnames, generator
        )
    for part in parts:
        end[part] = torch.where(open_ended[part], circles.turn(part), math.pi)
    return end


def _find_points_outside(
    query: QueryFunction,
    points: Tensor,
    own_class: Tensor,
    classnames: Sequence[str],
    generator: torch.Generator | None,
) -> Tensor:
    """Replace `points` (n, d) whose class is `own_class` (n,) by random unit vectors of other classes."""
    points = points.clone()
    inside = torch.arange(len(points))
    for _ in range(MAX_ATTEMPTS):
        inside = inside[query(points[inside]) == own_class[inside]]
        if not len(inside):
            return points
        points[inside] = F.normalize(torch.randn(len(inside), points.shape[1], generator=generator), dim=1)
    name = classnames[int(own_class[inside[0]])]
    raise UserError(f"the teacher returns '{name}' for every query; set TEACHER.ACCESS to logits")


def _bisect(
    query: QueryFunction, circles: HalfCircles, end: Tensor, bisections: int
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Find by bisection the angle between 0 and `end` (n,) at which each circle leaves its class.

    Returns:
        The angles (n,); the classes (n,) behind them, -1 if no label showed one; and as many of the first
        queries as fit into memory, as pairs of angles (n,) and labels (n,).
    """
    own_class, d = circles.own_class, circles.starts.shape[1]
    parts = torch.arange(len(own_class)).split(MAX_QUERIES_PER_BATCH)
    low, high, other_class = torch.zeros(len(own_class)), end, torch.full_like(own_class, -1)
    history: list[tuple[Tensor, Tensor]] = []
    with progress_bar(
        total=bisections * len(own_class), desc="boundary search", unit="query", unit_scale=True
    ) as queries:
        for _ in range(bisections):
            middle, label = (low + high) / 2, torch.empty_like(own_class)
            for part in parts:
                label[part] = query(circles.at(middle, part))
                queries.update(len(part))
            if len(history) * len(own_class) * d < MAX_ELEMENTS:
                history.append((middle, label))
            inside = label == own_class
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
            other_class = torch.where(inside, other_class, label)
    return (low + high) / 2, other_class, history


def _label_agreement(circles: HalfCircles, rows: Tensor, angle: Tensor, label: Tensor) -> float:
    """Return the share of labels (n,) at `angle` (n,) that weights and intercepts (C, d + 1) reproduce."""
    parts = torch.arange(len(label)).split(MAX_QUERIES_PER_BATCH)
    scores = (circles.at(angle, part) @ rows[:, :-1].T + rows[:, -1] for part in parts)
    equal = sum(
        int((score.argmax(1) == label[part]).sum()) for score, part in zip(scores, parts, strict=True)
    )
    return equal / len(label)
