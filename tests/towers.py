"""Small open_clip models of every kind, and prompts encoded the plain way, as CoOp's paper does it."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dfzsl.trainers.clip.backbone import Backbone, import_open_clip
from dfzsl.trainers.clip.loading import load_backbone

VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}
CONFIGS: dict[str, dict] = {
    "tiny-vit": {"quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-deep": {
        "quick_gelu": True,
        "vision_cfg": {**VISION, "layers": 4, "width": 96, "head_width": 48},
        "text_cfg": TEXT,
    },
    "tiny-openai": {"vision_cfg": VISION, "text_cfg": {**TEXT, "heads": 1}},
    "tiny-rn": {
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        "text_cfg": TEXT,
    },
    "tiny-custom": {"custom_text": True, "vision_cfg": VISION, "text_cfg": {**TEXT, "proj_bias": True}},
    "tiny-scaled": {"vision_cfg": VISION, "text_cfg": {**TEXT, "ls_init_value": 0.3}},
    "tiny-eos": {
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407, "context_length": 40},
    },
    "tiny-last": {"custom_text": True, "vision_cfg": VISION, "text_cfg": {**TEXT, "pool_type": "last"}},
    "tiny-normed": {"vision_cfg": VISION, "text_cfg": {**TEXT, "qk_norm": True}},
    "tiny-coca": {"custom_text": True, "vision_cfg": VISION, "text_cfg": {**TEXT, "embed_cls": True}},
    "tiny-both-ways": {
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}
FAST = ("tiny-vit", "tiny-deep", "tiny-rn", "tiny-custom", "tiny-scaled", "tiny-eos")


def register_towers() -> None:
    """Make the small models known to open_clip under their names."""
    with tempfile.TemporaryDirectory() as folder:
        for name, config in CONFIGS.items():
            path = Path(folder) / f"{name}.json"
            path.write_text(json.dumps({"embed_dim": 48, **config}))
            import_open_clip().add_model_config(path)


@functools.cache
def tiny(name: str) -> Backbone:
    if name not in import_open_clip().list_models():
        register_towers()
    return load_backbone(name, "random")


class SentencePieces:
    """Stands for SigLIP's tokenizer: no start token, and the end token is also the padding."""

    def __init__(self, context_length: int, vocabulary: int) -> None:
        self.context_length, self.vocabulary = context_length, vocabulary

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.context_length
        rows = torch.ones(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            pieces = [2 + sum(map(ord, w)) % (self.vocabulary - 2) for w in text.replace(".", " .").split()]
            row[: len(pieces[: length - 1])] = torch.tensor(pieces[: length - 1], dtype=torch.long)
        return rows


def plain_text_features(backbone: Backbone, names: list[str], context: Tensor, position: str) -> Tensor:
    """Unit text features (C, d) of prompts with `context` (M, w) or (C, M, w): every one of the tower's
    positions of every class, through the modules of the open_clip model itself.

    Written from the papers' definition: tokenize "X X ... X name." with M words X, replace the embeddings
    of the X by the context, and where the name is not last move it before (all or half of) the context.
    """
    m = context.shape[-2]
    model = backbone.model
    tower = getattr(model, "text", model)
    tokenize = backbone.tokenizer
    ids = tokenize([" ".join(["X"] * m) + f" {name}." for name in names])
    start = 0 if isinstance(tokenize, SentencePieces) else 1
    embedded = tower.token_embedding(ids)
    rows, row_ids = [], []
    for c, name in enumerate(names):
        v = context[c] if context.ndim == 3 else context
        n = int(sum(1 for t in tokenize([name])[0].tolist() if t not in (0, 1, 49406, 49407)))
        head, word = embedded[c, :start], embedded[c, start + m : start + m + n]
        tail = embedded[c, start + m + n :]
        k = {"end": m, "middle": m // 2, "front": 0}[position]
        rows.append(torch.cat([head, v[:k], word, v[k:], tail]))
        row_ids.append(ids[c])
    x, length = torch.stack(rows), ids.shape[1]
    mask = tower.attn_mask
    if getattr(tower, "cls_emb", None) is not None:
        x = torch.cat([x, tower.cls_emb.expand(len(x), 1, -1)], dim=1)
        # The class token must not see padding; open_clip puts it before the text in that mask, so that
        # every key stands one place too late (its checkpoints were trained so).
        hidden = torch.zeros(len(x), length + 1, length + 1)
        for c in range(len(x)):
            padded = torch.cat([torch.tensor([False]), ids[c] == 0])
            hidden[c, :, padded] = float("-inf")
        mask = (mask + hidden).repeat_interleave(tower.heads, 0)
        x = tower.transformer(x + tower.positional_embedding, attn_mask=mask)[:, -1]
    else:
        x = tower.transformer(x + tower.positional_embedding, attn_mask=mask)
        pool = getattr(tower, "text_pool_type", None) or tower.pool_type
        at = {"argmax": ids.argmax(1), "eos": (ids == 49407).int().argmax(1)}.get(pool, length - 1)
        x = x[torch.arange(len(x)), at]
    x = tower.ln_final(x)
    if isinstance(tower.text_projection, torch.nn.Linear):
        x = tower.text_projection(x)
    else:
        x = x @ tower.text_projection
    return F.normalize(x, dim=-1)
