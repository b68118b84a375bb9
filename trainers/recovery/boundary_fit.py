"""Fit a teacher's rows and intercepts to points on its class boundaries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .solvers import conjugate_gradients


@dataclass
class HalfCircles:
    """Half great circles, each from a point of its class in a direction at a right angle to that point.

    Points on them are computed when needed: with many classes the directions alone fill the memory.

    Attributes:
        starts: (C, d) a unit point of each class.
        own: (n,) class of each circle, ascending.
        direction: (n, d) unit directions.
    """

    starts: Tensor
    own: Tensor
    direction: Tensor

    def at(self, angle: Tensor, part: Tensor) -> Tensor:
        """Return the points (m, d) of the circles `part` (m,) at the angles (n,) of all circles."""
        angle = angle[part, None]
        return angle.cos() * self.starts[self.own[part]] + angle.sin() * self.direction[part]

    def turn(self, part: Tensor) -> Tensor:
        """Replace directions that hold points (m, d) by directions to these points.

        Returns the angles (m,) at which the circles `part` (m,) reach the points.
        """
        start, point = self.starts[self.own[part]], self.direction[part]
        along = (point * start).sum(1, keepdim=True)
        self.direction[part] = F.normalize(point - along * start, dim=1)
        return along[:, 0].clamp(-1, 1).acos()


def fit_boundaries(
    circles: HalfCircles, angle: Tensor, other: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, float | None]:
    """Fit rows and intercepts to points on class boundaries.

    Minimize the squares of (w_own - w_other).x + b_own - b_other over the points x on the plane
    sum_c w_c.start_c = const, which excludes W = 0: there W = s + u with the centered starting points s and u
    orthogonal to them. Conjugate gradients find u, preconditioned by the blocks of single classes, which
    contain all but the coupling of neighbors.

    Args:
        circles: n half circles.
        angle: (n,) where each crosses a boundary.
        other: (n,) class behind it, or -1 where no label showed one: such circles are not used.
        generator: of the noise of the error estimate.

    Returns:
        Rows and intercepts (C, d + 1) with sum zero and mean squared row 1, and the relative error of the
        rows, or None with fewer points than unknowns.
    """
    starts = F.pad(circles.starts, (0, 1), value=1.0)
    classes, d = starts.shape
    ended = (other >= 0).nonzero()[:, 0]
    own, other = circles.own[ended], other[ended]
    sizes = torch.bincount(own, minlength=classes).tolist()
    as_own = torch.arange(len(ended)).split(sizes)
    as_other = other.argsort(stable=True).split(torch.bincount(other, minlength=classes).tolist())

    def points(part: Tensor) -> Tensor:
        return F.pad(circles.at(angle, ended[part]), (0, 1), value=1.0)

    inverses = torch.empty(classes, d, d)
    for c in range(classes):
        x = points(torch.cat([as_own[c], as_other[c]]))
        inverses[c] = x.T @ x
    ridge = 1e-4 * inverses.diagonal(dim1=1, dim2=2).mean() * torch.eye(d)
    for block in inverses:
        block.copy_(torch.linalg.inv(block + ridge))
    centered = starts - starts.mean(0)
    centered = centered / centered.norm()

    def gaps(rows: Tensor) -> Tensor:
        """(n,) score of the own class less that of the other at each point."""
        return torch.cat([((rows[c] - rows[other[p]]) * points(p)).sum(1) for c, p in enumerate(as_own)])

    def gaps_transposed(gap: Tensor) -> Tensor:
        """(C, d + 1) the transpose of `gaps`."""
        # In float64: with the rounding of long float32 sums conjugate gradients diverge.
        total = torch.zeros(classes, d, dtype=torch.float64)
        for c, (part, weight) in enumerate(zip(as_own, gap.split(sizes), strict=True)):
            weighted = (weight[:, None] * points(part)).double()
            total[c] += weighted.sum(0)
            total.index_add_(0, other[part], weighted, alpha=-1)
        return total.float()

    def project(rows: Tensor) -> Tensor:
        return rows - (rows * centered).sum() * centered

    def solve(target: Tensor, tolerance: float = 1e-6) -> Tensor:
        return conjugate_gradients(
            lambda rows: project(gaps_transposed(gaps(project(rows)))),
            project(gaps_transposed(target)),
            lambda rows: project(torch.einsum("cde,ce->cd", inverses, project(rows))),
            tolerance,
        )

    def center(rows: Tensor) -> Tensor:
        return rows - rows.mean(0)

    rows = center(centered + solve(-gaps(centered)))
    error, freedom = None, len(ended) - ((classes - 1) * d - 1)
    if freedom > 0:
        deviation = math.sqrt(float(gaps(rows).square().sum()) / freedom)
        change = center(solve(deviation * torch.randn(len(ended), generator=generator), 1e-2))
        error = float(change[:, :-1].norm() / rows[:, :-1].norm())
    return rows / rows[:, :-1].square().sum(1).mean().sqrt(), error
