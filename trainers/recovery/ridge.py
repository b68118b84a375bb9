"""Fit ridge regressions between class features, with leave-one-out predictions."""

from __future__ import annotations

import torch
from torch import Tensor

# Candidate strengths relative to the mean eigenvalue of the conditions' Gram matrix; infinity means no map.
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, float("inf"))


def leave_one_out_ridge(conditions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a ridge regression from centered conditions to centered targets.

    target = rho condition + B condition, with the least-squares scale rho >= 0 (0 if the dimensions differ)
    and B from the ridge strength with the least leave-one-out error. The leave-one-out residuals follow from
    the leverages (Craven and Wahba, 1979).

    Args:
        conditions: (n, c) inputs, one row for each class.
        targets: (n, d) outputs.

    Returns:
        The (c, d) map, and the (n, d) leave-one-out predictions of the centered targets.
    """
    t, m = conditions - conditions.mean(0), targets - targets.mean(0)
    same_space = t.shape[1] == m.shape[1]
    rho = ((m * t).sum() / t.square().sum().clamp(min=1e-12)).clamp(min=0) if same_space else 0.0
    residual = m - rho * t if same_space else m
    left, singular, right = torch.linalg.svd(t, full_matrices=False)
    target = left.T @ residual
    least_loss, loo_residual, ridge_map = float("inf"), residual, torch.zeros(t.shape[1], m.shape[1]).to(t)
    for ridge in RIDGES:
        damped = singular**2 + ridge * t.square().sum(1).mean().clamp(min=1e-12)
        shrinkage = singular**2 / damped  # 0 at an infinite ridge
        # The term 1 / n is the leverage of the centering.
        leverage = (left.square() * shrinkage).sum(1, keepdim=True) + 1 / len(t)
        error = (residual - left @ (shrinkage[:, None] * target)) / (1 - leverage).clamp(min=1e-6)
        if (loss := float(error.square().sum())) < least_loss:
            least_loss, loo_residual = loss, error
            ridge_map = right.T @ ((singular / damped)[:, None] * target)
    if same_space:
        ridge_map = ridge_map + rho * torch.eye(t.shape[1], device=t.device)
    return ridge_map, m - loo_residual
