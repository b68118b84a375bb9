"""Gradient reversal (Ganin and Lempitsky, ICML 2015)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function


class _ReverseGrad(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, grad_scaling: float) -> Tensor:  # type: ignore[override]
        ctx.grad_scaling = grad_scaling
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.grad_scaling * grad_output, None


reverse_grad = _ReverseGrad.apply


class ReverseGrad(nn.Module):
    """The identity, whose gradient is reversed and scaled."""

    def forward(self, x: Tensor, grad_scaling: float = 1.0) -> Tensor:
        assert grad_scaling >= 0, f"grad_scaling must be non-negative, but got {grad_scaling}"
        return reverse_grad(x, grad_scaling)
