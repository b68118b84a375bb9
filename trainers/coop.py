"""Provide CoOp: prompts whose context vectors are learned.

Zhou, Yang, Loy, Liu, Learning to Prompt for Vision-Language Models, IJCV 2022.
"""

from __future__ import annotations

import torch
from dassl.engine import TRAINER_REGISTRY
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_pretrained_weights
from torch import Tensor, nn
from torch.nn import functional as F

from dfzsl.utils import distributed
from dfzsl.utils.dassl_plugin import add_keys, register

from .base import CLIPTrainer
from .clip.backbone import MAX_CHUNK_TOKENS
from .clip.learner import PromptLearner, require_text_encoder

# torch.compile delays the first step by a minute, which pays on a GPU over thousands of steps.
add_keys("MODEL.BACKBONE", COMPILE=False, ROWS_AT_ONCE=MAX_CHUNK_TOKENS)
add_keys("TRAINER.COOP", N_CTX=16, CSC=False, CTX_INIT="", PREC="fp16", CLASS_TOKEN_POSITION="end")


class PromptedCLIP(nn.Module):
    """CLIP with learned prompts: logits are exp(logit scale) * cos(image feature, text embedding)."""

    def __init__(self, prompt_learner: PromptLearner, logit_scale: float) -> None:
        super().__init__()
        self.prompt_learner = prompt_learner
        self.logit_scale = logit_scale

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (n, C) of L2-normalized image features (n, d)."""
        return self.logit_scale * features @ self.prompt_learner().T


@register(TRAINER_REGISTRY)
class CoOp(CLIPTrainer):
    """Prompt learning with cross-entropy over the classes of the run, on images or features.

    Subclasses override the prompt learner (`build_prompted`) or the loss (`step`).
    """

    recipe = "vit_b16_ep50_ctxv1"
    node = "COOP"
    model: PromptedCLIP

    @property
    def settings(self):
        """The config node of this trainer."""
        return self.cfg.TRAINER[self.node]

    def build_prompted(self) -> PromptedCLIP:
        """Build the prompt learner and the CLIP around it."""
        settings = self.settings
        learner = PromptLearner(
            self.backbone,
            self.classnames,
            settings.N_CTX,
            settings.CTX_INIT,
            settings.CLASS_TOKEN_POSITION,
            settings.CSC,
        )
        return PromptedCLIP(learner, self.backbone.logit_scale)

    def build_model(self) -> None:
        require_text_encoder(self.backbone)
        self.backbone.use_precision(self.settings.PREC)
        self.backbone.compiled = self.cfg.MODEL.BACKBONE.COMPILE
        self.backbone.chunk_tokens = self.cfg.MODEL.BACKBONE.ROWS_AT_ONCE
        self.model = self.build_prompted().to(self.device)
        learner = self.model.prompt_learner
        if self.cfg.MODEL.INIT_WEIGHTS:
            load_pretrained_weights(learner, self.cfg.MODEL.INIT_WEIGHTS)
        self.optim = build_optimizer(learner, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("prompt_learner", learner, self.optim, self.sched)
        # Small gradients underflow in float16, so the loss is scaled up before the backward pass.
        half = self.backbone.precision in ("fp16", "amp")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)

    def forward_backward(self, batch: dict) -> dict[str, float]:
        input, label = self.parse_batch_train(batch)
        summary = self.step(self.image_features(input), label)
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        return summary

    def image_features(self, input: Tensor) -> Tensor:
        """Return L2-normalized features (n, d) of images (n, 3, h, w); features pass through."""
        return distributed.encode_sharded(self.backbone.encode_image, input)

    def step(self, features: Tensor, label: Tensor) -> dict[str, float]:
        """Make one optimizer step.

        Args:
            features: (n, d), L2-normalized.
            label: (n,).

        Returns:
            Values for the log.
        """
        logits = self.model(features)
        loss = F.cross_entropy(logits, label)
        self.update(loss)
        return self.summary(loss, logits, label)

    def update(self, loss: Tensor) -> None:
        """Backpropagate `loss` and update the prompts."""
        self.model_zero_grad()
        self.model_backward(self.scaler.scale(loss))
        self.scaler.step(self.optim)
        self.scaler.update()

    def summary(self, loss: Tensor, logits: Tensor, label: Tensor) -> dict[str, float]:
        """Return loss and accuracy (percent) of a batch for the log."""
        return {"loss": loss.item(), "acc": compute_accuracy(logits, label)[0].item()}

    def model_inference(self, input: Tensor) -> Tensor:
        return self.model(self.backbone.encode_image(input))
