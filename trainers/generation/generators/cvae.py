"""Provide a conditional variational autoencoder, x = G(z, a) with z ~ N(0, I) (Sohn et al., 2015)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import NeuralGenerator, generator, mlp, update


@generator("cvae")
class ConditionalVAE(NeuralGenerator):
    """Conditional VAE, which minimizes |x - G(z, a)|^2 + KL(q(z | x, a) || N(0, I)).

    q is a Gaussian with a diagonal covariance. Training without an adversary is stable, so that the default
    learning rate is larger than that of the adversarial generators.

    Args:
        feature_dim: d, the dimension of features.
        condition_dim: c, the dimension of conditions.
        lr: learning rate of Adam.
        settings: see `NeuralGenerator`.
    """

    def __init__(self, feature_dim: int, condition_dim: int, *, lr: float = 3e-4, **settings: Any) -> None:
        super().__init__(feature_dim, condition_dim, lr=lr, **settings)
        self.encoder = mlp(feature_dim + condition_dim, self.hidden, 2 * self.latent)
        self.decoder = mlp(self.latent + condition_dim, self.hidden, feature_dim)

    def start(self, x: Tensor, y: Tensor, a: Tensor, rng: torch.Generator) -> None:
        self.optimizer = self.adam(self.encoder, self.decoder)

    def step(self, batches: Callable[[], tuple[Tensor, Tensor]], rng: torch.Generator) -> Tensor:
        x, a = batches()
        z, divergence = encode(self.encoder, x, a, rng)
        reconstruction = self.decoder(torch.cat([z, a], 1))
        return update((reconstruction - x).square().sum(1).mean() + divergence, self.optimizer)

    def generate(self, a: Tensor, rng: torch.Generator) -> Tensor:
        z = torch.randn(len(a), self.latent, device=a.device, generator=rng)
        return self.decoder(torch.cat([z, a], 1))


def encode(encoder: torch.nn.Module, x: Tensor, a: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw z (n, latent) from q(z | x, a); return z and the mean of KL(q || N(0, I)) over the batch."""
    mean, log_variance = encoder(torch.cat([x, a], 1)).chunk(2, 1)
    z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, device=x.device, generator=rng)
    return z, 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
