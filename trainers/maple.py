"""Provide MaPLe: prompts in the first layers of both encoders, image prompts mapped from text prompts.

Khattak, Rasheed, Maaz, Khan, Khan, MaPLe: Multi-modal Prompt Learning, CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

from dassl.engine import TRAINER_REGISTRY
from torch import Tensor, nn

from dfzsl.datasets.features import FeatureDatum
from dfzsl.utils.dassl_plugin import add_keys, register
from dfzsl.utils.errors import UserError

from .clip.backbone import Backbone
from .clip.deep import DeepPromptLearner, require_vision_transformer
from .clip.learner import require_text_encoder
from .coop import CoOp, PromptedCLIP

add_keys("TRAINER.MAPLE", N_CTX=2, CTX_INIT="a photo of a", PREC="fp16", PROMPT_DEPTH=9)


class CoupledPromptLearner(DeepPromptLearner):
    """Image prompts F_i(P_i), where F_i is a linear map of the text prompts P_i of layer i."""

    def __init__(
        self, backbone: Backbone, classnames: Sequence[str], n_ctx: int, ctx_init: str, depth: int
    ) -> None:
        blocks = backbone.model.visual.transformer.resblocks
        super().__init__(backbone, classnames, n_ctx, ctx_init, min(depth, len(blocks)))
        width = backbone.model.visual.class_embedding.shape[-1]
        self.couplings = nn.ModuleList(nn.Linear(p.shape[-1], width) for p in (self.ctx, *self.deep))

    def image_prompts(self) -> list[Tensor]:
        """Return the image prompts of each layer."""
        return [f(p) for f, p in zip(self.couplings, (self.ctx, *self.deep), strict=True)]


@register(TRAINER_REGISTRY)
class MaPLe(CoOp):
    """Prompt learning in both encoders with cross-entropy, on images. Features change, so none are cached.

    Subclasses override the prompt learner (`build_learner`) or the loss (`step`).
    """

    recipe = "vit_b16_c2_ep5_batch4_2ctx"
    node = "MAPLE"
    image_prompts = True
    learner: DeepPromptLearner

    def check_cfg(self, cfg) -> None:
        if cfg.TEACHER.FILE:
            name = type(self).__name__
            raise UserError(f"{name} learns inside the image encoder, from images: set TEACHER.FILE ''")

    def _feature_loader(self, datums: list):
        """Return Dassl's loader of images, since features change with the prompts."""
        return self.dm.val_loader if datums is self.dm.dataset.val else self.dm.test_loader

    def _train_loader(self):
        return self.dm.train_loader_x

    def build_learner(self) -> DeepPromptLearner:
        """Build the prompt learner."""
        settings = self.settings
        return CoupledPromptLearner(
            self.backbone, self.classnames, settings.N_CTX, settings.CTX_INIT, settings.PROMPT_DEPTH
        )

    def build_prompted(self) -> PromptedCLIP:
        self.learner = self.build_learner()
        return PromptedCLIP(self.learner, self.backbone.logit_scale)

    def build_model(self) -> None:
        require_text_encoder(self.backbone)
        require_vision_transformer(self.backbone)
        if isinstance(self.dm.dataset.test[0], FeatureDatum):
            raise UserError(
                f"{type(self).__name__} learns inside the image encoder: it needs images, not features"
            )
        super().build_model()

    def image_features(self, input: Tensor) -> Tensor:
        return self.learner.encode_image(input)

    def model_inference(self, input: Tensor) -> Tensor:
        return self.model(self.image_features(input))
