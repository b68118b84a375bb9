"""Cross-entropy with smoothed labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(input: Tensor, target: Tensor, label_smooth: float = 0, reduction: str = "mean") -> Tensor:
    """Of logits (B, C) and labels (B,); all classes share `label_smooth` of the probability."""
    return F.cross_entropy(input, target, label_smoothing=label_smooth, reduction=reduction)
