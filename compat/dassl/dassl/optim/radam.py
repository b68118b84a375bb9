"""Rectified Adam with decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

__all__ = ["RAdam"]


class RAdam(Optimizer):
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
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if eps < 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        self.degenerated_to_sgd = degenerated_to_sgd
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

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
            raise RuntimeError("RAdam does not support sparse gradients")
        # Half-precision parameters are updated in single precision.
        grad, value = grad.float(), parameter.float()
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(value)
            state["exp_avg_sq"] = torch.zeros_like(value)
        state["step"] += 1
        t, (beta1, beta2) = state["step"], group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)

        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        rectified = rho >= 5
        if not rectified and not self.degenerated_to_sgd:
            return
        if group["weight_decay"] != 0:
            value = value.add(value, alpha=-group["weight_decay"] * group["lr"])
        if rectified:
            rectification = math.sqrt(
                (1 - beta2**t) * (rho - 4) / (rho_inf - 4) * (rho - 2) / rho * rho_inf / (rho_inf - 2)
            )
            step_size = group["lr"] * rectification / (1 - beta1**t)
            value = value.addcdiv(mean, square.sqrt().add_(group["eps"]), value=-step_size)
        else:
            value = value.add(mean, alpha=-group["lr"] / (1 - beta1**t))
        parameter.copy_(value)
