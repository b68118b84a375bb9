"""The teacher's rows and intercepts from its answers: least squares on scores, boundary search on labels.

A linear or cosine teacher is a matrix W (C, d) and intercepts b (C,). Whatever its answers, they fix it only
so far:
    logits          W and b themselves, from d + 1 queries (equation solving, Tramer et al. 2016)
    probabilities   differences, log p_c - log p_k = (w_c - w_k).x + b_c - b_k, from d + 1 queries. The common
                    row that cannot be seen is set so that the rows sum to zero: exactly what logistic
                    regression with an L2 penalty yields
    labels          the same up to one positive scale: where the top class changes from c to k,
                    (w_c - w_k).x + b_c - b_k = 0 (line search, Lowd and Meek 2005)
Answers that are rounded, noisy or cut to the k largest are asked for until least squares is sure enough.
Everything here asks through a callable, `ask(x (n, d)) -> answers`, at unit rows x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import AT_ONCE
from dfzsl.utils.progress import bar

Ask = Callable[[Tensor], Tensor]

RESIDUALS = 8  # that a first estimate of the answers' error rests on, at least
MOST = 32  # times d + 1 queries, where no budget says otherwise
PLACES = 6  # decimals beyond which answers count as not rounded
REPLICAS = 8  # questions asked twice, nearly, where answers do not fit
COARSEST = 8  # bisections of a ray: a budget that buys fewer buys labels of random points instead
FEWEST = 1.1  # rays for each unknown
QUESTIONS = 2**14  # rows that are made and asked at once
CONSISTENT = 0.9  # share of labels that rows found on boundaries give again, where labels have no noise


@dataclass(frozen=True)
class Extracted:
    """What answers tell of a teacher.

    Attributes:
        weight: (C, d) rows; bias: (C,) intercepts or None: x.weight_c + bias_c decides as the teacher does.
        error: the rows' expected error relative to their length (without what all rows share), as a
            parametric bootstrap of the residuals estimates it; None where fewer answers than unknowns came.
    """

    weight: Tensor
    bias: Tensor | None
    error: float | None


def extract_rows(
    ask: Ask,
    level: str,
    classnames: Sequence[str],
    text: Tensor,
    *,
    rays: float = 1.5,
    bisections: int = 14,
    tolerance: float = 0.02,
    budget: int = 0,
    generator: torch.Generator | None = None,
) -> Extracted:
    """The teacher's rows and intercepts as far as `level` shows them (see above).

    Scores are asked for until the rows' estimated error is below `tolerance`; `rays` and `bisections` are the
    price of labels (see `rows_from_labels`), where `text` (C, d) says where to look for each class first. No
    more than `budget` queries are asked, if it is not 0: what it buys is what comes back. Raises UserError
    when the answers do not come from a linear or cosine classifier or say nothing of it.
    """
    generator = generator or torch.Generator().manual_seed(0)
    if level == "labels":
        return rows_from_labels(
            ask, classnames, text, rays=rays, bisections=bisections, budget=budget, generator=generator
        )
    return rows_from_scores(
        ask,
        classnames,
        text.shape[1],
        logarithms=level == "probabilities",
        tolerance=tolerance,
        budget=budget,
        generator=generator,
    )


def step_of(answers: Tensor) -> float:
    """The unit of the last decimal that answers are rounded to; 0 where they are not."""
    values = answers[answers != 0].double()
    if len(values) < 20:
        return 0.0
    for places in range(PLACES + 1):
        off = (values - values.round(decimals=places)).abs()
        if (off <= 1e-7 * values.abs().clamp(min=1)).all():
            return 10.0**-places
    return 0.0


def simplex(d: int) -> Tensor:
    """The d + 1 vertices (d + 1, d) of a regular simplex: no unit queries tell W and b more exactly."""
    ones = torch.ones(1, d, dtype=torch.float64)
    corners = (
        math.sqrt(1 + 1 / d) * torch.eye(d, dtype=torch.float64) - (math.sqrt(d + 1) + 1) / d**1.5 * ones
    )
    return torch.cat([ones / math.sqrt(d), corners]).float()


# ---------------------------------------------------------------- logits and probabilities


@dataclass
class _Scores:
    """Scores y (n, C) at queries x (n, d), with weights (n, C): 0 hides a score that was not answered.

    `common`: each query's scores may be off by a number of its own, as logarithms of probabilities are.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    common: bool

    @classmethod
    def of(cls, x: Tensor, answers: Tensor, logarithms: bool, step: float, even: bool) -> _Scores:
        """Logits, or logarithms of probabilities that are rounded to `step`; errors are the same for all the
        logarithms (`even`) or for all probabilities."""
        if not logarithms:
            return cls(x, answers, torch.ones_like(answers), common=False)
        # Of one digit that may be off by half, the logarithm says little.
        visible = answers >= max(2 * step, torch.finfo(torch.float64).tiny)
        visible &= visible.sum(1, keepdim=True) > 1
        weight = visible.double() if even else visible * (answers / answers.amax(1, keepdim=True)).square()
        return cls(x, torch.where(visible, answers, 1.0).log(), weight, common=True)

    @cached_property
    def with_one(self) -> Tensor:
        """(n, d + 1) queries in float64, and the 1 that an intercept is multiplied with."""
        return F.pad(self.x.double(), (0, 1), value=1.0)

    def free(self, scores: Tensor) -> Tensor:
        """Scores without the number that each query's share, times their weights."""
        if self.common:
            total = self.weight.sum(1, keepdim=True).clamp(min=1e-300)
            scores = scores - (self.weight * scores).sum(1, keepdim=True) / total
        return self.weight * scores

    def mean_square(self, scores: Tensor, unknowns: int) -> float | None:
        """Of scores at weight 1, when as many unknowns have been fitted; None where that leaves nothing."""
        freedom = int((self.weight > 0).sum()) - unknowns - self.common * len(self.x)
        total = float((self.free(scores) * scores).sum())
        return max(total, 0.0) / freedom if freedom > 0 else None

    @cached_property
    def _inverses(self) -> Tensor:
        """Inverse (C, d + 1, d + 1) of each class's block of the normal equations; (1, ...) if all are one.

        Of the rows that weigh most for the class, twice as many as there are unknowns.
        """
        weights = self.weight.T
        if (self.weight == self.weight[:1, :1]).all():
            weights = weights[:1]
        blocks = []
        for weight in weights:
            most = weight.topk(min(len(weight), 2 * self.with_one.shape[1])).indices
            x, w = self.with_one[most], weight[most, None]
            blocks.append((w * x).T @ x * (weight.sum() / w.sum().clamp(min=1e-300)))
        block = torch.stack(blocks)
        ridge = 1e-6 * block.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        return torch.linalg.inv(block + ridge[:, None, None] * torch.eye(block.shape[1], dtype=block.dtype))

    def solve(self, y: Tensor, tolerance: float = 1e-8) -> Tensor:
        """(C, d + 1) rows and intercepts that meet scores y best; nothing in directions never asked in."""
        x = self.with_one
        return conjugate_gradients(
            lambda rows: self.free(x @ rows.T).T @ x,
            self.free(y).T @ x,
            lambda rows: (self._inverses @ rows[:, :, None])[:, :, 0],
            tolerance,
        )


@dataclass(frozen=True)
class _Fit:
    """Rows and intercepts (C, d + 1), the scores they are of, the residuals' variance at weight 1, and the
    relative error of the rows; None for both where fewer scores than unknowns are told."""

    rows: Tensor
    scores: _Scores
    variance: float | None
    error: float | None


def _fit(x: Tensor, answers: Tensor, logarithms: bool, even: bool, generator: torch.Generator | None) -> _Fit:
    """Least squares, and its error by a parametric bootstrap: noise like the residuals is fitted again."""
    scores = _Scores.of(x, answers, logarithms, step_of(answers), even)
    found = scores.solve(scores.y)
    variance = scores.mean_square(
        scores.y - scores.with_one @ found.T, (len(found) - logarithms) * found.shape[1]
    )
    if variance is None:
        return _Fit(found, scores, None, None)
    noise = torch.randn(answers.shape, dtype=torch.float64, generator=generator)
    noise *= torch.where(scores.weight > 0, variance / scores.weight, 0.0).sqrt()
    rows, moved = found[:, :-1], scores.solve(noise, tolerance=1e-2)[:, :-1]
    # Rows that are one row to all digits of a float32 are not uncertain.
    size = torch.linalg.matrix_norm(rows - rows.mean(0)).clamp(min=1e-4 * float(rows.norm()) + 1e-300)
    return _Fit(found, scores, variance, float(torch.linalg.matrix_norm(moved - moved.mean(0)) / size))


def _rounding(scores: _Scores, answers: Tensor, step: float) -> float:
    """Variance at weight 1 that comes of rounding answers to `step`."""
    slope = torch.where(scores.weight > 0, 1 / answers, 0.0).square() if scores.common else 1.0
    return float((scores.weight * slope).sum() / (scores.weight > 0).sum().clamp(min=1)) * step**2 / 12


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
    """Rows and intercepts from logits, or (`logarithms`) from probabilities, of which 0 is one not told.

    The first d + 1 queries are a regular simplex, the next show by how much the answers miss a linear
    classifier, all further ones are random directions, as many as that error needs.
    """
    classes = len(classnames)
    most = budget or MOST * (d + 1)

    def directions(n: int) -> Tensor:
        return F.normalize(torch.randn(n, d, generator=generator), dim=1)

    def best() -> _Fit:
        fit = _fit(x, answers, logarithms, True, generator)
        shown = answers[fit.scores.weight > 0]
        if not logarithms or (fit.error or 0.0) < 1e-4 or shown.max() < 2 * shown.min():
            return fit
        other = _fit(x, answers, logarithms, False, generator)
        return min(fit, other, key=lambda fit: math.inf if fit.error is None else fit.error)

    spare = math.ceil(RESIDUALS / max(classes - logarithms, 1))
    x = torch.cat([simplex(d), directions(spare)])[:most]
    answers = ask(x).double()
    spent = 0  # on questions that are not fitted
    while True:
        told = (answers > 0).sum(0) if logarithms else torch.tensor([len(x)])
        rarest = int(told.argmin())
        left, short = most - spent - len(x), told[rarest] < d + 1 + spare
        if short and left > 0:
            # Half of them on the side where the class that is told least of has been told of at its best.
            more = directions(min(max(len(x), spare), left))
            more[::2] = F.normalize(more[::2] + x[answers[:, rarest].argmax()], dim=1)
        else:
            fit = best()
            if told[rarest]:
                _refuse_coarse(answers)
            if left <= 0 or (fit.error is not None and fit.error <= tolerance):
                break
            if fit.error is not None and spent == 0 and left >= REPLICAS:
                # Not fitted: what is rounded alike does not say so twice.
                twice = F.normalize(x[-REPLICAS:] + 1e-3 * directions(REPLICAS), dim=1)
                _refuse_curves(fit, answers, ask(twice).double(), twice)
                spent = REPLICAS
                left -= spent
            factor = 2.0 if fit.error is None else min(1.1 * (fit.error / tolerance) ** 2, 4.0)
            more = directions(min(max(math.ceil((factor - 1) * len(x)), spare), left))
        x, answers = torch.cat([x, more]), torch.cat([answers, ask(more).double()])
    if told[rarest] == 0:
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
    """Raise UserError where a query hardly ever changes a digit that is told."""
    step, spread = step_of(answers), float(answers.std(0).median())
    if answers.shape[1] > 1 and step > 2 * spread:
        raise UserError(
            f"the teacher's answers are rounded to {step:g} and differ between questions by {spread:.2g}: "
            "they tell less than labels do; set TEACHER.ACCESS to labels"
        )


def _refuse_curves(fit: _Fit, answers: Tensor, again: Tensor, twice: Tensor) -> None:
    """Raise UserError where answers are surer of themselves than of any linear classifier (lack of fit).

    `again` (n, C) are the answers to `twice` (n, d), which lie beside the last n questions: they differ by
    the answers' own errors alone.
    """
    n, scores, step = len(twice), fit.scores, step_of(answers)
    last = _Scores(scores.x[-n:], scores.y[-n:], scores.weight[-n:], scores.common)
    if scores.common:
        last.weight = last.weight * (again > 0)
        again = torch.where(again > 0, again, 1.0).log()
    moved = again - last.y - (twice - last.x).double() @ fit.rows[:, :-1].T
    single = 1e-6 * (1.0 if scores.common else float(answers.abs().max()))  # what a float32 may be off by
    own = (last.mean_square(moved, 0) or 0.0) / 2 + _rounding(scores, answers, step) + single**2
    if fit.variance is not None and fit.variance > 9 * own:
        what = "probabilities" if scores.common else "logits"
        raise UserError(
            f"the teacher's {what} are not linear in the features: neighbouring points are answered alike (to"
            f" {math.sqrt(own):.2g}), but they miss the nearest linear classifier by "
            f"{math.sqrt(fit.variance):.2g}: it is another kind of head; set RECOVERY.METHOD to gmm"
        )


# ---------------------------------------------------------------- labels


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
    """Rows (C, d) and intercepts, up to a common row (their sum is zero) and a scale (mean squared row 1).

    From a point of each class, `rays` * d half great circles leave in random directions. Each ends at the
    antipode, where the class is lost, and `bisections` labels halve the arc on which that happens; a class
    that an intercept has made large enough to hold the antipode too is left towards random points that it
    does not hold. About C * d * rays * bisections queries; the error falls as 2^-bisections, and `rays` must
    exceed 1. A budget cuts down bisections, then rays; one too small for either buys random
    questions, which a logistic regression imitates, as it does where noise makes nonsense of the boundaries.
    """
    classes, d = text.shape
    spent = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal spent
        if budget and spent + len(x) > budget:
            raise UserError(
                f"TEACHER.BUDGET {budget:,} does not suffice to find a point of each class; raise it"
            )
        spent += len(x)
        return ask(x)

    if budget and budget < FEWEST * COARSEST * classes * d:
        x = F.normalize(torch.randn(budget, d, generator=generator), dim=1)
        return _imitation(x, ask(x), classes)
    starts = _points_of_classes(counted, classnames, text, generator)
    everywhere = counted(-starts) == torch.arange(classes)
    if budget:
        # Far ends that are no antipodes cost a label and more.
        each = (budget - spent) / (classes * d) - 2 * float(everywhere.any())
        bisections = min(bisections, int(each / FEWEST))
        rays = min(rays, each / max(bisections, 1))
        if bisections < 1:
            raise UserError(f"TEACHER.BUDGET {budget:,} does not suffice to close in on boundaries; raise it")
    count = int(rays * d) if budget else math.ceil(rays * d)
    own = torch.arange(classes).repeat_interleave(count)
    circles = _Circles(starts, own, torch.randn(len(own), d, generator=generator))
    parts = torch.arange(len(own)).split(QUESTIONS)
    for part in parts:
        circles.direction[part] = F.normalize(circles.direction[part], dim=1)
    if (open_ := everywhere[own]).any():
        circles.direction[open_] = _points_outside(
            counted, circles.direction[open_], own[open_], classnames, generator
        )
    low, high = torch.zeros(len(own)), torch.full((len(own),), math.pi)
    for part in parts:
        high[part] = torch.where(open_[part], circles.towards(part), math.pi)
    other = torch.full_like(own, -1)
    asked: list[tuple[Tensor, Tensor]] = []  # angles and their labels
    with bar(total=bisections * len(own), desc="boundary search", unit="query", unit_scale=True) as queries:
        for _ in range(bisections):
            middle, label = (low + high) / 2, torch.empty_like(own)
            for part in parts:
                label[part] = counted(circles.at(middle, part))
                queries.update(len(part))
            if len(asked) * len(own) * d < AT_ONCE:
                asked.append((middle, label))
            kept = label == own
            low, high = torch.where(kept, middle, low), torch.where(kept, high, middle)
            other = torch.where(kept, other, label)
    found, error = _rows_through(circles, (low + high) / 2, other, generator)
    middle, label = asked[0]
    again = sum(
        int(((circles.at(middle, part) @ found[:, :-1].T + found[:, -1]).argmax(1) == label[part]).sum())
        for part in parts
    )
    if again < CONSISTENT * len(own):
        x = torch.cat([circles.at(middle, part) for middle, _ in asked for part in parts])
        y = torch.cat([label for _, label in asked])
        if budget and (rest := min(budget - spent, AT_ONCE // d)) > 0:
            more = F.normalize(torch.randn(rest, d, generator=generator), dim=1)
            x, y = torch.cat([x, more]), torch.cat([y, counted(more)])
        return _imitation(x, y, classes)
    return Extracted(found[:, :-1].contiguous(), found[:, -1].contiguous(), error)


@dataclass
class _Circles:
    """Half great circles, n in all: from a point of their class in a direction at a right angle to it.

    What is on them is computed when it is looked at: the directions (n, d) are all that many classes hold.
    """

    starts: Tensor  # (C, d)
    own: Tensor  # (n,) the class of each, ascending
    direction: Tensor  # (n, d)

    def at(self, angle: Tensor, part: Tensor) -> Tensor:
        """The points (m, d) of the circles `part` (m,) at the angles (n,) of all."""
        angle = angle[part, None]
        return angle.cos() * self.starts[self.own[part]] + angle.sin() * self.direction[part]

    def towards(self, part: Tensor) -> Tensor:
        """Turn points (m, d) that stand for directions into these; returns the angles (m,) of the points."""
        start, point = self.starts[self.own[part]], self.direction[part]
        along = (point * start).sum(1, keepdim=True)
        self.direction[part] = F.normalize(point - along * start, dim=1)
        return along[:, 0].clamp(-1, 1).acos()


def _imitation(x: Tensor, labels: Tensor, classes: int) -> Extracted:
    """Rows and intercepts, as `rows_from_labels` has them, of a logistic regression on questions (n, d).

    The error follows from how far two halves of the questions agree (Spearman 1910, Brown 1910).
    """
    n, d = x.shape

    def fitted(rows: slice) -> Tensor:
        weight = torch.zeros(classes, d + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = math.sqrt(d) * x[rows] @ weight[:, :-1].T + weight[:, -1]
            loss = F.cross_entropy(logits, labels[rows]) + 1e-4 * weight.square().sum() / classes
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        found = weight.detach() - weight.detach().mean(0)
        found[:, -1] /= math.sqrt(d)
        return found / found[:, :-1].square().sum(1).mean().sqrt().clamp(min=1e-12)

    found = fitted(slice(None))
    one, two = (fitted(slice(start, None, 2))[:, :-1] for start in (0, 1))
    agreement = float(F.cosine_similarity(one.flatten(), two.flatten(), dim=0))
    error = math.sqrt((1 - agreement) / (2 * agreement)) if agreement > 0 else math.inf
    if not error < 1:
        raise UserError(
            f"{n:,} labels say nothing certain of the teacher's rows; raise TEACHER.BUDGET, ask for "
            "logits, or set RECOVERY.METHOD to gmm"
        )
    return Extracted(found[:, :-1].contiguous(), found[:, -1].contiguous(), error)


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


def _points_outside(
    ask: Ask, points: Tensor, own: Tensor, classnames: Sequence[str], generator: torch.Generator | None
) -> Tensor:
    """Random unit points (n, d), the given ones at first, whose class is not `own` (n,)."""
    points = points.clone()
    inside = torch.arange(len(points))
    for _ in range(50):
        inside = inside[ask(points[inside]) == own[inside]]
        if not len(inside):
            return points
        points[inside] = F.normalize(torch.randn(len(inside), points.shape[1], generator=generator), dim=1)
    name = classnames[int(own[inside[0]])]
    raise UserError(f"the teacher answers '{name}' wherever it is asked; ask for logits instead")


def _rows_through(
    circles: _Circles, angle: Tensor, other: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, float | None]:
    """Rows and intercepts (C, d + 1) with sum zero that best meet (w_own - w_other).x + b_own - b_other = 0
    at the points x of the circles at `angle` (n,), and the rows' relative error. A circle whose class was
    kept to the last has not been told which comes next: its `other` is -1.

    Least squares on the plane sum_c w_c.start_c = const, which rules out W = 0: there W = s + u with the
    centred starting points s and u orthogonal to them. Conjugate gradients find u, preconditioned by the
    blocks of single classes, which hold all but the coupling of neighbours.
    """
    starts = F.pad(circles.starts, (0, 1), value=1.0)
    classes, d = starts.shape
    ended = (other >= 0).nonzero()[:, 0]
    own, other = circles.own[ended], other[ended]
    sizes = torch.bincount(own, minlength=classes).tolist()
    mine = torch.arange(len(ended)).split(sizes)
    theirs = other.argsort(stable=True).split(torch.bincount(other, minlength=classes).tolist())

    def points(part: Tensor) -> Tensor:
        return F.pad(circles.at(angle, ended[part]), (0, 1), value=1.0)

    inverses = torch.empty(classes, d, d)
    for c in range(classes):
        x = points(torch.cat([mine[c], theirs[c]]))
        inverses[c] = x.T @ x
    ridge = 1e-4 * inverses.diagonal(dim1=1, dim2=2).mean() * torch.eye(d)
    for block in inverses:
        block.copy_(torch.linalg.inv(block + ridge))
    centred = starts - starts.mean(0)
    centred = centred / centred.norm()

    def gaps(rows: Tensor) -> Tensor:
        """(n,) score of the own class less that of the other at each point."""
        return torch.cat([((rows[c] - rows[other[p]]) * points(p)).sum(1) for c, p in enumerate(mine)])

    def pulled(gap: Tensor) -> Tensor:
        """The transpose of `gaps`."""
        # In float64: with the rounding of long float32 sums conjugate gradients diverge.
        total = torch.zeros(classes, d, dtype=torch.float64)
        for c, (part, push) in enumerate(zip(mine, gap.split(sizes), strict=True)):
            pushed = (push[:, None] * points(part)).double()
            total[c] += pushed.sum(0)
            total.index_add_(0, other[part], pushed, alpha=-1)
        return total.float()

    def project(rows: Tensor) -> Tensor:
        return rows - (rows * centred).sum() * centred

    def solve(target: Tensor, tolerance: float = 1e-6) -> Tensor:
        return conjugate_gradients(
            lambda rows: project(pulled(gaps(project(rows)))),
            project(pulled(target)),
            lambda rows: project(torch.einsum("cde,ce->cd", inverses, project(rows))),
            tolerance,
        )

    def settled(rows: Tensor) -> Tensor:
        return rows - rows.mean(0)

    rows = settled(centred + solve(-gaps(centred)))
    error, free = None, len(ended) - ((classes - 1) * d - 1)
    if free > 0:
        deviation = math.sqrt(float(gaps(rows).square().sum()) / free)
        moved = settled(solve(deviation * torch.randn(len(ended), generator=generator), 1e-2))
        error = float(moved[:, :-1].norm() / rows[:, :-1].norm())
    return rows / rows[:, :-1].square().sum(1).mean().sqrt(), error


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor],
    target: Tensor,
    precondition: Callable[[Tensor], Tensor],
    tolerance: float,
) -> Tensor:
    """The solution of normal(rows) = target, in the shape and type of `target`, from 0 on."""
    from scipy.sparse.linalg import LinearOperator, cg  # half a second, which few commands need

    kind = np.float64 if target.dtype == torch.float64 else np.float32

    def operator(work: Callable[[Tensor], Tensor]) -> LinearOperator:
        def matvec(flat: np.ndarray) -> np.ndarray:
            return work(torch.from_numpy(np.asarray(flat, dtype=kind)).view(target.shape)).flatten().numpy()

        return LinearOperator((target.numel(), target.numel()), matvec=matvec, dtype=kind)

    solution, _ = cg(
        operator(normal),
        target.flatten().numpy(),
        rtol=tolerance,
        maxiter=500,
        M=operator(precondition),
    )
    return torch.from_numpy(solution).view(target.shape)
