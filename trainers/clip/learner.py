"""Provide the prompt learner of CoOp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dfzsl.utils.errors import UserError

from .backbone import Backbone, FeatureBackbone
from .prompts import Prompts, inspect_tokenizer


def require_text_encoder(backbone: Backbone | FeatureBackbone) -> None:
    """Raise UserError if the backbone has no text encoder."""
    if not backbone.has_text_encoder:
        raise UserError(
            "prompt learning needs a text encoder, and there are features only: "
            "set MODEL.BACKBONE.NAME to the backbone of the features"
        )


class PromptLearner(nn.Module):
    """Learn a context of M token embeddings, shared by all classes or class-specific (CoOp).

    The state dict has the keys of CoOp: `ctx`, and the frozen embeddings `token_prefix` and `token_suffix`,
    which are computed when it is saved and ignored when it is loaded.

    Args:
        backbone: frozen model.
        classnames: C class names.
        n_ctx: M, the number of context tokens.
        ctx_init: words that initialize the context; M is then their number of tokens. "": N(0, 0.02^2).
        position: place of the class name, see `Prompts`.
        class_specific: whether each class has its own context.

    Raises:
        UserError: the backbone has no text encoder, or see `Prompts`.
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
            ids, empty = backbone.tokenize([words]), backbone.tokenize([""])
            n_ctx = int((ids != backbone.pad_id).sum() - (empty != backbone.pad_id).sum())
        self.position = position
        self.n_ctx, self.class_specific = n_ctx, class_specific
        # Context tokens (M, w) of the layers after the first.
        self.deep: Iterable[Tensor] = ()
        self.prompts = self.layout(classnames)
        if words:
            start = inspect_tokenizer(backbone)[0]
            ctx = backbone.text_tower.embed(ids[0, start : start + n_ctx]).detach().clone()
            if class_specific:
                ctx = ctx.repeat(len(classnames), 1, 1)
        else:
            shape = (n_ctx, backbone.text_tower.width)
            ctx = torch.empty((len(classnames), *shape) if class_specific else shape).normal_(std=0.02)
        self.ctx = nn.Parameter(ctx.float().to(backbone.device))
        self._cached_features: Tensor | None = None

    def train(self, mode: bool = True) -> PromptLearner:
        self._cached_features = None
        return super().train(mode)

    def layout(self, classnames: Sequence[str]) -> Prompts:
        """Return the prompts of classes."""
        return Prompts(self.backbone, classnames, self.n_ctx, self.position, self.class_specific)

    def forward(self) -> Tensor:
        """Compute L2-normalized text features (C, d) of the classes; in evaluation mode only once."""
        if self.training or torch.is_grad_enabled():
            return self.prompts.encode(self.ctx[None], self.deep)[0]
        if self._cached_features is None:
            self._cached_features = self.prompts.encode(self.ctx[None], self.deep)[0]
        return self._cached_features

    def text_features(self, classnames: Sequence[str]) -> Tensor:
        """Compute L2-normalized text features (n, d) of other classes in the shared context."""
        if self.prompts.class_specific:
            raise UserError("class-specific contexts do not apply to other classes: set CSC False")
        return self.layout(classnames).encode(self.ctx[None], self.deep)[0]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        start = inspect_tokenizer(self.backbone)[0]
        ids = self.prompts.ids[self.prompts.slots < 0].view(len(self.prompts.ids), -1)
        embeddings = self.prompts.tower.embed(ids).detach()
        destination[prefix + "token_prefix"] = embeddings[:, :start]
        destination[prefix + "token_suffix"] = embeddings[:, start:]

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ("token_prefix", "token_suffix"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
