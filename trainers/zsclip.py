"""Zero-shot CLIP: the class's prompt is its classifier row, nothing is trained.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021.
"""

from __future__ import annotations

import torch
from dassl.engine import TRAINER_REGISTRY

from dfzsl.toolbox import register

from .base import CLIPTrainer


@register(TRAINER_REGISTRY)
class ZeroshotCLIP(CLIPTrainer):
    """Cosine to the text feature of the data set's prompt, such as "a photo of a {}, a type of pet."."""

    recipe = "vit_b16"
    trains = False

    def prompt_templates(self) -> list[str]:
        return [self.template]

    def build_model(self) -> None:
        self.text_features = self.backbone.class_features(self.classnames, self.prompt_templates())

    def model_inference(self, input: torch.Tensor) -> torch.Tensor:
        """Logits (n, C) of images or unit features: exp(logit scale) * cosine."""
        features = self.backbone.encode_image(input)
        return self.backbone.logit_scale * features @ self.text_features.to(features).T


@register(TRAINER_REGISTRY)
class ZeroshotCLIP2(ZeroshotCLIP):
    """Prompt ensembling: the normalised mean text feature over a set of templates."""

    def prompt_templates(self) -> list[str]:
        return self.dm.dataset.templates
