"""Fit a surrogate: a logistic regression that imitates a black-box teacher on labels of random points."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError

from .logistic import FLOAT32_TOLERANCE, fit_logistic_regression
from .responses import Extracted

# Weight of the mean squared row beside the mean cross-entropy, for coordinates of unit variance.
PENALTY = 3e-4


def fit_surrogate(x: Tensor, labels: Tensor, classes: int) -> Extracted:
    """Fit a logistic regression with intercepts to a teacher's labels.

    The error of its rows follows from how well fits of two halves of the queries agree (Spearman 1910,
    Brown 1910).

    Args:
        x: (n, d) unit queries.
        labels: (n,) their labels.
        classes: number of classes C.

    Returns:
        Rows and intercepts with sum zero and mean squared row 1. A class without any label has the row 0.

    Raises:
        UserError: the halves do not agree: there are too few labels, or they are noise.
    """
    n, d = x.shape

    def fit(part: slice) -> Tensor:
        # The last column stands for an intercept; it is as large as a coordinate of a random unit query.
        features = F.pad(x[part], (0, 1), value=1 / math.sqrt(d))
        strength = d * classes / (2 * PENALTY * len(features))
        rows = fit_logistic_regression(features, labels[part], classes, strength, tolerance=FLOAT32_TOLERANCE)
        rows = rows - rows.mean(0)
        rows[:, -1] /= math.sqrt(d)
        return rows / rows[:, :-1].square().sum(1).mean().sqrt().clamp(min=1e-12)

    rows = fit(slice(None))
    one, two = (fit(slice(start, None, 2))[:, :-1] for start in (0, 1))
    agreement = float(F.cosine_similarity(one.flatten(), two.flatten(), dim=0))
    error = math.sqrt((1 - agreement) / (2 * agreement)) if agreement > 0 else math.inf
    if not error < 1:
        raise UserError(
            f"{n:,} labels say nothing certain of the teacher's rows; raise TEACHER.BUDGET, ask for "
            "logits, or set RECOVERY.METHOD to gmm"
        )
    return Extracted(rows[:, :-1].contiguous(), rows[:, -1].contiguous(), error)
