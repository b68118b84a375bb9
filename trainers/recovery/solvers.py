"""Provide numerical routines of recovery: simplex queries and preconditioned conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

MAX_ITERATIONS = 500


def simplex(d: int) -> Tensor:
    """Return the d + 1 vertices (d + 1, d) of a regular simplex on the unit sphere.

    No other d + 1 unit queries determine the weights and intercepts of a linear classifier more exactly.
    """
    ones = torch.ones(1, d, dtype=torch.float64)
    corners = (
        math.sqrt(1 + 1 / d) * torch.eye(d, dtype=torch.float64) - (math.sqrt(d + 1) + 1) / d**1.5 * ones
    )
    return torch.cat([ones / math.sqrt(d), corners]).float()


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor],
    target: Tensor,
    precondition: Callable[[Tensor], Tensor],
    tolerance: float,
) -> Tensor:
    """Solve `normal(rows) = target` by preconditioned conjugate gradients, starting from 0.

    Args:
        normal: a symmetric positive semidefinite linear map, from rows to rows.
        target: right-hand side, float32 or float64, of any shape.
        precondition: an approximate inverse of `normal`.
        tolerance: residual norm relative to that of `target` at which to stop.

    Returns:
        The rows, in the shape and type of `target`.
    """
    from scipy.sparse.linalg import (
        LinearOperator,
        cg,
    )  # the import takes half a second, and few commands need it

    dtype = np.float64 if target.dtype == torch.float64 else np.float32

    def operator(function: Callable[[Tensor], Tensor]) -> LinearOperator:
        def matvec(flat: np.ndarray) -> np.ndarray:
            rows = torch.from_numpy(np.asarray(flat, dtype=dtype)).view(target.shape)
            return function(rows).flatten().numpy()

        return LinearOperator((target.numel(), target.numel()), matvec=matvec, dtype=dtype)

    solution, _ = cg(
        operator(normal),
        target.flatten().numpy(),
        rtol=tolerance,
        maxiter=MAX_ITERATIONS,
        M=operator(precondition),
    )
    return torch.from_numpy(solution).view(target.shape)
