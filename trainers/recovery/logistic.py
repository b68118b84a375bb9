"""Fit multinomial logistic regressions with scikit-learn's objective in PyTorch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.progress import progress_bar

ROWS_PER_BLOCK = 4096  # the scores of a block fit into the cache of a processor
FLOAT32_TOLERANCE = 1e-4  # for smaller tolerances sums in float32 are not exact enough
MAX_ITERATIONS = 1000


def fit_logistic_regression(
    x: Tensor,
    y: Tensor,
    classes: int,
    C: float,
    *,
    balanced: bool = False,
    tolerance: float = 1e-6,
    start: Tensor | None = None,
) -> Tensor:
    """Minimize C sum_i s_i CE(W x_i, y_i) + |W|^2 / 2 over class weights W, without intercepts.

    L-BFGS runs on V = W L, where L L^T is the Hessian in one class's weights at W = 0, so that its steps are
    close to Newton steps. Sums are in float32 down to `FLOAT32_TOLERANCE`, then in float64.

    Args:
        x: (n, d) features.
        y: (n,) labels.
        classes: number of classes.
        C: inverse strength of the penalty. With two classes the penalty is on the difference of their
            weights, as in scikit-learn.
        balanced: s_i = n / (number of classes with features * features of class y_i), else 1.
        tolerance: largest entry of the gradient in V at which to stop, relative to that at W = 0.
        start: (classes, d) weights to start from; None for 0.

    Returns:
        (classes, d) class weights; 0 for a class without features.
    """
    from scipy.optimize import minimize  # the import takes half a second, and few commands need it

    labels, y = y.unique(return_inverse=True)
    count = torch.bincount(y).double()
    sample_weight = (len(y) / (len(labels) * count) if balanced else torch.ones_like(count))[y]
    if len(labels) == 2:
        C = C / 2
    eye = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    hessian = eye / C
    for block, weight in zip(x.split(ROWS_PER_BLOCK), sample_weight.split(ROWS_PER_BLOCK), strict=True):
        hessian += (block.double() * weight[:, None] / len(labels)).T @ block.double()
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(hessian), eye, upper=False)
    whitened = torch.cat([(block.double() @ inverse.T).float() for block in x.split(ROWS_PER_BLOCK)])
    penalty = inverse @ inverse.T / C
    split_tensors = (tensor.split(ROWS_PER_BLOCK) for tensor in (whitened, y, sample_weight))
    blocks = list(zip(*split_tensors, strict=True))

    def loss(flat: np.ndarray, dtype: torch.dtype) -> tuple[float, np.ndarray]:
        """Return the objective at V and its gradient."""
        rows = torch.from_numpy(flat).view(len(labels), -1).to(x.device)
        gradient = rows @ penalty
        value = (rows * gradient).sum() / 2
        rows = rows.to(dtype)
        for block, label, weight in blocks:
            log_probability = F.log_softmax(block.to(dtype) @ rows.T, 1)
            value -= weight @ log_probability.gather(1, label[:, None])[:, 0].double()
            error = log_probability.exp_()
            error[torch.arange(len(label)), label] -= 1
            gradient += (error * weight[:, None].to(dtype)).T @ block.to(dtype)
        return float(value), gradient.flatten().cpu().numpy()

    class_weights = torch.zeros(classes, x.shape[1])
    rows = np.zeros(len(labels) * x.shape[1])
    scale = np.abs(loss(rows, torch.float64)[1]).max()
    if scale <= torch.finfo(torch.float32).eps * float(whitened.abs().sum(0).max()):
        # The gradient is rounding error: the features do not depend on the class.
        return class_weights
    if start is not None:
        initial = torch.linalg.solve_triangular(inverse, start[labels].to(inverse), upper=False, left=False)
        rows = initial.flatten().cpu().numpy()
    stages = ((torch.float32, max(tolerance, FLOAT32_TOLERANCE)), (torch.float64, tolerance))
    with progress_bar(desc="regression", unit="step", delay=5) as steps:
        for dtype, gradient_tolerance in stages:
            rows = minimize(
                lambda flat, dtype=dtype: tuple(part / scale for part in loss(flat, dtype)),
                rows,
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": MAX_ITERATIONS, "gtol": gradient_tolerance, "ftol": 0},
                callback=lambda _: steps.update(),
            ).x
            if gradient_tolerance == tolerance:
                break
    solution = torch.from_numpy(rows).view(len(labels), -1).to(inverse)
    class_weights[labels.cpu()] = (solution @ inverse).float().cpu()
    return class_weights
