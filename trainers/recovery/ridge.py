"""Ridge regression between class features, and how well it foretells a class that it has not seen."""

from __future__ import annotations

import torch
from torch import Tensor

# Ridge strengths tried, relative to the mean eigenvalue of the conditions' Gram matrix; the last is "no map".
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, float("inf"))


def leave_one_out_ridge(conditions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(c, d) map from centred conditions (n, c) to centred targets (n, d), and what it foretells of each row
    without that row (n, d).

    target = rho condition + B condition: rho >= 0 the least-squares scale (0 where the dimensions differ), B
    by the ridge with the least leave-one-out error.
    """
    t, m = conditions - conditions.mean(0), targets - targets.mean(0)
    same_space = t.shape[1] == m.shape[1]
    rho = ((m * t).sum() / t.square().sum().clamp(min=1e-12)).clamp(min=0) if same_space else 0.0
    residual = m - rho * t if same_space else m
    left, length, right = torch.linalg.svd(t, full_matrices=False)
    target = left.T @ residual
    best, left_out, ridge_map = float("inf"), residual, torch.zeros(t.shape[1], m.shape[1]).to(t)
    for ridge in RIDGES:
        kept = length**2 + ridge * t.square().sum(1).mean().clamp(min=1e-12)
        share = length**2 / kept  # of each singular direction that the ridge leaves; 0 at infinity
        # Leave-one-out residuals of a linear smoother (Craven and Wahba 1979); 1 / n is that of the centring.
        own = (left.square() * share).sum(1, keepdim=True) + 1 / len(t)
        error = (residual - left @ (share[:, None] * target)) / (1 - own).clamp(min=1e-6)
        if (loss := float(error.square().sum())) < best:
            best, left_out = loss, error
            ridge_map = right.T @ ((length / kept)[:, None] * target)
    if same_space:
        ridge_map = ridge_map + rho * torch.eye(t.shape[1], device=t.device)
    return ridge_map, m - left_out
