"""Provide CoCoOp: prompts whose context depends on the image.

Zhou, Yang, Loy, Liu, Conditional Prompt Learning for Vision-Language Models, CVPR 2022.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from dassl.engine import TRAINER_REGISTRY
from torch import Tensor, nn

from dfzsl.utils.dassl_plugin import add_keys, register

from .clip.learner import PromptLearner
from .coop import CoOp, PromptedCLIP

add_keys("TRAINER.COCOOP", N_CTX=16, CTX_INIT="", PREC="fp16")


class ConditionalPromptLearner(PromptLearner):
    """Context vectors v_m + MLP(x): the same shift for every token, from an MLP with d / 16 hidden units."""

    def __init__(self, backbone, classnames, n_ctx: int = 16, ctx_init: str = "") -> None:
        super().__init__(backbone, classnames, n_ctx, ctx_init)
        d, width = backbone.dim, self.ctx.shape[-1]
        layers = [
            ("linear1", nn.Linear(d, d // 16)),
            ("relu", nn.ReLU()),
            ("linear2", nn.Linear(d // 16, width)),
        ]
        self.meta_net = nn.Sequential(OrderedDict(layers))

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        """Return text embeddings (n, C, d) for image features (n, d): one set of prompts per image."""
        return self.prompts.encode(self.ctx + self.meta_net(features)[:, None])


class ConditionalCLIP(PromptedCLIP):
    """CLIP that compares each image with the text embeddings of its own prompts."""

    def forward(self, features: Tensor) -> Tensor:
        return self.logit_scale * torch.einsum("nd,ncd->nc", features, self.prompt_learner(features))


@register(TRAINER_REGISTRY)
class CoCoOp(CoOp):
    """CoOp with image-conditional prompts, for any batch size."""

    recipe = "vit_b16_c4_ep10_batch1_ctxv1"
    node = "COCOOP"

    def build_prompted(self) -> ConditionalCLIP:
        settings = self.settings
        learner = ConditionalPromptLearner(self.backbone, self.classnames, settings.N_CTX, settings.CTX_INIT)
        return ConditionalCLIP(learner, self.backbone.logit_scale)
