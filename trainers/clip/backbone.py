"""The frozen vision-language model of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfzsl.utils.errors import UserError
from dfzsl.utils.log import logger
from dfzsl.utils.torchvision_import import import_torchvision

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "amp": torch.float16, "bf16": torch.bfloat16}
TEXTS_AT_ONCE = 256
ROWS_AT_ONCE = 8192


def import_open_clip() -> Any:
    """open_clip, imported at first use."""
    import_torchvision()
    import open_clip

    return open_clip


def cpu_has_bf16() -> bool:
    """Whether oneDNN computes in bfloat16 here."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class TextTower:
    """One view of every text transformer open_clip builds, whether inside CLIP or as a tower of its own.

    Attributes:
        blocks: the residual attention blocks, in order.
        width, context_length: w and L, the width of a token and the number of positions.
        positions: (L, w) positional embedding.
        causal: a token sees itself and what stands before it.
        cacheable: causal, pooled at EOT and of standard attention blocks, so that positions which many
            prompts share need to be computed once.
    """

    def __init__(self, module: Any) -> None:
        self._transformer: nn.Module = module.transformer
        self._embedding: nn.Embedding = module.token_embedding
        self._norm: nn.Module = module.ln_final
        self._projection = module.text_projection
        self._module = module
        inside = hasattr(module, "text_pool_type")  # a CLIP carries its text tower's parts itself
        self._pool: str = module.text_pool_type if inside else module.pool_type
        self._eos: int = module.text_eos_id if inside else module.eos_id
        self._class_token = getattr(module, "cls_emb", None)
        self.blocks = list(module.transformer.resblocks)
        self.positions: Tensor = module.positional_embedding
        self.context_length: int = module.context_length
        self.width: int = self.positions.shape[1]
        self.causal = module.attn_mask is not None
        self._cut = self.causal and self._pool in ("argmax", "eos") and self._class_token is None
        self.cacheable = self._cut and all(isinstance(b.attn, nn.MultiheadAttention) for b in self.blocks)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (..., w) of token ids (...), without positions."""
        return self._embedding(ids)

    def pooled_position(self, ids: Tensor) -> Tensor:
        """The position (N,) whose output stands for the text, for token ids (N, L)."""
        if self._pool == "argmax":
            return ids.argmax(dim=-1)
        if self._pool == "eos":
            return (ids == self._eos).int().argmax(dim=-1)
        return ids.new_full((len(ids),), 0 if self._pool == "first" else ids.shape[1] - 1)

    def run(self, x: Tensor, ids: Tensor) -> Tensor:
        """The plain way: every position of every text, cut at the last EOT where the tower is causal.

        Args:
            x: (N, L, w) embeddings without positions.  ids: (N, L) their ids, for the position of EOT.
        Returns:
            (N, w) the pooled outputs of the last block.
        """
        at = self.pooled_position(ids)
        if self._cut:
            x = x[:, : int(at.max()) + 1]
        length = x.shape[1]
        mask = self._module.attn_mask
        if self._class_token is not None:
            # CoCa: a class token at the end, which alone is pooled and must not see the padding.
            x = torch.cat([x, self._class_token.expand(len(x), 1, -1)], dim=1)
            at, length = at.new_full(at.shape, length), length + 1
            padding = self._module._build_additive_mask(ids, length, x.dtype)
            mask = padding if mask is None else mask[:length, :length] + padding
        elif mask is not None:
            mask = mask[:length, :length]
        x = self._transformer(x + self.positions[:length], attn_mask=mask)
        return x[torch.arange(len(x), device=x.device), at]

    def project(self, x: Tensor) -> Tensor:
        """Final norm and projection: (..., w) outputs of the last block to (..., d) text features."""
        x = self._norm(x)
        if self._projection is None:
            return x
        return self._projection(x) if isinstance(self._projection, nn.Linear) else x @ self._projection


class Backbone(nn.Module):
    """A frozen CLIP-like model: unit image and text features of the same dimension.

    Attributes:
        name: open_clip's name of the model.  weights_id: tag, or sha256 prefix of the weights file.
        dim: d.  logit_scale: exp of the learned scale, the inverse softmax temperature.
        preprocess_cfg: size (h, w), mean, std, interpolation, resize_mode of its pictures.
        identity: whose image features they are: a teacher of another encoder cannot read them.
        precision: fp32, fp16, amp or bf16; set it with `use_precision`.
        compiled: learn prompts through compiled layers.
        rows_at_once: tokens of prompts whose activations are kept for the backward pass (0.4 MB each in the
            text tower of ViT-B/16); where there are more, they are recomputed in chunks of so many.
    """

    has_text_encoder = True

    def __init__(
        self, model: Any, name: str, weights_id: str, dim: int, tokenizer: Callable[[], Any]
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.name = name
        self.weights_id = weights_id
        self.dim = dim
        self.precision = "fp32"
        self.compiled = False
        self.rows_at_once = ROWS_AT_ONCE
        self.context_length: int = model.context_length
        self.logit_scale = float(model.logit_scale.exp())
        self._make_tokenizer = tokenizer
        cfg = import_open_clip().get_model_preprocess_cfg(model)
        size = cfg["size"]
        self.preprocess_cfg = {**cfg, "size": (size, size) if isinstance(size, int) else tuple(size)}

    def __repr__(self) -> str:
        return f"Backbone({self.identity}, d = {self.dim}, {self.precision} on {self.device})"

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)  # frozen: batch norm statistics and dropout never wake up

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def text_tower(self) -> TextTower:
        """Raises UserError for a tower of another library: only open_clip's own takes context tokens."""
        module = getattr(self.model, "text", self.model)
        if not hasattr(module, "token_embedding"):
            raise UserError(f"the text tower of {self.name} is not open_clip's own: choose another backbone")
        return TextTower(module)

    @property
    def transform(self) -> Callable:
        """open_clip's test transform: a PIL image to (3, h, w)."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=False)

    @cached_property
    def tokenizer(self) -> Callable[..., Tensor]:
        try:
            return self._make_tokenizer()
        except (ImportError, OSError) as error:
            raise UserError(f"the tokenizer of {self.name} cannot be loaded: {first_line(error)}") from None

    def tokenize(self, texts: Sequence[str], room: int = 0, kind: str = "text") -> Tensor:
        """Token ids (n, L - room) of n texts in a tower of L positions, `room` of which stay free.

        Raises UserError naming the first text that does not fit; open_clip would cut it silently.
        """
        length = self.context_length - room
        ids = self.tokenizer(list(texts), context_length=length)
        # What fits has, with one position more, one padding token more and is else the same.
        longer = self.tokenizer(list(texts), context_length=length + 1)
        columns = torch.arange(length + 1)
        padding = torch.where(longer == self.pad_id, columns, -1).amax(dim=1, keepdim=True)
        shorter = longer.gather(1, columns[:-1] + (columns[:-1] >= padding).long())
        fits = (shorter == ids).all(dim=1) & (padding[:, 0] >= 0)
        if not bool(fits.all()):
            text = texts[int((~fits).nonzero()[0])]
            raise UserError(
                f"{kind} '{text}' needs more than the {length} tokens {self.name} has for it: shorten it"
            )
        return ids.to(self.device)

    @cached_property
    def pad_id(self) -> int:
        """The id that fills up a text: the commonest in one that is nearly all padding."""
        return int(self.tokenizer(["a"], context_length=self.context_length)[0].mode().values)

    @property
    def identity(self) -> str:
        return f"{self.name} ({self.weights_id})"

    def use_precision(self, precision: str) -> None:
        """Run the encoders in float32 or under autocast; fp16 and amp are the same, bf16 wider.

        Weights stay float32. Raises UserError for a precision that is unknown. A CPU runs fp32, and bf16
        where it can.
        """
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision '{precision}'; known: {', '.join(PRECISIONS)}")
        if self.device.type == "cpu" and precision != "fp32" and not (precision == "bf16" and cpu_has_bf16()):
            needs = "a GPU, or a CPU that has bf16" if precision == "bf16" else "a GPU"
            logger.warning(f"Precision {precision} needs {needs}: running in fp32")
            precision = "fp32"
        self.precision = precision

    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast to `precision`; none for fp32."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def encode_image(self, x: Tensor) -> Tensor:
        """Unit image features (n, d) of pictures (n, 3, h, w); features (n, d) pass unchanged."""
        if x.ndim == 2:
            if x.shape[1] != self.dim:
                raise UserError(
                    f"features have {x.shape[1]} dimensions, {self.name} has {self.dim}: other backbone?"
                )
            return x
        with self.autocast():
            # The layout in which convolutions are fastest (benchmarks/README.md).
            features = self.model.encode_image(x.contiguous(memory_format=torch.channels_last))
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit text features (n, d) of n texts. Raises UserError for a text that is too long."""
        if not texts:
            return torch.empty(0, self.dim, device=self.device)
        tower = self.text_tower
        with self.autocast():
            rows = [
                tower.project(tower.run(tower.embed(ids), ids)).float()
                for ids in self.tokenize(texts).split(TEXTS_AT_ONCE)
            ]
        return F.normalize(torch.cat(rows), dim=-1)

    def class_features(self, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit text features (C, d) of classes: the normalised mean over prompts like "a photo of a {}."."""
        return self.mean_features(
            [[t.format(name.replace("_", " ")) for t in templates] for name in classnames]
        )

    def mean_features(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """The normalised mean (C, d) of unit text features over the texts of each class, one or more."""
        rows = self.encode_text([text for of_class in texts for text in of_class])
        means = [part.mean(0) for part in rows.split([len(of_class) for of_class in texts])]
        return F.normalize(torch.stack(means), dim=-1)


class FeatureBackbone(nn.Module):
    """Stands for a model where only its features are at hand: images are unit rows, classes a table.

    Args:
        dim: d.  text_features: (d,) unit text feature of each class name.
        logit_scale: inverse softmax temperature; 100 is CLIP's.
    """

    has_text_encoder = False
    name = ""

    def __init__(
        self, dim: int, text_features: Mapping[str, Tensor] | None, logit_scale: float = 100.0
    ) -> None:
        super().__init__()
        self.dim = dim
        self.logit_scale = logit_scale
        self.weights_id = "features"
        self._text = dict(text_features or {})

    def __repr__(self) -> str:
        return f"FeatureBackbone({self.identity}, d = {self.dim}, text of {len(self._text)} classes)"

    @property
    def identity(self) -> str:
        return f"features ({self.weights_id})"

    def encode_image(self, x: Tensor) -> Tensor:
        """Features (n, d), unchanged. Raises UserError for pictures and for another dimension."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise UserError(
                f"expected features of {self.dim} dimensions, got a batch of shape {tuple(x.shape)}; "
                "name a backbone with MODEL.BACKBONE.NAME to encode pictures"
            )
        return x

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        raise UserError("no text encoder: features only; name a backbone with MODEL.BACKBONE.NAME")

    def class_features(self, classnames: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
        """Unit text features (C, d) from the table. Raises UserError naming a class that it does not hold."""
        missing = [name for name in classnames if name not in self._text]
        if missing:
            raise UserError(
                f"the features hold no text row for class '{missing[0]}', and there is no text encoder"
            )
        rows = [self._text[name].float() for name in classnames]
        return F.normalize(torch.stack(rows), dim=-1) if rows else torch.empty(0, self.dim)
