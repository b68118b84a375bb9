"""Provide deep prompts: learned tokens in the first layers of the text and image encoders.

As in MaPLe (Khattak et al., CVPR 2023) and PromptSRC (Khattak et al., ICCV 2023), the learned tokens of layer
i + 1 replace the outputs of layer i at their positions. Layers after the last learned tokens process the
outputs unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfzsl.utils import distributed
from dfzsl.utils.errors import UserError

from .backbone import Backbone, import_open_clip
from .learner import PromptLearner
from .prompts import Prompts

INIT_STD = 0.02  # of tokens that are not initialized by words


def require_vision_transformer(backbone: Backbone) -> None:
    """Raise UserError unless the image tower is a vision transformer of open_clip."""
    import_open_clip()
    from open_clip.transformer import VisionTransformer

    if not isinstance(tower := backbone.model.visual, VisionTransformer):
        raise UserError(
            f"image prompts need a vision transformer of open_clip, but the image tower of {backbone.name} "
            f"is a {type(tower).__name__}: choose another backbone, e.g. ViT-B/16"
        )


def encode_image(backbone: Backbone, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Encode images with learned tokens, differentiable in the tokens.

    Args:
        backbone: frozen model with a vision transformer.
        images: (n, 3, h, w) images.
        prompts: (M, w) tokens of each of the first layers. They follow the patches, have no position
            embedding and are not pooled.

    Returns:
        (n, d) L2-normalized image features.
    """
    tower = backbone.model.visual
    with backbone.autocast():
        x = tower._embeds(images)
        patches = x.shape[1]
        for layer, block in enumerate(tower.transformer.resblocks):
            if layer < len(prompts):
                tokens = prompts[layer] if layer else tower.ln_pre(prompts[layer])
                x = torch.cat([x[:, :patches], tokens.to(x.dtype).expand(len(x), -1, -1)], dim=1)
            x = block(x)
        pooled, _ = tower._pool(x[:, :patches])
        features = pooled if tower.proj is None else pooled @ tower.proj
    return F.normalize(features.float(), dim=-1)


def init_tokens(layers: int, n: int, width: int) -> nn.ParameterList:
    """Return tokens (n, width) of N(0, INIT_STD^2) for each of `layers` layers."""
    return nn.ParameterList(nn.Parameter(torch.empty(n, width).normal_(std=INIT_STD)) for _ in range(layers))


class DeepPromptLearner(PromptLearner):
    """Learn context tokens in the first layers of the text encoder and of the image encoder.

    Subclasses define `image_prompts`.

    Args:
        backbone: frozen model.
        classnames: C class names.
        n_ctx: M, the number of context tokens. They are initialized by the first M words of `ctx_init`; its
            other words stay fixed ("of a" in "a photo of a cat." for M = 2).
        ctx_init: words, or "" for random initialization.
        depth: number of text layers with learned tokens; all layers where the tower has fewer.

    Raises:
        UserError: `depth` or `ctx_init` does not fit, or the text tower has no shared prefix.
    """

    def __init__(
        self, backbone: Backbone, classnames: Sequence[str], n_ctx: int, ctx_init: str, depth: int
    ) -> None:
        words = ctx_init.replace("_", " ").split()
        if depth < 1:
            raise UserError(f"PROMPT_DEPTH must be at least 1, got {depth}")
        if 0 < len(words) < n_ctx:
            raise UserError(f"CTX_INIT '{ctx_init}' must have at least {n_ctx} words, one per context token")
        self.fixed_words = " ".join(words[n_ctx:])
        super().__init__(backbone, classnames, n_ctx, " ".join(words[:n_ctx]))
        if len(self.ctx) != n_ctx:
            raise UserError(
                f"CTX_INIT '{ctx_init}': the first {n_ctx} words must be {n_ctx} tokens, got {len(self.ctx)}"
            )
        tower = backbone.text_tower
        if not tower.cacheable:
            raise UserError(
                f"deep prompts need a causal text tower with pooling at the end token, and that of "
                f"{backbone.name} differs: choose another backbone, e.g. ViT-B/16"
            )
        self.deep = init_tokens(min(depth, len(tower.blocks)) - 1, n_ctx, tower.width)

    def layout(self, classnames: Sequence[str]) -> Prompts:
        return super().layout(
            [f"{self.fixed_words} {name}" if self.fixed_words else name for name in classnames]
        )

    def image_prompts(self) -> list[Tensor]:
        """Return the tokens (M, w) of each of the first layers of the image encoder."""
        raise NotImplementedError

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images (n, 3, h, w) to L2-normalized features (n, d)."""
        prompts = [
            distributed.sum_gradients(p) if distributed.world_size() > 1 else p for p in self.image_prompts()
        ]
        return distributed.encode_sharded(lambda x: encode_image(self.backbone, x, prompts), images)
