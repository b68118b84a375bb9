"""Recover a teacher's rows and intercepts from logits or probabilities by least squares.

A linear or cosine teacher is a matrix W (C, d) and intercepts b (C,). Logits determine W and b from d + 1
queries (equation solving, Tramer et al. 2016). Probabilities determine differences,
    log p_c - log p_k = (w_c - w_k).x + b_c - b_k,
from d + 1 queries. The common row is not observable; it is chosen so that the rows sum to zero, as those of
logistic regression with an L2 penalty do. Responses that are rounded, noisy or cut to the k largest are
requested until the estimated error of the rows is small enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError

from .responses import Ask, Extracted, step_of
from .solvers import conjugate_gradients, simplex

MIN_RESIDUALS = 8  # that a first estimate of the responses' error rests on
DEFAULT_BUDGET = 32  # queries for each of the d + 1 unknowns of a class, where no budget is set
REPEATED_QUERIES = 8  # queries repeated at neighboring points, to tell noise from a lack of fit


@dataclass
class _Scores:
    """Scores of queries with weights for least squares.

    Attributes:
        x: (n, d) queries.
        y: (n, C) scores.
        weight: (n, C) weights; 0 for a score that was not in the response.
        common: whether each query's scores are known up to a number that they share, as logarithms of
            probabilities are.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    common: bool

    @classmethod
    def of(cls, x: Tensor, answers: Tensor, logarithms: bool, step: float, even: bool) -> _Scores:
        """Make scores of responses.

        Args:
            x: (n, d) queries.
            answers: (n, C) logits or probabilities.
            logarithms: whether the responses are probabilities, of which the logarithms are scores.
            step: unit to which responses are rounded, or 0.
            even: whether errors are equal for all logarithms, or else for all probabilities.
        """
        if not logarithms:
            return cls(x, answers, torch.ones_like(answers), common=False)
        # Of a single digit, which may be off by a half, the logarithm says little.
        visible = answers >= max(2 * step, torch.finfo(torch.float64).tiny)
        visible &= visible.sum(1, keepdim=True) > 1
        weight = visible.double() if even else visible * (answers / answers.amax(1, keepdim=True)).square()
        return cls(x, torch.where(visible, answers, 1.0).log(), weight, common=True)

    @cached_property
    def with_one(self) -> Tensor:
        """(n, d + 1) queries in float64, with the 1 that multiplies an intercept."""
        return F.pad(self.x.double(), (0, 1), value=1.0)

    def free(self, scores: Tensor) -> Tensor:
        """Multiply scores (n, C) by their weights, after removing what each query's scores share."""
        if self.common:
            total = self.weight.sum(1, keepdim=True).clamp(min=1e-300)
            scores = scores - (self.weight * scores).sum(1, keepdim=True) / total
        return self.weight * scores

    def mean_square(self, scores: Tensor, unknowns: int) -> float | None:
        """Return the mean square of scores (n, C) at weight 1 after fitting so many unknowns.

        None where no degree of freedom is left.
        """
        freedom = int((self.weight > 0).sum()) - unknowns - self.common * len(self.x)
        total = float((self.free(scores) * scores).sum())
        return max(total, 0.0) / freedom if freedom > 0 else None

    @cached_property
    def _inverses(self) -> Tensor:
        """(C, d + 1, d + 1) inverse of each class's block of the normal equations; (1, ...) if all are equal.

        Each is computed from the queries that weigh most for the class, twice as many as unknowns.
        """
        weights = self.weight.T
        if (self.weight == self.weight[:1, :1]).all():
            weights = weights[:1]
        blocks = []
        for weight in weights:
            heaviest = weight.topk(min(len(weight), 2 * self.with_one.shape[1])).indices
            x, w = self.with_one[heaviest], weight[heaviest, None]
            blocks.append((w * x).T @ x * (weight.sum() / w.sum().clamp(min=1e-300)))
        block = torch.stack(blocks)
        ridge = 1e-6 * block.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        return torch.linalg.inv(block + ridge[:, None, None] * torch.eye(block.shape[1], dtype=block.dtype))

    def solve(self, y: Tensor, tolerance: float = 1e-8) -> Tensor:
        """Return the rows and intercepts (C, d + 1) of least squares for scores y (n, C).

        They are 0 in directions without a query.
        """
        x = self.with_one
        return conjugate_gradients(
            lambda rows: self.free(x @ rows.T).T @ x,
            self.free(y).T @ x,
            lambda rows: (self._inverses @ rows[:, :, None])[:, :, 0],
            tolerance,
        )


@dataclass(frozen=True)
class _Fit:
    """A least-squares fit.

    Attributes:
        rows: (C, d + 1) rows and intercepts.
        scores: what they were fitted on.
        variance: of the residuals at weight 1, or None with fewer scores than unknowns.
        error: relative error of the rows, or None with fewer scores than unknowns.
    """

    rows: Tensor
    scores: _Scores
    variance: float | None
    error: float | None


def _fit(x: Tensor, answers: Tensor, logarithms: bool, even: bool, generator: torch.Generator | None) -> _Fit:
    """Fit rows by least squares, and estimate their error by a parametric bootstrap of the residuals."""
    scores = _Scores.of(x, answers, logarithms, step_of(answers), even)
    fitted = scores.solve(scores.y)
    unknowns = (len(fitted) - logarithms) * fitted.shape[1]
    variance = scores.mean_square(scores.y - scores.with_one @ fitted.T, unknowns)
    if variance is None:
        return _Fit(fitted, scores, None, None)
    noise = torch.randn(answers.shape, dtype=torch.float64, generator=generator)
    noise *= torch.where(scores.weight > 0, variance / scores.weight, 0.0).sqrt()
    rows, change = fitted[:, :-1], scores.solve(noise, tolerance=1e-2)[:, :-1]
    # Rows that are one row to all digits of a float32 are not uncertain.
    size = torch.linalg.matrix_norm(rows - rows.mean(0)).clamp(min=1e-4 * float(rows.norm()) + 1e-300)
    return _Fit(fitted, scores, variance, float(torch.linalg.matrix_norm(change - change.mean(0)) / size))


def _best_fit(x: Tensor, answers: Tensor, logarithms: bool, generator: torch.Generator | None) -> _Fit:
    """Fit rows under the error model that suits the responses better."""
    fit = _fit(x, answers, logarithms, True, generator)
    visible = answers[fit.scores.weight > 0]
    if not logarithms or (fit.error or 0.0) < 1e-4 or visible.max() < 2 * visible.min():
        return fit
    other = _fit(x, answers, logarithms, False, generator)
    return min(fit, other, key=lambda fit: math.inf if fit.error is None else fit.error)


def rows_from_scores(
    ask: Ask,
    classnames: Sequence[str],
    d: int,
    *,
    logarithms: bool,
    tolerance: float = 0.02,
    budget: int = 0,
    generator: torch.Generator | None = None,
) -> Extracted:
    """Recover rows and intercepts from logits or probabilities.

    The first d + 1 queries are a regular simplex. A few more show how well a linear classifier fits the
    responses. All further ones are random directions, as many as that error requires.

    Args:
        ask: returns (n, C) logits or probabilities of unit queries (n, d).
        classnames: C names, for messages.
        d: dimensions of a query.
        logarithms: whether the responses are probabilities; 0 is one that the teacher does not disclose.
        tolerance: relative error of the rows at which to stop.
        budget: most queries; 0 for `DEFAULT_BUDGET` * (d + 1).
        generator: of the random directions.

    Returns:
        The rows; from probabilities, rows and intercepts that sum to zero.

    Raises:
        UserError: the responses are not those of a linear classifier, or do not determine its rows.
    """
    classes = len(classnames)
    limit = budget or DEFAULT_BUDGET * (d + 1)

    def directions(n: int) -> Tensor:
        return F.normalize(torch.randn(n, d, generator=generator), dim=1)

    spare = math.ceil(MIN_RESIDUALS / max(classes - logarithms, 1))
    x = torch.cat([simplex(d), directions(spare)])[:limit]
    answers = ask(x).double()
    repeated = 0  # queries that are not part of the fit
    while True:
        disclosed = (answers > 0).sum(0) if logarithms else torch.tensor([len(x)])
        rarest = int(disclosed.argmin())
        left = limit - repeated - len(x)
        if disclosed[rarest] < d + 1 + spare and left > 0:
            # Half of them near the query for which the rarest class was most probable.
            more = directions(min(max(len(x), spare), left))
            more[::2] = F.normalize(more[::2] + x[answers[:, rarest].argmax()], dim=1)
        else:
            fit = _best_fit(x, answers, logarithms, generator)
            if disclosed[rarest]:
                _refuse_coarse(answers)
            if left <= 0 or (fit.error is not None and fit.error <= tolerance):
                break
            if fit.error is not None and repeated == 0 and left >= REPEATED_QUERIES:
                # They are not fitted: equal rounding errors would count twice.
                neighbors = F.normalize(x[-REPEATED_QUERIES:] + 1e-3 * directions(REPEATED_QUERIES), dim=1)
                _refuse_nonlinear(fit, answers, neighbors, ask(neighbors).double())
                repeated = REPEATED_QUERIES
                left -= repeated
            factor = 2.0 if fit.error is None else min(1.1 * (fit.error / tolerance) ** 2, 4.0)
            more = directions(min(max(math.ceil((factor - 1) * len(x)), spare), left))
        x, answers = torch.cat([x, more]), torch.cat([answers, ask(more).double()])
    if disclosed[rarest] == 0:
        raise UserError(
            f"the teacher's {len(x):,} answers never tell a probability of '{classnames[rarest]}': "
            "ask for logits, or set TEACHER.ACCESS to labels"
        )
    if fit.error is not None and not fit.error < 1:
        raise UserError(
            f"the teacher's {len(x):,} answers say nothing certain of its rows: their noise is larger than "
            "what they tell; raise TEACHER.BUDGET, or set RECOVERY.METHOD to gmm"
        )
    rows = fit.rows - fit.rows.mean(0) if logarithms else fit.rows
    return Extracted(rows[:, :-1].float().contiguous(), rows[:, -1].float().contiguous(), fit.error)


def _refuse_coarse(answers: Tensor) -> None:
    """Raise UserError where rounding hides almost all differences between the responses (n, C)."""
    step, spread = step_of(answers), float(answers.std(0).median())
    if answers.shape[1] > 1 and step > 2 * spread:
        raise UserError(
            f"the teacher's answers are rounded to {step:g} and differ between questions by {spread:.2g}: "
            "they tell less than labels do; set TEACHER.ACCESS to labels"
        )


def _refuse_nonlinear(fit: _Fit, answers: Tensor, neighbors: Tensor, again: Tensor) -> None:
    """Raise UserError where responses fit no linear classifier, though they repeat well (lack of fit).

    Args:
        fit: the best linear classifier.
        answers: (n, C) the responses that it was fitted on.
        neighbors: (m, d) queries close to the last m fitted ones.
        again: (m, C) their responses, which differ from the last m by the responses' own errors alone.
    """
    n, scores, step = len(neighbors), fit.scores, step_of(answers)
    last = _Scores(scores.x[-n:], scores.y[-n:], scores.weight[-n:], scores.common)
    if scores.common:
        last.weight = last.weight * (again > 0)
        again = torch.where(again > 0, again, 1.0).log()
    change = again - last.y - (neighbors - last.x).double() @ fit.rows[:, :-1].T
    float32_error = 1e-6 * (1.0 if scores.common else float(answers.abs().max()))
    own = (last.mean_square(change, 0) or 0.0) / 2 + _rounding(scores, answers, step) + float32_error**2
    if fit.variance is not None and fit.variance > 9 * own:
        what = "probabilities" if scores.common else "logits"
        raise UserError(
            f"the teacher's {what} are not linear in the features: neighbouring points are answered alike (to"
            f" {math.sqrt(own):.2g}), but they miss the nearest linear classifier by "
            f"{math.sqrt(fit.variance):.2g}: it is another kind of head; set RECOVERY.METHOD to gmm"
        )


def _rounding(scores: _Scores, answers: Tensor, step: float) -> float:
    """Return the variance at weight 1 that rounding responses (n, C) to `step` adds to scores."""
    slope = torch.where(scores.weight > 0, 1 / answers, 0.0).square() if scores.common else 1.0
    return float((scores.weight * slope).sum() / (scores.weight > 0).sum().clamp(min=1)) * step**2 / 12
