"""Provide PromptSRC: prompts in both encoders, regularized towards CLIP and averaged over training.

Khattak, Wasim, Naseer, Khan, Yang, Khan, Self-regulating Prompts: Foundational Model Adaptation without
Forgetting, ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dassl.engine import TRAINER_REGISTRY
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dfzsl.utils import distributed
from dfzsl.utils.dassl_plugin import add_keys, register

from .clip.backbone import Backbone
from .clip.class_prompts import ENSEMBLE, ClassPrompts
from .clip.deep import DeepPromptLearner, init_tokens
from .maple import MaPLe

add_keys(
    "TRAINER.PROMPTSRC",
    N_CTX_VISION=4,
    N_CTX_TEXT=4,
    CTX_INIT="a photo of a",
    PREC="fp16",
    PROMPT_DEPTH_VISION=9,
    PROMPT_DEPTH_TEXT=9,
    TEXT_LOSS_WEIGHT=25,
    IMAGE_LOSS_WEIGHT=10,
    GPA_MEAN=15,
    GPA_STD=1,
)


class IndependentPromptLearner(DeepPromptLearner):
    """Independent text and image prompts, and their weighted sum over epochs.

    The sum is a buffer of the module, so a resumed run continues it.
    """

    aggregate: Tensor

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        n_ctx: int,
        ctx_init: str,
        depth: int,
        n_ctx_vision: int,
        depth_vision: int,
    ) -> None:
        super().__init__(backbone, classnames, n_ctx, ctx_init, depth)
        tower = backbone.model.visual
        layers = min(depth_vision, len(tower.transformer.resblocks))
        self.image_ctx = init_tokens(layers, n_ctx_vision, tower.class_embedding.shape[-1])
        self.register_buffer("aggregate", torch.zeros(sum(p.numel() for p in self.parameters())))

    def image_prompts(self) -> list[Tensor]:
        """Return the image prompts of each layer."""
        return list(self.image_ctx)

    @torch.no_grad()
    def accumulate(self, weight: float) -> None:
        """Add `weight` times the current prompts to the sum."""
        self.aggregate += weight * parameters_to_vector(self.parameters())

    @torch.no_grad()
    def load_average(self) -> None:
        """Replace the prompts by the sum."""
        vector_to_parameters(self.aggregate, self.parameters())


@register(TRAINER_REGISTRY)
class PromptSRC(MaPLe):
    """Prompt learning with self-regularization.

    The loss is cross-entropy + TEXT_LOSS_WEIGHT |g - g_CLIP| + IMAGE_LOSS_WEIGHT |f - f_CLIP| +
    KL(p_CLIP || p), each term a mean over all entries. CLIP's text embeddings g_CLIP use TEXT.PROMPTS, by
    default an ensemble of templates. After the last epoch the prompts are replaced by their Gaussian-weighted
    mean over epochs.
    """

    recipe = "vit_b16_c4_ep20_batch4"
    node = "PROMPTSRC"
    learner: IndependentPromptLearner

    def build_learner(self) -> IndependentPromptLearner:
        settings = self.settings
        return IndependentPromptLearner(
            self.backbone,
            self.classnames,
            settings.N_CTX_TEXT,
            settings.CTX_INIT,
            settings.PROMPT_DEPTH_TEXT,
            settings.N_CTX_VISION,
            settings.PROMPT_DEPTH_VISION,
        )

    def build_model(self) -> None:
        super().build_model()
        texts = ClassPrompts.parse(self.cfg.TEXT.PROMPTS or ENSEMBLE)
        self.fixed_text = texts.features(self.backbone, self.classnames)
        epochs = torch.arange(1, self.max_epoch + 1, dtype=torch.float64)
        deviations = (epochs - self.settings.GPA_MEAN) / self.settings.GPA_STD
        self.weights = (-0.5 * deviations.square()).softmax(0).tolist()

    def forward_backward(self, batch: dict) -> dict[str, float]:
        images, _ = self.parse_batch_train(batch)
        self.fixed_image = distributed.encode_sharded(self.backbone.encode_image, images)
        return super().forward_backward(batch)

    def step(self, features: Tensor, label: Tensor) -> dict[str, float]:
        text, scale = self.model.prompt_learner(), self.model.logit_scale
        logits = scale * features @ text.T
        log_p = logits.log_softmax(1)
        log_q = (scale * self.fixed_image @ self.fixed_text.T).log_softmax(1)
        loss = (
            F.cross_entropy(logits, label)
            + self.settings.TEXT_LOSS_WEIGHT * F.l1_loss(text, self.fixed_text)
            + self.settings.IMAGE_LOSS_WEIGHT * F.l1_loss(features, self.fixed_image)
            + F.kl_div(log_p, log_q, reduction="none", log_target=True).mean()
        )
        self.update(loss)
        return self.summary(loss, logits, label)

    def after_epoch(self) -> None:
        self.learner.accumulate(self.weights[self.epoch])
        if self.epoch + 1 == self.max_epoch:
            self.learner.load_average()
        super().after_epoch()
