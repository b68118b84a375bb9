"""Context tokens that are learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dfzsl.utils.errors import UserError

from .backbone import Backbone, FeatureBackbone
from .prompts import Prompts, start_and_word


def require_text_encoder(backbone: Backbone | FeatureBackbone) -> None:
    """Raise UserError where there are features only."""
    if not backbone.has_text_encoder:
        raise UserError(
            "prompts are learned through a text encoder, and there are features only: "
            "name the backbone they come from with MODEL.BACKBONE.NAME"
        )


class PromptLearner(nn.Module):
    """CoOp's context: M vectors, shared by all classes or one set a class.

    Args:
        ctx_init: words the context starts from; it then has as many tokens as they have, whatever `n_ctx`.
            Empty: N(0, 0.02^2).
        others: see `Prompts`.

    Its state dict has CoOp's names: ctx, and token_prefix and token_suffix, the frozen embeddings around it,
    which are computed when asked for and ignored when loaded.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        n_ctx: int = 16,
        ctx_init: str = "",
        position: str = "end",
        class_specific: bool = False,
    ) -> None:
        super().__init__()
        require_text_encoder(backbone)
        # Not a submodule: the frozen model is neither trained nor saved with the context.
        object.__setattr__(self, "backbone", backbone)
        words = ctx_init.replace("_", " ").strip()
        if words:
            first, none = backbone.tokenize([words]), backbone.tokenize([""])
            n_ctx = int((first != backbone.pad_id).sum() - (none != backbone.pad_id).sum())
        self.position = position
        self.n_ctx, self.class_specific = n_ctx, class_specific
        self.deep: Iterable[Tensor] = ()  # tokens (M, w) of the layers after the first
        self.prompts = self.layout(classnames)
        if words:
            start = start_and_word(backbone)[0]
            ctx = backbone.text_tower.embed(first[0, start : start + n_ctx]).detach().clone()
            if class_specific:
                ctx = ctx.repeat(len(classnames), 1, 1)
        else:
            shape = (n_ctx, backbone.text_tower.width)
            ctx = torch.empty((len(classnames), *shape) if class_specific else shape).normal_(std=0.02)
        self.ctx = nn.Parameter(ctx.float().to(backbone.device))
        self._kept: Tensor | None = None

    def train(self, mode: bool = True) -> PromptLearner:
        self._kept = None
        return super().train(mode)

    def layout(self, classnames: Sequence[str]) -> Prompts:
        """The prompts of any classes."""
        return Prompts(self.backbone, classnames, self.n_ctx, self.position, self.class_specific)

    def forward(self) -> Tensor:
        """Unit text features (C, d) of the classes. In evaluation they are computed once."""
        if self.training or torch.is_grad_enabled():
            return self.prompts.encode(self.ctx[None], self.deep)[0]
        if self._kept is None:
            self._kept = self.prompts.encode(self.ctx[None], self.deep)[0]
        return self._kept

    def text_features(self, classnames: Sequence[str]) -> Tensor:
        """Unit text features (n, d) of any classes in the shared context."""
        if self.prompts.class_specific:
            raise UserError("class-specific contexts know no other classes: set CSC False")
        return self.layout(classnames).encode(self.ctx[None], self.deep)[0]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        start = start_and_word(self.backbone)[0]
        kept = self.prompts.ids[self.prompts.slots < 0].view(len(self.prompts.ids), -1)
        rows = self.prompts.tower.embed(kept).detach()
        destination[prefix + "token_prefix"] = rows[:, :start]
        destination[prefix + "token_suffix"] = rows[:, start:]

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ("token_prefix", "token_suffix"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
