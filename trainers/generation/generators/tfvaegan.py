"""Provide TF-VAEGAN, a VAE-GAN with semantic decoder and latent feedback (Narayan et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import NeuralGenerator, critic_loss, generator, linear, mlp, update
from .cvae import encode


@generator("tfvaegan")
class TFVAEGAN(NeuralGenerator):
    """VAE-GAN of encoder E, generator G, critic D (WGAN-GP), decoder Dec (feature to condition), feedback F.

    Each step runs `feedback_loop` passes. In the first, x = G(z, a). In the second, strength *
    F(h) is added to the hidden layer of G, where h are the hidden units of Dec for x = G(z, a). Losses:

        D    gamma_d (E D(fake) - E D(real) + penalty GP)
        G    |x - x_vae|^2 + KL - gamma_g E D(fake) + recons_weight |Dec(fake) - a|_1
        Dec  recons_weight |Dec(x) - a|_1 on training features (and, unless `freeze_dec`, on generated ones)

    The defaults are those of the paper (the released settings of DFZSL).

    Args:
        feature_dim: d, the dimension of features.
        condition_dim: c, the dimension of conditions.
        critic_iter: critic updates per generator update.
        penalty: weight of the gradient penalty.
        gamma_d: weight of the critic loss.
        gamma_g: weight of the adversarial loss of the generator.
        recons_weight: weight of the decoder loss.
        feed_lr: learning rate of the feedback network.
        dec_lr: learning rate of the decoder.
        freeze_dec: whether the decoder does not learn from generated features.
        feedback_loop: passes per step.
        a1: feedback strength in training.
        a2: feedback strength in sampling.
        settings: see `NeuralGenerator`.
    """

    def __init__(
        self,
        feature_dim: int,
        condition_dim: int,
        *,
        critic_iter: int = 5,
        penalty: float = 10.0,
        gamma_d: float = 10.0,
        gamma_g: float = 10.0,
        recons_weight: float = 0.1,
        feed_lr: float = 7e-4,
        dec_lr: float = 5e-4,
        freeze_dec: bool = True,
        feedback_loop: int = 2,
        a1: float = 0.01,
        a2: float = 0.01,
        **settings: Any,
    ) -> None:
        options: dict[str, Any] = {
            "critic_iter": critic_iter,
            "penalty": penalty,
            "gamma_d": gamma_d,
            "gamma_g": gamma_g,
            "recons_weight": recons_weight,
            "feed_lr": feed_lr,
            "dec_lr": dec_lr,
            "freeze_dec": freeze_dec,
            "feedback_loop": feedback_loop,
            "a1": a1,
            "a2": a2,
        }
        super().__init__(feature_dim, condition_dim, **settings, **options)
        self.critic_iter, self.penalty, self.gamma_d, self.gamma_g = critic_iter, penalty, gamma_d, gamma_g
        self.recons_weight, self.feed_lr, self.dec_lr = recons_weight, feed_lr, dec_lr
        self.freeze_dec, self.feedback_loop, self.a1, self.a2 = freeze_dec, feedback_loop, a1, a2
        self.encoder = mlp(feature_dim + condition_dim, self.hidden, 2 * self.latent)
        self.generator_in = linear(self.latent + condition_dim, self.hidden)
        self.generator_out = linear(self.hidden, feature_dim)
        self.critic = mlp(feature_dim + condition_dim, self.hidden, 1)
        self.decoder = mlp(feature_dim, self.hidden, condition_dim)
        self.feedback = nn.Sequential(mlp(self.hidden, self.hidden, self.hidden), nn.LeakyReLU(0.2))

    def start(self, x: Tensor, y: Tensor, a: Tensor, rng: torch.Generator) -> None:
        self.optimizer = self.adam(self.encoder, self.generator_in, self.generator_out)
        self.critic_optimizer = self.adam(self.critic)
        self.decoder_optimizer = self.adam(self.decoder, lr=self.dec_lr)
        self.feedback_optimizer = self.adam(self.feedback, lr=self.feed_lr)

    def step(self, batches: Callable[[], tuple[Tensor, Tensor]], rng: torch.Generator) -> Tensor:
        loss = torch.zeros(())
        for loop in range(self.feedback_loop):
            loss = self._pass(batches, rng, self.a1 if loop else 0.0)
        return loss

    def _pass(
        self, batches: Callable[[], tuple[Tensor, Tensor]], rng: torch.Generator, strength: float
    ) -> Tensor:
        """Update the critic, then the other networks, with one strength of the feedback."""
        for _ in range(self.critic_iter):
            x, a = batches()
            update(self.recons_weight * F.l1_loss(self.decoder(x), a), self.decoder_optimizer)
            with torch.no_grad():
                fake = self._decode(self._noise(a, rng), a, strength)
            loss = critic_loss(self.critic, x, fake, a, self.penalty, rng)
            update(self.gamma_d * loss, self.critic_optimizer)
        x, a = batches()
        z, divergence = encode(self.encoder, x, a, rng)
        reconstruction, fake = self._decode(
            torch.cat([z, self._noise(a, rng)]), a.repeat(2, 1), strength
        ).chunk(2)
        loss = (reconstruction - x).square().sum(1).mean() + divergence
        loss = loss - self.gamma_g * self.critic(torch.cat([fake, a], 1)).mean()
        loss = loss + self.recons_weight * F.l1_loss(self.decoder(fake), a)
        optimizers = [self.optimizer]
        if strength:
            optimizers.append(self.feedback_optimizer)
        if not self.freeze_dec:
            optimizers.append(self.decoder_optimizer)
        return update(loss, *optimizers)

    def _noise(self, a: Tensor, rng: torch.Generator) -> Tensor:
        return torch.randn(len(a), self.latent, device=a.device, generator=rng)

    def _decode(self, z: Tensor, a: Tensor, strength: float) -> Tensor:
        hidden = F.leaky_relu(self.generator_in(torch.cat([z, a], 1)), 0.2)
        x = self.generator_out(hidden)
        if not strength:
            return x
        decoder_hidden = self.decoder[1](self.decoder[0](x))
        return self.generator_out(hidden + strength * self.feedback(decoder_hidden))

    def generate(self, a: Tensor, rng: torch.Generator) -> Tensor:
        return self._decode(self._noise(a, rng), a, self.a2 if self.feedback_loop > 1 else 0.0)
