"""What MixStyle and EFDMix share: when features are mixed, with whose, and how much."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Mixing(nn.Module):
    """With probability `p`, in training and while active: mix each image's features with another's.

    The share lambda of its own is drawn from Beta(alpha, alpha) for each image. mix: "random", the partner is
    any image of the batch; "crossdomain", the batch is of two halves and the partner is of the other one.
    """

    def __init__(self, p: float = 0.5, alpha: float = 0.1, eps: float = 1e-6, mix: str = "random") -> None:
        super().__init__()
        self.p = p
        self.alpha = alpha
        self.eps = eps
        self.mix = mix
        self.beta = torch.distributions.Beta(alpha, alpha)
        self._activated = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}(p={self.p}, alpha={self.alpha}, eps={self.eps}, mix={self.mix})"

    def set_activation_status(self, status: bool = True) -> None:
        self._activated = status

    def update_mix_method(self, mix: str = "random") -> None:
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W). Raises NotImplementedError for an unknown `mix`."""
        if not self.training or not self._activated or random.random() > self.p:
            return x
        share = self.beta.sample((len(x), 1, 1, 1)).to(x.device)
        return self.mixed(x, share, self._partners(len(x)))

    def _partners(self, count: int) -> Tensor:
        if self.mix == "random":
            return torch.randperm(count)
        if self.mix != "crossdomain":
            raise NotImplementedError(f"mix must be random or crossdomain, got {self.mix}")
        halves = torch.arange(count - 1, -1, -1).chunk(2)
        return torch.cat([half[torch.randperm(len(half))] for half in halves])

    def mixed(self, x: Tensor, share: Tensor, partners: Tensor) -> Tensor:
        """x, (B, 1, 1, 1) of its own share and (B,) places of the partners."""
        raise NotImplementedError


def activate(model: nn.Module, kind: type[Mixing], status: bool) -> None:
    """Switch all modules of a kind on or off."""
    for module in model.modules():
        if type(module) is kind:
            module.set_activation_status(status)


def choose(model: nn.Module, kind: type[Mixing], mix: str) -> None:
    """Say with whose features those of a kind mix."""
    for module in model.modules():
        if type(module) is kind:
            module.update_mix_method(mix)


@contextlib.contextmanager
def switched(model: nn.Module, kind: type[Mixing], status: bool) -> Iterator[None]:
    """On or off within the block, the other way round after it."""
    try:
        activate(model, kind, status)
        yield
    finally:
        activate(model, kind, not status)
