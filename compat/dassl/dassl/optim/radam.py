"""Rectified Adam with decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

__all__ = ["AdamW", "PlainRAdam", "RAdam"]


def _check(lr: float, betas: tuple[float, float], eps: float) -> None:
    if lr < 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if eps < 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")


class _Decoupled(Optimizer):
    """Adam's moments, in single precision also for half-precision parameters; a subclass makes the step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        grad, value = grad.float(), parameter.float()
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(value)
            state["exp_avg_sq"] = torch.zeros_like(value)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        moved = self._moved(value, state["exp_avg"], state["exp_avg_sq"], state["step"], group)
        if moved is not None:
            parameter.copy_(moved)

    def _moved(
        self, value: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, t: int, group: dict[str, Any]
    ) -> torch.Tensor | None:
        """The parameter's value after step t; None: it stays."""
        raise NotImplementedError


class RAdam(_Decoupled):
    r"""Rectified Adam (Liu et al., On the variance of the adaptive learning rate and beyond, ICLR 2020).

    With m, v Adam's moments at step t, rho_inf = 2 / (1 - beta2) - 1 and
    rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t):

    - rho_t >= 5: theta <- theta - lr r_t sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps), where
      r_t^2 = (rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t);
    - else, if `degenerated_to_sgd`: theta <- theta - lr / (1 - beta1^t) m; else no step.

    The weight decay is decoupled, theta <- theta - lr wd theta, and applied only where a step is made. This
    is where it differs from torch.optim.RAdam.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        degenerated_to_sgd: bool = True,
    ) -> None:
        _check(lr, betas, eps)
        self.degenerated_to_sgd = degenerated_to_sgd
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def _moved(
        self, value: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, t: int, group: dict[str, Any]
    ) -> torch.Tensor | None:
        beta1, beta2 = group["betas"]
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        rectified = rho >= 5
        if not rectified and not self.degenerated_to_sgd:
            return None
        if group["weight_decay"] != 0:
            value = value.add(value, alpha=-group["weight_decay"] * group["lr"])
        if not rectified:
            return value.add(mean, alpha=-group["lr"] / (1 - beta1**t))
        rectification = math.sqrt(
            (1 - beta2**t) * (rho - 4) / (rho_inf - 4) * (rho - 2) / rho * rho_inf / (rho_inf - 2)
        )
        step_size = group["lr"] * rectification / (1 - beta1**t)
        return value.addcdiv(mean, square.sqrt().add_(group["eps"]), value=-step_size)


class PlainRAdam(RAdam):
    """RAdam; the original's two differ in what they remember between parameters, not in what they compute."""


class AdamW(_Decoupled):
    """Adam with decoupled weight decay, theta <- theta - lr_t wd theta before the step, and a warmup.

    lr_t = 1e-8 + lr t / warmup before step `warmup`, then lr. OPTIM.NAME adamw is torch.optim.AdamW instead.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup: int = 0,
    ) -> None:
        _check(lr, betas, eps)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, warmup=warmup))

    def _moved(
        self, value: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, t: int, group: dict[str, Any]
    ) -> torch.Tensor:
        beta1, beta2 = group["betas"]
        lr = 1e-8 + t * group["lr"] / group["warmup"] if group["warmup"] > t else group["lr"]
        value = value.add(value, alpha=-group["weight_decay"] * lr)
        step_size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        return value.addcdiv(mean, square.sqrt().add_(group["eps"]), value=-step_size)
