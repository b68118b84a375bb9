"""Provide f-CLSWGAN, a conditional WGAN-GP with a classification loss (Xian et al., CVPR 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.numerics import class_means

from .base import NeuralGenerator, critic_loss, generator, mlp, update


@generator("clswgan")
class CLSWGAN(NeuralGenerator):
    """Conditional WGAN-GP with the cross-entropy of generated features.

        min_G max_D  E D(x, a) - E D(G(z, a), a) - lambda GP + beta CE(G(z, a))

    where CE is the cross-entropy under a softmax classifier that is fitted to the training features.

    Args:
        feature_dim: d, the dimension of features.
        condition_dim: c, the dimension of conditions.
        critic_iter: critic updates per generator update.
        penalty: lambda, the weight of the gradient penalty.
        class_weight: beta, the weight of the cross-entropy.
        settings: see `NeuralGenerator`.
    """

    def __init__(
        self,
        feature_dim: int,
        condition_dim: int,
        *,
        critic_iter: int = 5,
        penalty: float = 10.0,
        class_weight: float = 0.01,
        **settings: Any,
    ) -> None:
        options: dict[str, Any] = {
            "critic_iter": critic_iter,
            "penalty": penalty,
            "class_weight": class_weight,
        }
        super().__init__(feature_dim, condition_dim, **settings, **options)
        self.critic_iter, self.penalty, self.class_weight = critic_iter, penalty, class_weight
        self.generator = mlp(self.latent + condition_dim, self.hidden, feature_dim)
        self.critic = mlp(feature_dim + condition_dim, self.hidden, 1)

    def start(self, x: Tensor, y: Tensor, a: Tensor, rng: torch.Generator) -> None:
        self.optimizer = self.adam(self.generator)
        self.critic_optimizer = self.adam(self.critic)
        # Naive Bayes with a shared spherical covariance is a softmax classifier in closed form. Held-out
        # classes have no mean; their weights are zero.
        means = class_means(x, y, len(a))
        variance = (x - means[y]).square().mean().clamp(min=1e-6)
        self.classifier = (means / variance, -0.5 * means.square().sum(1) / variance)
        self.conditions = a

    def step(self, batches: Callable[[], tuple[Tensor, Tensor]], rng: torch.Generator) -> Tensor:
        for _ in range(self.critic_iter):
            x, a = batches()
            with torch.no_grad():
                fake = self.generate(a, rng)
            update(critic_loss(self.critic, x, fake, a, self.penalty, rng), self.critic_optimizer)
        _, a = batches()
        fake = self.generate(a, rng)
        weight, bias = self.classifier
        label = torch.cdist(a, self.conditions).argmin(1)
        loss = -self.critic(torch.cat([fake, a], 1)).mean()
        loss = loss + self.class_weight * F.cross_entropy(fake @ weight.T + bias, label)
        return update(loss, self.optimizer)

    def generate(self, a: Tensor, rng: torch.Generator) -> Tensor:
        z = torch.randn(len(a), self.latent, device=a.device, generator=rng)
        return self.generator(torch.cat([z, a], 1))
