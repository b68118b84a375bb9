"""Mixup (Zhang et al., ICLR 2018)."""

from __future__ import annotations

import torch
from torch import Tensor


def mixup(
    x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor, beta: float, preserve_order: bool = False
) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and label rows (B, N) mixed, with a share drawn from Beta(beta, beta) for each.

    preserve_order: the first one's share is at least a half.
    """
    share = torch.distributions.Beta(beta, beta).sample([len(x1), 1, 1, 1])
    if preserve_order:
        share = torch.max(share, 1 - share)
    share = share.to(x1.device)
    return x1 * share + x2 * (1 - share), y1 * share[:, :, 0, 0] + y2 * (1 - share[:, :, 0, 0])
