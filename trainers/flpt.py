"""Provide FLPT (stage 2): tune prompts on virtual features; one context moves text and image features.

Tang et al., Data-Free Generalized Zero-Shot Learning, AAAI 2024.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
from dassl.engine import TRAINER_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from dfzsl.utils.dassl_plugin import add_keys, register
from dfzsl.utils.numerics import check_unit_rows

from .clip.aligned_text import AlignedText
from .clip.class_prompts import ClassPrompts
from .clip.learner import PromptLearner
from .coop import CoOp, PromptedCLIP

add_keys("TRAINER.FLPT", N_CTX=4, CTX_INIT="a photo of a", PREC="fp16", RESIDUAL_WEIGHT=0.005)


class QuickGELU(nn.Module):
    """The activation function of CLIP, x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class FeatureLanguagePromptLearner(PromptLearner):
    """CoOp's shared context v_1 .. v_M, and the shift r * mean_m MLP(v_m) of image features.

    The MLP has layers w -> 4w -> d. The last layer is initialized with zeros, so training starts from CLIP.
    """

    def __init__(self, backbone, classnames, n_ctx: int, ctx_init: str, residual_weight: float) -> None:
        super().__init__(backbone, classnames, n_ctx, ctx_init)
        width = self.ctx.shape[-1]
        last = nn.Linear(4 * width, backbone.dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", last)]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.residual_weight = residual_weight

    def shift(self) -> Tensor:
        """Return the shift (d,), the same for every image."""
        return self.residual_weight * self.mlp(self.ctx).mean(0)


class ShiftedCLIP(PromptedCLIP):
    """CLIP that shifts image features and normalizes them again.

    Attributes:
        text_offset: (C, d), added to the text embeddings (see `ClassPrompts.text_offset`), or None.
    """

    prompt_learner: FeatureLanguagePromptLearner
    text_offset: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        features = F.normalize(features + self.prompt_learner.shift(), dim=-1)
        if self.text_offset is None:
            return super().forward(features)
        return self.logit_scale * features @ F.normalize(self.prompt_learner() + self.text_offset, dim=-1).T


@register(TRAINER_REGISTRY)
class FLPT(CoOp):
    """Prompt tuning with cross-entropy over base classes of exp(logit scale) * cos(x + shift, t_c)."""

    recipe = "vit_b16"
    node = "FLPT"
    model: ShiftedCLIP

    def build_prompted(self) -> ShiftedCLIP:
        settings = self.cfg.TRAINER.FLPT
        learner = FeatureLanguagePromptLearner(
            self.backbone, self.classnames, settings.N_CTX, settings.CTX_INIT, settings.RESIDUAL_WEIGHT
        )
        model = ShiftedCLIP(learner, self.backbone.logit_scale)
        model.text_offset = self.tuned_prompts(learner).text_offset(self.backbone, self.classnames)
        return model

    def tuned_prompts(self, learner: FeatureLanguagePromptLearner) -> ClassPrompts:
        """Return the class prompts with the tuned context, for base and new classes."""
        return replace(self.texts, context=learner.ctx.detach(), context_init=self.cfg.TRAINER.FLPT.CTX_INIT)

    @torch.no_grad()
    def text_features(self, classnames: Sequence[str]) -> Tensor:
        """Return L2-normalized text embeddings (n, d) of base or new classes in the tuned context."""
        return self.tuned_prompts(self.model.prompt_learner).features(self.backbone, classnames)

    @torch.no_grad()
    def shift(self) -> Tensor:
        """Return the tuned shift (d,) of image features."""
        return self.model.prompt_learner.shift()

    def aligned_text(self, new_classnames: Sequence[str]) -> AlignedText:
        """Return the result of stage 2 for the base classes of this run and for new classes."""
        self.set_model_mode("eval")
        base, new = (
            check_unit_rows(self.text_features(names).detach(), "stage 2 (FLPT)", "tuned text feature", names)
            if names
            else torch.empty(0, self.backbone.dim, device=self.device)
            for names in (self.classnames, list(new_classnames))
        )
        return AlignedText(
            base,
            new,
            list(new_classnames),
            shift=self.shift().detach(),
            prompts=self.tuned_prompts(self.model.prompt_learner),
            backbone=self.backbone.name,
            weights=self.backbone.weights_id,
            epochs=self.max_epoch,
            note=self.text_note,
        )
