"""Small functions of semi-supervised learning and domain adaptation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = [
    "create_onehot",
    "ema_model_update",
    "linear_rampup",
    "reverse_index",
    "sharpen_prob",
    "shuffle_index",
    "sigmoid_rampup",
]


def sharpen_prob(p: Tensor, temperature: float = 2) -> Tensor:
    """Probabilities (B, C) to the power `temperature`, normalised. MixMatch's T is 1 / temperature."""
    p = p**temperature
    return p / p.sum(1, keepdim=True)


def reverse_index(data: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Both in reverse order."""
    return data.flip(0), label.flip(0)


def shuffle_index(data: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the same random order, drawn from torch's generator on the CPU."""
    order = torch.randperm(len(data))
    return data[order], label[order]


def create_onehot(label: Tensor, num_classes: int) -> Tensor:
    """Rows (B, num_classes) of float32 on the CPU with a one where `label` (B,) says."""
    return torch.zeros(len(label), num_classes).scatter(1, label.detach().cpu()[:, None], 1)


def sigmoid_rampup(current: float, rampup_length: float) -> float:
    """exp(-5 (1 - t)^2), t = current / rampup_length kept within 0 and 1: from e^-5 to 1."""
    return math.exp(-5 * (1 - linear_rampup(current, rampup_length)) ** 2)


def linear_rampup(current: float, rampup_length: float) -> float:
    """current / rampup_length, kept within 0 and 1."""
    assert rampup_length > 0, f"rampup_length must be positive, got {rampup_length}"
    return float(min(max(current / rampup_length, 0.0), 1.0))


@torch.no_grad()
def ema_model_update(model: nn.Module, ema_model: nn.Module, alpha: float) -> None:
    """Parameters of `ema_model` <- alpha of their own + (1 - alpha) of `model`'s. Buffers stay."""
    for mean, parameter in zip(ema_model.parameters(), model.parameters(), strict=True):
        mean.mul_(alpha).add_(parameter, alpha=1 - alpha)
