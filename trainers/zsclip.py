"""Provide zero-shot CLIP, whose class weights are text embeddings, with one prompt or a prompt ensemble.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021.
"""

from __future__ import annotations

import torch
from dassl.engine import TRAINER_REGISTRY

from dfzsl.utils.dassl_plugin import register

from .base import CLIPTrainer


@register(TRAINER_REGISTRY)
class ZeroshotCLIP(CLIPTrainer):
    """Zero-shot classification with TEXT.PROMPTS, or the data set's template."""

    recipe = "vit_b16"
    trains = False

    def build_model(self) -> None:
        self.text_features = self.text_of(self.classnames)

    def model_inference(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits (n, C) of images or L2-normalized features, exp(logit scale) * cosine."""
        features = self.backbone.encode_image(input)
        return self.backbone.logit_scale * features @ self.text_features.to(features).T


@register(TRAINER_REGISTRY)
class ZeroshotCLIP2(ZeroshotCLIP):
    """Prompt ensembling: the L2-normalized mean text embedding over a set of templates."""

    def text_of(self, classnames: list[str]) -> torch.Tensor:
        return self.backbone.class_features(classnames, self.dm.dataset.templates)
