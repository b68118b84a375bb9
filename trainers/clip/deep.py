"""Deep prompts: learned tokens in the first layers of both encoders.

As in Khattak et al., MaPLe, CVPR 2023, and PromptSRC, ICCV 2023: the tokens of layer i + 1 take the places of
what layer i made of its own; the outputs of the last learned ones go on through the layers behind.
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

STD = 0.02  # of tokens that start from no word


def require_vision_transformer(backbone: Backbone) -> None:
    """Raise UserError unless the image tower is open_clip's own vision transformer."""
    import_open_clip()
    from open_clip.transformer import VisionTransformer

    if not isinstance(tower := backbone.model.visual, VisionTransformer):
        raise UserError(
            f"image prompts need open_clip's own vision transformer, and the image tower of {backbone.name} "
            f"is a {type(tower).__name__}: choose a backbone such as ViT-B/16"
        )


def encode_image(backbone: Backbone, pictures: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Unit image features (n, d) of pictures (n, 3, h, w), differentiable in the prompts.

    Args:
        prompts: (M, w) of each of the first layers. Those of the first stand behind the patches, without a
            position; none of them is pooled.
    """
    tower = backbone.model.visual
    with backbone.autocast():
        x = tower._embeds(pictures)
        patches = x.shape[1]
        for layer, block in enumerate(tower.transformer.resblocks):
            if layer < len(prompts):
                mine = prompts[layer] if layer else tower.ln_pre(prompts[layer])
                x = torch.cat([x[:, :patches], mine.to(x.dtype).expand(len(x), -1, -1)], dim=1)
            x = block(x)
        pooled, _ = tower._pool(x[:, :patches])
        features = pooled if tower.proj is None else pooled @ tower.proj
    return F.normalize(features.float(), dim=-1)


def tokens(count: int, n: int, width: int) -> nn.ParameterList:
    """`count` times n tokens of N(0, STD^2)."""
    return nn.ParameterList(nn.Parameter(torch.empty(n, width).normal_(std=STD)) for _ in range(count))


class DeepPromptLearner(PromptLearner):
    """Context tokens in the first layers of the text encoder, and tokens of the image encoder besides.

    Args:
        n_ctx: M, the tokens that are learned: they start from the first M words of `ctx_init`, whose others
            stay words ("a photo" is learned in "a photo of a cat." where M is 2).
        depth: layers with learned tokens, at most those of the tower.

    Subclasses define `image_prompts`.
    """

    def __init__(
        self, backbone: Backbone, classnames: Sequence[str], n_ctx: int, ctx_init: str, depth: int
    ) -> None:
        words = ctx_init.replace("_", " ").split()
        if depth < 1:
            raise UserError(f"PROMPT_DEPTH is {depth}; prompts stand in at least 1 layer")
        if 0 < len(words) < n_ctx:
            raise UserError(f"CTX_INIT '{ctx_init}' has fewer words than the {n_ctx} tokens it is to start")
        self.words = " ".join(words[n_ctx:])
        super().__init__(backbone, classnames, n_ctx, " ".join(words[:n_ctx]))
        if len(self.ctx) != n_ctx:
            raise UserError(f"CTX_INIT '{ctx_init}': its first {n_ctx} words are {len(self.ctx)} tokens")
        tower = backbone.text_tower
        if not tower.cacheable:
            raise UserError(
                f"deep prompts need a causal text tower that is read at its end token, and that of "
                f"{backbone.name} is none: choose a backbone such as ViT-B/16"
            )
        self.deep = tokens(min(depth, len(tower.blocks)) - 1, n_ctx, tower.width)

    def layout(self, classnames: Sequence[str]) -> Prompts:
        return super().layout([f"{self.words} {name}" if self.words else name for name in classnames])

    def image_prompts(self) -> list[Tensor]:
        """The tokens (M, w) of each of the image encoder's first layers."""
        raise NotImplementedError

    def encode_image(self, pictures: Tensor) -> Tensor:
        """Unit image features (n, d) of pictures (n, 3, h, w)."""
        prompts = [
            distributed.sum_gradients(p) if distributed.world_size() > 1 else p for p in self.image_prompts()
        ]
        return distributed.encode_sharded(lambda x: encode_image(self.backbone, x, prompts), pictures)
