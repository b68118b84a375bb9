"""Provide the frozen vision-language model."""

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
TEXT_BATCH_SIZE = 256
MAX_CHUNK_TOKENS = 8192


def import_open_clip() -> Any:
    """Import open_clip, which takes seconds, at first use."""
    import_torchvision()
    import open_clip

    return open_clip


def cpu_has_bf16() -> bool:
    """Return whether this CPU computes in bfloat16 (oneDNN)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def first_line(error: Exception) -> str:
    """Return the first line of an error message, at most 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class TextTower:
    """Common interface of the text transformers of open_clip, whether part of CLIP or a separate module.

    Attributes:
        blocks: residual attention blocks, in order.
        width: w, the width of a token.
        context_length: L, the number of positions.
        positions: (L, w) positional embeddings.
        causal: whether attention is causal.
        cacheable: whether a shared prefix of prompts can be computed once: causal, pooled at the end token,
            with standard attention blocks.

    Args:
        module: CLIP model or text tower of open_clip.
    """

    def __init__(self, module: Any) -> None:
        self._transformer: nn.Module = module.transformer
        self._embedding: nn.Embedding = module.token_embedding
        self._norm: nn.Module = module.ln_final
        self._projection = module.text_projection
        self._module = module
        # In a plain CLIP the parts of the text tower are attributes of the model itself.
        is_clip = hasattr(module, "text_pool_type")
        self._pool: str = module.text_pool_type if is_clip else module.pool_type
        self._eos: int = module.text_eos_id if is_clip else module.eos_id
        self._class_token = getattr(module, "cls_emb", None)
        self.blocks = list(module.transformer.resblocks)
        self.positions: Tensor = module.positional_embedding
        self.context_length: int = module.context_length
        self.width: int = self.positions.shape[1]
        self.causal = module.attn_mask is not None
        self._truncates = self.causal and self._pool in ("argmax", "eos") and self._class_token is None
        self.cacheable = self._truncates and all(
            isinstance(b.attn, nn.MultiheadAttention) for b in self.blocks
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Return token embeddings (..., w) of token ids (...), without positions."""
        return self._embedding(ids)

    def pooled_position(self, ids: Tensor) -> Tensor:
        """Return the pooled position (N,) of each text from token ids (N, L)."""
        if self._pool == "argmax":
            return ids.argmax(dim=-1)
        if self._pool == "eos":
            return (ids == self._eos).int().argmax(dim=-1)
        return ids.new_full((len(ids),), 0 if self._pool == "first" else ids.shape[1] - 1)

    def run(self, x: Tensor, ids: Tensor) -> Tensor:
        """Run the transformer on all positions, up to the last end token where the tower is causal.

        Args:
            x: (N, L, w) token embeddings without positions.
            ids: (N, L) token ids.

        Returns:
            (N, w) pooled outputs of the last block.
        """
        pooled = self.pooled_position(ids)
        if self._truncates:
            x = x[:, : int(pooled.max()) + 1]
        length = x.shape[1]
        mask = self._module.attn_mask
        if self._class_token is not None:
            # CoCa appends a class token, which is pooled and must not attend to padding.
            x = torch.cat([x, self._class_token.expand(len(x), 1, -1)], dim=1)
            pooled, length = pooled.new_full(pooled.shape, length), length + 1
            padding = self._module._build_additive_mask(ids, length, x.dtype)
            mask = padding if mask is None else mask[:length, :length] + padding
        elif mask is not None:
            mask = mask[:length, :length]
        x = self._transformer(x + self.positions[:length], attn_mask=mask)
        return x[torch.arange(len(x), device=x.device), pooled]

    def project(self, x: Tensor) -> Tensor:
        """Apply the final norm and projection to outputs (..., w) of the last block; return (..., d)."""
        x = self._norm(x)
        if self._projection is None:
            return x
        return self._projection(x) if isinstance(self._projection, nn.Linear) else x @ self._projection


class Backbone(nn.Module):
    """Frozen CLIP-like model with L2-normalized image and text features of the same dimension.

    Attributes:
        name: open_clip's name of the model.
        weights_id: pretrained tag, or prefix of the SHA-256 of the weights file.
        dim: d, the dimension of features.
        logit_scale: inverse softmax temperature.
        preprocess_cfg: size (h, w), mean, std, interpolation and resize_mode of images.
        identity: name and weights; teachers and features of another identity are not compatible.
        precision: fp32, fp16, amp or bf16; set it with `use_precision`.
        compiled: whether prompt learning compiles the layers of the text tower.
        chunk_tokens: prompt tokens whose activations are stored for the backward pass (0.4 MB each in the
            text tower of ViT-B/16); more tokens are recomputed in chunks of this size.
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
        self.chunk_tokens = MAX_CHUNK_TOKENS
        self.context_length: int = model.context_length
        self.logit_scale = float(model.logit_scale.exp())
        self._make_tokenizer = tokenizer
        cfg = import_open_clip().get_model_preprocess_cfg(model)
        size = cfg["size"]
        self.preprocess_cfg = {**cfg, "size": (size, size) if isinstance(size, int) else tuple(size)}

    def __repr__(self) -> str:
        return f"Backbone({self.identity}, d = {self.dim}, {self.precision} on {self.device})"

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: batch norm and dropout of a frozen model do not train."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Device of the encoders."""
        return next(self.model.parameters()).device

    @cached_property
    def text_tower(self) -> TextTower:
        """The text tower. Raises UserError for towers of other libraries, which do not read embeddings."""
        module = getattr(self.model, "text", self.model)
        if not hasattr(module, "token_embedding"):
            raise UserError(f"the text tower of {self.name} is not one of open_clip: choose another backbone")
        return TextTower(module)

    @property
    def transform(self) -> Callable:
        """Test transform of open_clip, from a PIL image to a tensor (3, h, w)."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=False)

    @cached_property
    def tokenizer(self) -> Callable[..., Tensor]:
        """Tokenizer of the text tower. Raises UserError if it cannot be loaded."""
        try:
            return self._make_tokenizer()
        except (ImportError, OSError) as error:
            raise UserError(f"the tokenizer of {self.name} cannot be loaded: {first_line(error)}") from None

    def tokenize(self, texts: Sequence[str], room: int = 0, kind: str = "text") -> Tensor:
        """Tokenize texts.

        Args:
            texts: n texts.
            room: number of positions to leave free, of the L positions of the tower.
            kind: term for a text in the error message.

        Returns:
            (n, L - room) token ids.

        Raises:
            UserError: a text is too long; open_clip would truncate it silently.
        """
        length = self.context_length - room
        ids = self.tokenizer(list(texts), context_length=length)
        # With one position more, a text that fits has one padding token more and is otherwise the same.
        longer = self.tokenizer(list(texts), context_length=length + 1)
        columns = torch.arange(length + 1)
        padding = torch.where(longer == self.pad_id, columns, -1).amax(dim=1, keepdim=True)
        shorter = longer.gather(1, columns[:-1] + (columns[:-1] >= padding).long())
        fits = (shorter == ids).all(dim=1) & (padding[:, 0] >= 0)
        if not bool(fits.all()):
            text = texts[int((~fits).nonzero()[0])]
            raise UserError(
                f"{kind} '{text}' is longer than the {length} tokens that {self.name} reads: shorten it"
            )
        return ids.to(self.device)

    @cached_property
    def pad_id(self) -> int:
        """Token id of padding: the most frequent token of a short text."""
        return int(self.tokenizer(["a"], context_length=self.context_length)[0].mode().values)

    @property
    def identity(self) -> str:
        """Name and weights of the model."""
        return f"{self.name} ({self.weights_id})"

    def use_precision(self, precision: str) -> None:
        """Run the encoders in float32 or under autocast; weights stay in float32.

        A CPU runs fp32, or bf16 where it supports it.

        Args:
            precision: fp32, bf16, or fp16 (equal to amp).

        Raises:
            UserError: the precision is unknown.
        """
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision '{precision}'; known: {', '.join(PRECISIONS)}")
        if self.device.type == "cpu" and precision != "fp32" and not (precision == "bf16" and cpu_has_bf16()):
            needs = "a GPU, or a CPU with bf16" if precision == "bf16" else "a GPU"
            logger.warning(f"Precision {precision} needs {needs}: running in fp32")
            precision = "fp32"
        self.precision = precision

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context of `precision`, disabled for fp32."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def encode_image(self, x: Tensor) -> Tensor:
        """Encode images (n, 3, h, w) to L2-normalized features (n, d); return features (n, d) unchanged."""
        if x.ndim == 2:
            if x.shape[1] != self.dim:
                raise UserError(
                    f"features have {x.shape[1]} dimensions, but {self.name} has {self.dim}: "
                    "set MODEL.BACKBONE.NAME to the backbone of the features"
                )
            return x
        with self.autocast():
            # Convolutions are fastest in this memory layout (benchmarks/README.md).
            features = self.model.encode_image(x.contiguous(memory_format=torch.channels_last))
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode n texts to L2-normalized features (n, d). Raises UserError if a text is too long."""
        if not texts:
            return torch.empty(0, self.dim, device=self.device)
        tower = self.text_tower
        with self.autocast():
            features = [
                tower.project(tower.run(tower.embed(ids), ids)).float()
                for ids in self.tokenize(texts).split(TEXT_BATCH_SIZE)
            ]
        return F.normalize(torch.cat(features), dim=-1)

    def class_features(self, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Compute class embeddings (C, d): the L2-normalized mean over templates, e.g. "a photo of a {}."."""
        return self.mean_features(
            [[t.format(name.replace("_", " ")) for t in templates] for name in classnames]
        )

    def mean_features(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """Compute the L2-normalized mean (C, d) of the text features of each class, of one text or more."""
        features = self.encode_text([text for class_texts in texts for text in class_texts])
        means = [part.mean(0) for part in features.split([len(class_texts) for class_texts in texts])]
        return F.normalize(torch.stack(means), dim=-1)


class FeatureBackbone(nn.Module):
    """Replace the model where only its features are available.

    Args:
        dim: d, the dimension of features.
        text_features: {class name: (d,) text embedding}.
        logit_scale: inverse softmax temperature; CLIP's is 100.
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
        """The constant "features (features)": the model is unknown."""
        return f"features ({self.weights_id})"

    def encode_image(self, x: Tensor) -> Tensor:
        """Return features (n, d) unchanged. Raises UserError for images and for another dimension."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise UserError(
                f"expected features of {self.dim} dimensions, got a batch of shape {tuple(x.shape)}; "
                "set the backbone MODEL.BACKBONE.NAME to encode images"
            )
        return x

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Raise UserError: there is no text encoder."""
        raise UserError("features come without a text encoder: set MODEL.BACKBONE.NAME")

    def class_features(self, classnames: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
        """Look up L2-normalized class embeddings (C, d). Raises UserError if a class has none."""
        missing = [name for name in classnames if name not in self._text]
        if missing:
            raise UserError(
                f"the features have no text embedding of class '{missing[0]}', and there is no text encoder"
            )
        embeddings = [self._text[name].float() for name in classnames]
        return F.normalize(torch.stack(embeddings), dim=-1) if embeddings else torch.empty(0, self.dim)
