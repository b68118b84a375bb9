"""Random numbers for tests of mathematics: a stream of a seed's own, and directions drawn from it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(x: torch.Tensor) -> torch.Tensor:
    """The rows of x at length 1."""
    return F.normalize(x, dim=-1)


def directions(*shape: int, seed: int = 0) -> torch.Tensor:
    """Unit rows, uniform on the sphere."""
    return unit(torch.randn(*shape, generator=rng(seed)))
