"""Fit a surrogate of a black-box teacher: a logistic regression on its labels of random queries."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError

from .logistic import FLOAT32_TOLERANCE, fit_logistic_regression
from .responses import RecoveredWeights

# Weight of the mean squared length of class weights relative to the mean cross-entropy, for features of unit
# variance.
L2_PENALTY = 3e-4


def fit_surrogate(x: Tensor, labels: Tensor, classes: int) -> RecoveredWeights:
    """Fit a logistic regression with intercepts to a teacher's labels.

    The error of its weights is estimated from the split-half reliability, i.e. the agreement between fits to
    two halves of the queries (Spearman, 1910; Brown, 1910).

    Args:
        x: (n, d) unit queries.
        labels: (n,) their labels.
        classes: number of classes C.

    Returns:
        Class weights and intercepts with sum zero and mean squared length 1. The weights of a class without
        labels are 0.

    Raises:
        UserError: the halves do not agree, because there are too few labels or they are noise.
    """
    n, d = x.shape

    def fit(part: slice) -> Tensor:
        # The constant column of the intercept has the magnitude of a coordinate of a random unit query.
        features = F.pad(x[part], (0, 1), value=1 / math.sqrt(d))
        strength = d * classes / (2 * L2_PENALTY * len(features))
        rows = fit_logistic_regression(features, labels[part], classes, strength, tolerance=FLOAT32_TOLERANCE)
        rows = rows - rows.mean(0)
        rows[:, -1] /= math.sqrt(d)
        return rows / rows[:, :-1].square().sum(1).mean().sqrt().clamp(min=1e-12)

    rows = fit(slice(None))
    first, second = (fit(slice(start, None, 2))[:, :-1] for start in (0, 1))
    agreement = float(F.cosine_similarity(first.flatten(), second.flatten(), dim=0))
    error = math.sqrt((1 - agreement) / (2 * agreement)) if agreement > 0 else math.inf
    if not error < 1:
        raise UserError(
            f"{n:,} labels do not determine the teacher's class weights; raise TEACHER.BUDGET, set "
            "TEACHER.ACCESS to logits, or set RECOVERY.METHOD to gmm"
        )
    return RecoveredWeights(rows[:, :-1].contiguous(), rows[:, -1].contiguous(), error)
