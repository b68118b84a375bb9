"""Zero-shot CLIP: the class's prompt is its classifier row, nothing is trained.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021.
"""

from __future__ import annotations

import torch
from dassl.engine import TRAINER_REGISTRY

from dfzsl.utils.dassl_plugin import register

from .base import CLIPTrainer


@register(TRAINER_REGISTRY)
class ZeroshotCLIP(CLIPTrainer):
    """Cosine to the text feature of TEXT.PROMPTS or the data set's "a photo of a {}, a type of pet."."""

    recipe = "vit_b16"
    trains = False

    def build_model(self) -> None:
        self.text_features = self.text_of(self.classnames)

    def model_inference(self, input: torch.Tensor) -> torch.Tensor:
        """Logits (n, C) of images or unit features: exp(logit scale) * cosine."""
        features = self.backbone.encode_image(input)
        return self.backbone.logit_scale * features @ self.text_features.to(features).T


@register(TRAINER_REGISTRY)
class ZeroshotCLIP2(ZeroshotCLIP):
    """Prompt ensembling: the normalised mean text feature over a set of templates."""

    def text_of(self, classnames: list[str]) -> torch.Tensor:
        return self.backbone.class_features(classnames, self.dm.dataset.templates)
