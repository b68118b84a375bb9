"""Fit a teacher's class weights and intercepts to points on its class boundaries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .solvers import conjugate_gradients


@dataclass
class HalfCircles:
    """Half great circles from points of the classes, in directions orthogonal to these points.

    Points on the circles are computed when needed, because with many classes they would not fit into memory.

    Attributes:
        starts: (C, d) unit vector inside each class.
        own_class: (n,) class of each circle, in ascending order.
        direction: (n, d) unit directions.
    """

    starts: Tensor
    own_class: Tensor
    direction: Tensor

    def at(self, angle: Tensor, part: Tensor) -> Tensor:
        """Return the points (m, d) of the circles `part` (m,) at the angles (n,) of all circles."""
        angle = angle[part, None]
        return angle.cos() * self.starts[self.own_class[part]] + angle.sin() * self.direction[part]

    def turn(self, part: Tensor) -> Tensor:
        """Replace directions that contain target points (m, d) by directions to these points.

        Returns:
            Angles (m,) at which the circles `part` (m,) reach the points.
        """
        start, point = self.starts[self.own_class[part]], self.direction[part]
        along = (point * start).sum(1, keepdim=True)
        self.direction[part] = F.normalize(point - along * start, dim=1)
        return along[:, 0].clamp(-1, 1).acos()


def fit_boundaries(
    circles: HalfCircles, angle: Tensor, other_class: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, float | None]:
    """Fit class weights and intercepts to points on class boundaries.

    Minimize the squares of (w_own - w_other).x + b_own - b_other over the boundary points x, subject to
    sum_c w_c.start_c = const, which excludes W = 0. So W = s + u with the centered starting points s and u
    orthogonal to them. Conjugate gradients find u, preconditioned by the blocks of single classes, which
    contain everything but the coupling of neighboring classes.

    Args:
        circles: n half circles.
        angle: (n,) angles at which they cross a boundary.
        other_class: (n,) classes behind the boundary, or -1 if unknown. Such circles are not used.
        generator: source of the noise of the error estimate.

    Returns:
        Class weights and intercepts (C, d + 1) with sum zero and mean squared length 1, and the relative
        error of the weights, or None with fewer points than unknowns.
    """
    starts = F.pad(circles.starts, (0, 1), value=1.0)
    classes, d = starts.shape
    crossing = (other_class >= 0).nonzero()[:, 0]
    own_class, other_class = circles.own_class[crossing], other_class[crossing]
    sizes = torch.bincount(own_class, minlength=classes).tolist()
    own_parts = torch.arange(len(crossing)).split(sizes)
    other_parts = other_class.argsort(stable=True).split(
        torch.bincount(other_class, minlength=classes).tolist()
    )

    def points(part: Tensor) -> Tensor:
        return F.pad(circles.at(angle, crossing[part]), (0, 1), value=1.0)

    inverses = torch.empty(classes, d, d)
    for c in range(classes):
        x = points(torch.cat([own_parts[c], other_parts[c]]))
        inverses[c] = x.T @ x
    ridge = 1e-4 * inverses.diagonal(dim1=1, dim2=2).mean() * torch.eye(d)
    for block in inverses:
        block.copy_(torch.linalg.inv(block + ridge))
    centered = starts - starts.mean(0)
    centered = centered / centered.norm()

    def gaps(rows: Tensor) -> Tensor:
        """Return the score of the own class minus that of the other one at each point, (n,)."""
        return torch.cat(
            [((rows[c] - rows[other_class[p]]) * points(p)).sum(1) for c, p in enumerate(own_parts)]
        )

    def gaps_transposed(gap: Tensor) -> Tensor:
        """Apply the transpose of `gaps`, which returns (C, d + 1)."""
        # Conjugate gradients diverge with the rounding errors of long float32 sums.
        total = torch.zeros(classes, d, dtype=torch.float64)
        for c, (part, weight) in enumerate(zip(own_parts, gap.split(sizes), strict=True)):
            weighted = (weight[:, None] * points(part)).double()
            total[c] += weighted.sum(0)
            total.index_add_(0, other_class[part], weighted, alpha=-1)
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
    error, degrees_of_freedom = None, len(crossing) - ((classes - 1) * d - 1)
    if degrees_of_freedom > 0:
        deviation = math.sqrt(float(gaps(rows).square().sum()) / degrees_of_freedom)
        change = center(solve(deviation * torch.randn(len(crossing), generator=generator), 1e-2))
        error = float(change[:, :-1].norm() / rows[:, :-1].norm())
    return rows / rows[:, :-1].square().sum(1).mean().sqrt(), error
