"""The teacher's rows from its answers: exact from logits and probabilities, by boundary search from labels.

A teacher without intercept is a matrix W (C, d). Whatever its answers, they fix W only so far:
    logits          W itself, from d queries (equation solving, Tramer et al. 2016)
    probabilities   differences of rows, log p_c - log p_k = (w_c - w_k).x, from d queries. The common row
                    that cannot be seen is set so that the rows sum to zero: exactly what logistic
                    regression with an L2 penalty and no intercept yields
    labels          the same up to one positive scale: where the top class changes from c to k on a ray,
                    (w_c - w_k).x = 0 (line search, Lowd and Meek 2005)
Everything here asks through a callable, `ask(x (n, d)) -> answers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from dfzsl.errors import UserError

Ask = Callable[[Tensor], Tensor]


def extract_rows(
    ask: Ask,
    level: str,
    classnames: Sequence[str],
    text: Tensor,
    *,
    rays: float = 1.5,
    bisections: int = 14,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The teacher's rows (C, d) as far as `level` shows them (see above), float32.

    `text` (C, d) only says where to look for a first point of each class when there are labels alone; `rays`
    and `bisections` are the price of that search (see `rows_from_labels`). Raises UserError when the answers
    do not come from a linear or cosine classifier.
    """
    d = text.shape[1]
    if level == "labels":
        return rows_from_labels(ask, classnames, text, rays=rays, bisections=bisections, generator=generator)
    answers = ask(torch.eye(d)).double()
    if level == "probabilities":
        answers = _centred_log(answers)
    # One more query tells a matrix from anything else.
    x = F.normalize(text.mean(0, keepdim=True), dim=1)
    answer = ask(x).double()
    if level == "probabilities":
        answer = _centred_log(answer)
    off = (answer - x.double() @ answers).norm() / answer.norm().clamp(min=1e-12)
    if off > 0.05:
        raise UserError(
            f"the teacher's {level} are not linear in the features (off by {off:.0%}): it has an intercept, "
            "another kind of head, or rounded answers; set RECOVERY.METHOD to simulator"
        )
    return answers.T.float().contiguous()


def _centred_log(probabilities: Tensor) -> Tensor:
    if (probabilities < torch.finfo(torch.float64).tiny).any():
        raise UserError(
            "the teacher's probabilities are rounded to zero; ask for logits, or set TEACHER.ACCESS to labels"
        )
    logs = probabilities.log()
    return logs - logs.mean(1, keepdim=True)


def rows_from_labels(
    ask: Ask,
    classnames: Sequence[str],
    text: Tensor,
    *,
    rays: float = 1.5,
    bisections: int = 14,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows (C, d) up to a common row (set to sum zero) and a common scale (mean squared length 1).

    From a point of each class, `rays` * d half great circles leave in random directions. Each ends at the
    antipode, where the class is lost, and `bisections` labels halve the arc on which that happens. About
    C * d * rays * bisections queries; the error falls as 2^-bisections, and `rays` must exceed 1.
    """
    classes, d = text.shape
    starts = _points_of_classes(ask, classnames, text, generator)
    count = math.ceil(rays * d)
    own = torch.arange(classes).repeat_interleave(count)
    direction = torch.randn(len(own), d, generator=generator)
    start = starts[own]
    direction -= (direction * start).sum(1, keepdim=True) * start
    direction = F.normalize(direction, dim=1)
    low, high = torch.zeros(len(own), 1), torch.full((len(own), 1), math.pi)
    other = ask(-starts)[own]
    if (same := other == own).any():
        name = classnames[int(own[same][0])]
        raise UserError(f"the teacher answers '{name}' at a point and at its antipode: it is not linear")
    for _ in range(bisections):
        middle = (low + high) / 2
        label = ask(middle.cos() * start + middle.sin() * direction)
        kept = label == own
        low = torch.where(kept[:, None], middle, low)
        high = torch.where(kept[:, None], high, middle)
        other = torch.where(kept, other, label)
    middle = (low + high) / 2
    return _rows_through(middle.cos() * start + middle.sin() * direction, own, other, starts)


def _points_of_classes(
    ask: Ask, classnames: Sequence[str], text: Tensor, generator: torch.Generator | None
) -> Tensor:
    """A unit feature (C, d) of each class: its text feature as seen from the others', or a random point."""
    classes, d = text.shape
    points = torch.zeros(classes, d)
    missing = torch.ones(classes, dtype=torch.bool)
    guesses = F.normalize(text - text.mean(0), dim=1)
    for _ in range(50):
        label = ask(guesses)
        # Only the first point of a class is kept: `points[label] = guesses` would leave the choice open.
        for row in range(len(guesses)):
            if missing[c := int(label[row])]:
                points[c], missing[c] = guesses[row], False
        if not missing.any():
            return points
        guesses = F.normalize(torch.randn(4 * classes, d, generator=generator), dim=1)
    name = classnames[int(missing.nonzero()[0])]
    raise UserError(f"the teacher never answered '{name}' in {200 * classes} queries; ask for logits instead")


def _rows_through(boundary: Tensor, own: Tensor, other: Tensor, starts: Tensor) -> Tensor:
    """The rows W (C, d) with sum zero that best meet (w_own - w_other).x = 0 at all boundary points x.

    Least squares on the plane sum_c w_c.start_c = const, which rules out W = 0: there W = s + u with the
    centred starting points s and u orthogonal to them. Conjugate gradients find u, preconditioned by the
    blocks of single classes, which hold all but the coupling of neighbours.
    """
    classes, d = starts.shape
    near = [boundary[(own == c) | (other == c)] for c in range(classes)]
    blocks = torch.stack([x.T @ x for x in near])
    ridge = 1e-4 * blocks.diagonal(dim1=1, dim2=2).mean() * torch.eye(d)
    inverses = torch.linalg.inv(blocks + ridge)
    centred = starts - starts.mean(0)
    centred = centred / centred.norm()

    def normal(rows: Tensor) -> Tensor:
        pushed = (((rows[own] - rows[other]) * boundary).sum(1, keepdim=True) * boundary).double()
        # In float64: with the rounding of long float32 sums conjugate gradients diverge.
        total = torch.zeros(classes, d, dtype=torch.float64)
        return total.index_add_(0, own, pushed).index_add_(0, other, pushed, alpha=-1).float()

    def project(rows: Tensor) -> Tensor:
        return rows - (rows * centred).sum() * centred

    def on_plane(work: Callable[[Tensor], Tensor]) -> LinearOperator:
        """`work` on the rows orthogonal to `centred`, as scipy wants it."""

        def matvec(flat: np.ndarray) -> np.ndarray:
            rows = torch.from_numpy(np.asarray(flat, dtype=np.float32)).view(classes, d)
            return project(work(project(rows))).flatten().numpy()

        return LinearOperator((classes * d, classes * d), matvec=matvec, dtype=np.float32)

    solution, _ = cg(
        on_plane(normal),
        -project(normal(centred)).flatten().numpy(),
        rtol=1e-6,
        maxiter=500,
        M=on_plane(lambda rows: torch.einsum("cde,ce->cd", inverses, rows)),
    )
    rows = centred + torch.from_numpy(solution).view(classes, d)
    rows = rows - rows.mean(0)
    return rows / rows.square().sum(1).mean().sqrt()
