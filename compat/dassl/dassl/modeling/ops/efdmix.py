"""EFDMix: distributions of features mixed between images."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from . import mixing

__all__ = [
    "EFDMix",
    "activate_efdmix",
    "crossdomain_efdmix",
    "deactivate_efdmix",
    "random_efdmix",
    "run_with_efdmix",
    "run_without_efdmix",
]


class EFDMix(mixing.Mixing):
    """Each channel's values move towards another image's of the same rank (Zhang et al., Exact feature
    distribution matching for arbitrary style transfer and domain generalization, CVPR 2022).
    """

    def mixed(self, x: Tensor, share: Tensor, partners: Tensor) -> Tensor:
        values = x.flatten(2)
        ordered, places = values.sort(dim=-1)
        others = ordered[partners].gather(-1, places.argsort(-1))
        return (values + (others - values.detach()) * (1 - share[..., 0])).view_as(x)


def activate_efdmix(m: nn.Module) -> None:
    mixing.activate(m, EFDMix, True)


def deactivate_efdmix(m: nn.Module) -> None:
    mixing.activate(m, EFDMix, False)


def random_efdmix(m: nn.Module) -> None:
    mixing.choose(m, EFDMix, "random")


def crossdomain_efdmix(m: nn.Module) -> None:
    mixing.choose(m, EFDMix, "crossdomain")


def run_without_efdmix(model: nn.Module) -> AbstractContextManager[None]:
    """Off within the block, on after it."""
    return mixing.switched(model, EFDMix, False)


def run_with_efdmix(model: nn.Module, mix: str | None = None) -> AbstractContextManager[None]:
    """On within the block, with the way of mixing if given; off after it."""
    if mix in ("random", "crossdomain"):
        mixing.choose(model, EFDMix, mix)
    return mixing.switched(model, EFDMix, True)
