"""Fit a surrogate: a logistic regression that imitates a black-box teacher on labels of random points."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError

from .responses import Extracted


def fit_surrogate(x: Tensor, labels: Tensor, classes: int) -> Extracted:
    """Fit a logistic regression with intercepts to a teacher's labels.

    The error of its rows follows from how well fits of two halves of the queries agree (Spearman 1910,
    Brown 1910).

    Args:
        x: (n, d) unit queries.
        labels: (n,) their labels.
        classes: number of classes C.

    Returns:
        Rows and intercepts with sum zero and mean squared row 1.

    Raises:
        UserError: the halves do not agree: there are too few labels, or they are noise.
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
