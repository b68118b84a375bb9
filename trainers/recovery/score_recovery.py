"""Recover a teacher's class weights from logits or probabilities by least squares.

A linear or cosine teacher has class weights W (C, d) and intercepts b (C,). Logits of d + 1 queries determine
both (equation solving, Tramer et al., 2016). Probabilities of d + 1 queries determine the differences
    log p_c - log p_k = (w_c - w_k).x + b_c - b_k.
The mean of the weights over classes is not observable. It is set to zero, as in logistic regression with an
L2 penalty. Rounded, noisy or top-k responses are queried until the estimated error is small enough.
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

from .responses import QueryFunction, RecoveredWeights, detect_rounding_step
from .solvers import conjugate_gradients, simplex

MIN_RESIDUALS = 8  # for a first estimate of the responses' error
DEFAULT_QUERIES_PER_UNKNOWN = 32  # of the d + 1 unknowns of a class, without a budget
REPEATED_QUERIES = 8  # queries repeated at neighboring points, to distinguish noise from nonlinearity


@dataclass
class _Scores:
    """Scores of queries with weights for least squares.

    Attributes:
        x: (n, d) queries.
        y: (n, C) scores.
        weight: (n, C) weights; 0 for a score that the response did not contain.
        common: whether the scores of a query are known up to an additive constant, like log probabilities.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    common: bool

    @classmethod
    def from_responses(
        cls, x: Tensor, responses: Tensor, logarithms: bool, step: float, equal_log_errors: bool
    ) -> _Scores:
        """Create scores from responses.

        Args:
            x: (n, d) queries.
            responses: (n, C) logits or probabilities.
            logarithms: whether the responses are probabilities, of which the logarithms are scores.
            step: rounding step of the responses, or 0.
            equal_log_errors: whether all logarithms have equal errors, or else all probabilities.
        """
        if not logarithms:
            return cls(x, responses, torch.ones_like(responses), common=False)
        # The logarithm of a single digit, which may be off by one half, is too inaccurate.
        visible = responses >= max(2 * step, torch.finfo(torch.float64).tiny)
        visible &= visible.sum(1, keepdim=True) > 1
        weight = (
            visible.double()
            if equal_log_errors
            else visible * (responses / responses.amax(1, keepdim=True)).square()
        )
        return cls(x, torch.where(visible, responses, 1.0).log(), weight, common=True)

    @cached_property
    def with_one(self) -> Tensor:
        """(n, d + 1) queries in float64, with a constant 1 for the intercept."""
        return F.pad(self.x.double(), (0, 1), value=1.0)

    def apply_weights(self, scores: Tensor) -> Tensor:
        """Multiply scores (n, C) by their weights, after centering each query if `common`."""
        if self.common:
            total = self.weight.sum(1, keepdim=True).clamp(min=1e-300)
            scores = scores - (self.weight * scores).sum(1, keepdim=True) / total
        return self.weight * scores

    def mean_square(self, scores: Tensor, unknowns: int) -> float | None:
        """Return the mean square of residuals (n, C) at weight 1 after a fit of `unknowns` parameters.

        None without a degree of freedom.
        """
        freedom = int((self.weight > 0).sum()) - unknowns - self.common * len(self.x)
        total = float((self.apply_weights(scores) * scores).sum())
        return max(total, 0.0) / freedom if freedom > 0 else None

    @cached_property
    def _inverses(self) -> Tensor:
        """(C, d + 1, d + 1) inverses of the classes' blocks of the normal equations, or (1, ...) if equal.

        Each uses the queries with the largest weights for the class, twice as many as unknowns.
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
        """Return the least-squares weights and intercepts (C, d + 1) for scores y (n, C).

        They are 0 in directions without a query.
        """
        x = self.with_one
        return conjugate_gradients(
            lambda rows: self.apply_weights(x @ rows.T).T @ x,
            self.apply_weights(y).T @ x,
            lambda rows: (self._inverses @ rows[:, :, None])[:, :, 0],
            tolerance,
        )


@dataclass(frozen=True)
class _Fit:
    """A least-squares fit.

    Attributes:
        rows: (C, d + 1) class weights and intercepts.
        scores: scores that they were fitted to.
        variance: variance of the residuals at weight 1, or None with fewer scores than unknowns.
        error: relative error of the weights, or None with fewer scores than unknowns.
    """

    rows: Tensor
    scores: _Scores
    variance: float | None
    error: float | None


def _fit(
    x: Tensor, responses: Tensor, logarithms: bool, equal_log_errors: bool, generator: torch.Generator | None
) -> _Fit:
    """Fit weights by least squares, and estimate their error by a parametric bootstrap of the residuals."""
    scores = _Scores.from_responses(
        x, responses, logarithms, detect_rounding_step(responses), equal_log_errors
    )
    fitted = scores.solve(scores.y)
    unknowns = (len(fitted) - logarithms) * fitted.shape[1]
    variance = scores.mean_square(scores.y - scores.with_one @ fitted.T, unknowns)
    if variance is None:
        return _Fit(fitted, scores, None, None)
    noise = torch.randn(responses.shape, dtype=torch.float64, generator=generator)
    noise *= torch.where(scores.weight > 0, variance / scores.weight, 0.0).sqrt()
    rows, deviation = fitted[:, :-1], scores.solve(noise, tolerance=1e-2)[:, :-1]
    # The floor keeps the error finite if all classes have equal weights, to the precision of float32.
    size = torch.linalg.matrix_norm(rows - rows.mean(0)).clamp(min=1e-4 * float(rows.norm()) + 1e-300)
    return _Fit(
        fitted, scores, variance, float(torch.linalg.matrix_norm(deviation - deviation.mean(0)) / size)
    )


def _best_fit(x: Tensor, responses: Tensor, logarithms: bool, generator: torch.Generator | None) -> _Fit:
    """Fit weights under the error model with the smaller estimated error."""
    fit = _fit(x, responses, logarithms, True, generator)
    visible = responses[fit.scores.weight > 0]
    if not logarithms or (fit.error or 0.0) < 1e-4 or visible.max() < 2 * visible.min():
        return fit
    other = _fit(x, responses, logarithms, False, generator)
    return min(fit, other, key=lambda fit: math.inf if fit.error is None else fit.error)


def weights_from_scores(
    query: QueryFunction,
    classnames: Sequence[str],
    d: int,
    *,
    logarithms: bool,
    tolerance: float = 0.02,
    budget: int = 0,
    generator: torch.Generator | None = None,
) -> RecoveredWeights:
    """Recover class weights and intercepts from logits or probabilities.

    The first d + 1 queries are a regular simplex. A few more measure how well a linear classifier fits the
    responses. Further queries are random directions, as many as that error requires.

    Args:
        query: returns (n, C) logits or probabilities of unit queries (n, d).
        classnames: C names, for messages.
        d: dimensions of a query.
        logarithms: whether the responses are probabilities, where 0 means not disclosed.
        tolerance: relative error of the weights at which to stop.
        budget: limit on the number of queries; 0 for `DEFAULT_QUERIES_PER_UNKNOWN` * (d + 1).
        generator: source of the random directions.

    Returns:
        Class weights and intercepts; from probabilities they sum to zero.

    Raises:
        UserError: the responses are not those of a linear classifier, or do not determine its weights.
    """
    classes = len(classnames)
    limit = budget or DEFAULT_QUERIES_PER_UNKNOWN * (d + 1)

    def directions(n: int) -> Tensor:
        return F.normalize(torch.randn(n, d, generator=generator), dim=1)

    spare = math.ceil(MIN_RESIDUALS / max(classes - logarithms, 1))
    x = torch.cat([simplex(d), directions(spare)])[:limit]
    responses = query(x).double()
    repeated = 0  # number of queries that are not part of the fit
    while True:
        disclosed = (responses > 0).sum(0) if logarithms else torch.tensor([len(x)])
        rarest = int(disclosed.argmin())
        remaining = limit - repeated - len(x)
        if disclosed[rarest] < d + 1 + spare and remaining > 0:
            # Half of the new queries are near the query for which the rarest class was most probable.
            more = directions(min(max(len(x), spare), remaining))
            more[::2] = F.normalize(more[::2] + x[responses[:, rarest].argmax()], dim=1)
        else:
            fit = _best_fit(x, responses, logarithms, generator)
            if disclosed[rarest]:
                _refuse_coarse(responses)
            if remaining <= 0 or (fit.error is not None and fit.error <= tolerance):
                break
            if fit.error is not None and repeated == 0 and remaining >= REPEATED_QUERIES:
                # These responses are not fitted, because equal rounding errors would count twice.
                neighbors = F.normalize(x[-REPEATED_QUERIES:] + 1e-3 * directions(REPEATED_QUERIES), dim=1)
                _refuse_nonlinear(fit, responses, neighbors, query(neighbors).double())
                repeated = REPEATED_QUERIES
                remaining -= repeated
            factor = 2.0 if fit.error is None else min(1.1 * (fit.error / tolerance) ** 2, 4.0)
            more = directions(min(max(math.ceil((factor - 1) * len(x)), spare), remaining))
        x, responses = torch.cat([x, more]), torch.cat([responses, query(more).double()])
    if disclosed[rarest] == 0:
        raise UserError(
            f"none of the teacher's {len(x):,} responses has a probability of '{classnames[rarest]}'; "
            "set TEACHER.ACCESS to logits or labels"
        )
    if fit.error is not None and not fit.error < 1:
        raise UserError(
            f"the teacher's {len(x):,} responses do not determine its class weights, because their noise is "
            "too large; raise TEACHER.BUDGET, or set RECOVERY.METHOD to gmm"
        )
    rows = fit.rows - fit.rows.mean(0) if logarithms else fit.rows
    return RecoveredWeights(rows[:, :-1].float().contiguous(), rows[:, -1].float().contiguous(), fit.error)


def _refuse_coarse(responses: Tensor) -> None:
    """Raise UserError if rounding removes almost all differences between responses (n, C)."""
    step, spread = detect_rounding_step(responses), float(responses.std(0).median())
    if responses.shape[1] > 1 and step > 2 * spread:
        raise UserError(
            f"the teacher's responses are rounded to {step:g} and differ between queries by {spread:.2g}, so "
            "they contain less information than labels; set TEACHER.ACCESS to labels"
        )


def _refuse_nonlinear(fit: _Fit, responses: Tensor, neighbors: Tensor, neighbor_responses: Tensor) -> None:
    """Raise UserError if a linear classifier does not fit the responses, though they are reproducible.

    Args:
        fit: the best linear classifier.
        responses: (n, C) responses that it was fitted to.
        neighbors: (m, d) queries close to the last m fitted ones.
        neighbor_responses: (m, C) their responses. They differ from the last m only by noise and rounding.
    """
    n, scores, step = len(neighbors), fit.scores, detect_rounding_step(responses)
    fitted_scores = _Scores(scores.x[-n:], scores.y[-n:], scores.weight[-n:], scores.common)
    if scores.common:
        fitted_scores.weight = fitted_scores.weight * (neighbor_responses > 0)
        neighbor_responses = torch.where(neighbor_responses > 0, neighbor_responses, 1.0).log()
    deviation = (
        neighbor_responses - fitted_scores.y - (neighbors - fitted_scores.x).double() @ fit.rows[:, :-1].T
    )
    float32_error = 1e-6 * (1.0 if scores.common else float(responses.abs().max()))
    response_error = (
        (fitted_scores.mean_square(deviation, 0) or 0.0) / 2
        + _rounding_variance(scores, responses, step)
        + float32_error**2
    )
    if fit.variance is not None and fit.variance > 9 * response_error:
        kind = "probabilities" if scores.common else "logits"
        raise UserError(
            f"the teacher's {kind} are not linear in the features: those of neighboring queries differ by "
            f"{math.sqrt(response_error):.2g}, but the best linear classifier has residuals of "
            f"{math.sqrt(fit.variance):.2g}; set RECOVERY.METHOD to gmm"
        )


def _rounding_variance(scores: _Scores, responses: Tensor, step: float) -> float:
    """Return the variance at weight 1 that rounding responses (n, C) to `step` adds to scores."""
    slope = torch.where(scores.weight > 0, 1 / responses, 0.0).square() if scores.common else 1.0
    return float((scores.weight * slope).sum() / (scores.weight > 0).sum().clamp(min=1)) * step**2 / 12
