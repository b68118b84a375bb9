"""Multinomial logistic regression: scikit-learn's objective, on torch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.progress import progress_bar

ROWS = 4096  # features at a time: their scores stay in a processor's cache
COARSE = 1e-4  # the tolerance that sums in float32 are exact enough for
MOST_STEPS = 1000


def regression(
    x: Tensor,
    y: Tensor,
    classes: int,
    C: float,
    *,
    balanced: bool = False,
    tolerance: float = 1e-6,
    start: Tensor | None = None,
) -> Tensor:
    """(classes, d) rows W, without intercepts, that minimise C sum_i s_i CE(W x_i, y_i) + |W|^2 / 2.

    L-BFGS on V = W L, where L L^T is the Hessian in a class's row at W = 0: there the steps are nearly
    Newton's. Sums are in float32 down to `COARSE` and in float64 from there on.

    Args:
        x: (n, d) features; y: (n,) their classes. A class without any gets the row 0.
        C: inverse strength of the penalty; of two classes it is on the difference of their rows, as in
            scikit-learn.
        balanced: s_i = n / (classes there * features of class y_i), else 1.
        tolerance: of the largest entry of the gradient in V, relative to that at W = 0.
        start: (classes, d) rows to begin with, else 0.
    """
    from scipy.optimize import minimize  # half a second, and only owners need it

    there, y = y.unique(return_inverse=True)
    count = torch.bincount(y).double()
    share = (len(y) / (len(there) * count) if balanced else torch.ones_like(count))[y]
    if len(there) == 2:
        C = C / 2
    eye = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    hessian = eye / C
    for part, weight in zip(x.split(ROWS), share.split(ROWS), strict=True):
        hessian += (part.double() * weight[:, None] / len(there)).T @ part.double()
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(hessian), eye, upper=False)
    white = torch.cat([(part.double() @ inverse.T).float() for part in x.split(ROWS)])
    penalty = inverse @ inverse.T / C

    def loss(flat: np.ndarray, dtype: torch.dtype) -> tuple[float, np.ndarray]:
        """Its value at V and its gradient there."""
        rows = torch.from_numpy(flat).view(len(there), -1).to(x.device)
        gradient = rows @ penalty
        value = (rows * gradient).sum() / 2
        rows = rows.to(dtype)
        for part, label, weight in zip(white.split(ROWS), y.split(ROWS), share.split(ROWS), strict=True):
            told = F.log_softmax(part.to(dtype) @ rows.T, 1)
            value -= weight @ told.gather(1, label[:, None])[:, 0].double()
            error = told.exp_()
            error[torch.arange(len(label)), label] -= 1
            gradient += (error * weight[:, None].to(dtype)).T @ part.to(dtype)
        return float(value), gradient.flatten().cpu().numpy()

    weight = torch.zeros(classes, x.shape[1])
    rows = np.zeros(len(there) * x.shape[1])
    scale = np.abs(loss(rows, torch.float64)[1]).max()
    if scale <= torch.finfo(torch.float32).eps * float(white.abs().sum(0).max()):
        return weight  # rounding alone: the features tell no class from another
    if start is not None:
        begin = torch.linalg.solve_triangular(inverse, start[there].to(inverse), upper=False, left=False)
        rows = begin.flatten().cpu().numpy()
    with progress_bar(desc="regression", unit="step", delay=5) as steps:
        for dtype, reached in ((torch.float32, max(tolerance, COARSE)), (torch.float64, tolerance)):
            rows = minimize(
                lambda flat, dtype=dtype: tuple(part / scale for part in loss(flat, dtype)),
                rows,
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": MOST_STEPS, "gtol": reached, "ftol": 0},
                callback=lambda _: steps.update(),
            ).x
            if reached == tolerance:
                break
    weight[there.cpu()] = (torch.from_numpy(rows).view(len(there), -1).to(inverse) @ inverse).float().cpu()
    return weight
