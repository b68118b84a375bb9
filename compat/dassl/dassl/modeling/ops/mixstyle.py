"""MixStyle: statistics of features mixed between images."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from . import mixing

__all__ = [
    "MixStyle",
    "activate_mixstyle",
    "crossdomain_mixstyle",
    "deactivate_mixstyle",
    "random_mixstyle",
    "run_with_mixstyle",
    "run_without_mixstyle",
]


class MixStyle(mixing.Mixing):
    """The mean and deviation of each channel become those of a mix of two images' (Zhou et al., Domain
    generalization with MixStyle, ICLR 2021). No gradient flows through the statistics.
    """

    def mixed(self, x: Tensor, share: Tensor, partners: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True).detach()
        deviation = (x.var((2, 3), keepdim=True) + self.eps).sqrt().detach()
        mean_mixed, deviation_mixed = (s * share + s[partners] * (1 - share) for s in (mean, deviation))
        return (x - mean) / deviation * deviation_mixed + mean_mixed


def activate_mixstyle(m: nn.Module) -> None:
    mixing.activate(m, MixStyle, True)


def deactivate_mixstyle(m: nn.Module) -> None:
    mixing.activate(m, MixStyle, False)


def random_mixstyle(m: nn.Module) -> None:
    mixing.choose(m, MixStyle, "random")


def crossdomain_mixstyle(m: nn.Module) -> None:
    mixing.choose(m, MixStyle, "crossdomain")


def run_without_mixstyle(model: nn.Module) -> AbstractContextManager[None]:
    """Off within the block, on after it."""
    return mixing.switched(model, MixStyle, False)


def run_with_mixstyle(model: nn.Module, mix: str | None = None) -> AbstractContextManager[None]:
    """On within the block, with the way of mixing if given; off after it."""
    if mix in ("random", "crossdomain"):
        mixing.choose(model, MixStyle, mix)
    return mixing.switched(model, MixStyle, True)
