"""Provide ProGrad: CoOp whose gradient never opposes that of distillation from zero-shot CLIP.

Zhu, Niu, Han, Wu, Zhang, Prompt-aligned Gradient for Prompt Tuning, ICCV 2023.
"""

from __future__ import annotations

import torch
from dassl.engine import TRAINER_REGISTRY
from torch import Tensor
from torch.nn import functional as F

from dfzsl.utils.dassl_plugin import add_keys, register

from .coop import CoOp

add_keys("LOSS", LAMBDA=1.0, T=1.0)


@register(TRAINER_REGISTRY)
class ProGrad(CoOp):
    """CoOp with projected gradients.

    LAMBDA times the projection on the gradient of the distillation loss (temperature T, zero-shot CLIP as
    teacher) is subtracted from the gradient of the cross-entropy if their scalar product is negative.
    """

    recipe = "vit_b16_ep100_ctxv1"

    def build_model(self) -> None:
        self.fixed_text = self.text_of(self.classnames)
        super().build_model()

    def step(self, features: Tensor, label: Tensor) -> dict[str, float]:
        T = self.cfg.LOSS.T
        logits = self.model(features)
        loss = F.cross_entropy(logits, label)
        zero_shot = (self.model.logit_scale * features @ self.fixed_text.T / T).softmax(1)
        distillation = T * T * F.cross_entropy(logits / T, zero_shot)
        self.model_zero_grad()
        parameters = list(self.model.prompt_learner.parameters())
        general = torch.autograd.grad(self.scaler.scale(distillation), parameters, retain_graph=True)
        self.model_backward(self.scaler.scale(loss))
        for parameter, direction in zip(parameters, general, strict=True):
            assert parameter.grad is not None
            parameter.grad = project(parameter.grad, direction, self.cfg.LOSS.LAMBDA)
        self.scaler.step(self.optim)
        self.scaler.update()
        return self.summary(loss, logits, label)


def project(gradient: Tensor, general: Tensor, strength: float) -> Tensor:
    """Subtract `strength` times the projection on `general` if the scalar product is negative."""
    along = F.normalize(general.flatten(), dim=0).view_as(general)
    return gradient - strength * (gradient * along).sum().clamp(max=0) * along
