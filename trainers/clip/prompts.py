"""Encode prompts with learned context tokens, exactly and fast.

A prompt is `[start] v_1 .. v_M [class name] . [end]` with learned vectors v (CoOp, Zhou et al., IJCV 2022).
CLIP's text transformer is causal: tokens after the end token have no effect, and the positions before the
class name are the same for all classes. This prefix is therefore computed once, and for each class only the
tokens from its name to its end token. The tokens of all classes are concatenated to one matrix with little
padding, one row per token.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dfzsl.io.class_names import check_class_names
from dfzsl.utils import distributed
from dfzsl.utils.errors import UserError

from .backbone import Backbone, TextTower

POSITIONS = ("end", "middle", "front")
# Maximal share of padding where classes of different lengths share one attention call. On a GPU a call costs
# more than twice the computation.
MAX_PADDING_CPU, MAX_PADDING_GPU = 1 / 8, 1.0

Groups = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Block:
    """The R tokens of one text encoder call: the shared prefix, then n classes, each padded at its end.

    Attributes:
        order: (n,) class indices, in the order of their rows.
        ids: (R,) token id of each row.
        slots: (R,) index of the context vector that replaces the token, -1 for none.
        positions: (R,) position of each row in its prompt.
        owner: (R,) class index of each row where contexts are class-specific, else 0.
        groups: (number of classes, tokens per class) of consecutive classes of the same padded length.
        masks: causal masks (length, length), added to attention scores: of the prefix, then of each group.
        end_rows: (n,) row of the end token of each class.
    """

    order: Tensor
    ids: Tensor
    slots: Tensor
    positions: Tensor
    owner: Tensor
    groups: tuple[tuple[int, int], ...]
    masks: tuple[Tensor, ...]
    end_rows: Tensor


class Prompts:
    """Token layout of one prompt per class, and its text features for any context.

    Args:
        backbone: frozen model.
        classnames: C class names; "_" equals a space.
        n_ctx: M, the number of context tokens.
        position: place of the class name: after the context ("end"), in its middle or before it ("front").
        class_specific: whether each class has its own context vectors; only the start token is then shared.

    Raises:
        UserError: a class name is empty, repeats or is too long beside the context, or `n_ctx` exceeds the
            context length of the text tower.
    """

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        n_ctx: int,
        position: str = "end",
        class_specific: bool = False,
    ) -> None:
        if position not in POSITIONS:
            raise UserError(
                f"unknown class token position '{position}'; choose one of {', '.join(POSITIONS)}"
            )
        if not classnames:
            raise UserError("prompts need class names, got none")
        names = [name.replace("_", " ") for name in check_class_names(classnames, "prompts")]
        tower = self.tower = backbone.text_tower
        self.autocast = backbone.autocast
        self.chunk_tokens = backbone.chunk_tokens
        self.compiled = backbone.compiled
        length = tower.context_length
        start, word = inspect_tokenizer(backbone)
        # A prompt has at least a start token, one word, a full stop and an end token.
        if not 0 < n_ctx <= length - start - 3:
            raise UserError(
                f"{n_ctx} context tokens do not fit the context length {length} of {backbone.name}: "
                f"use 1 to {length - start - 3}"
            )
        words = backbone.tokenize([f"{name}." for name in names], room=n_ctx, kind="class name")
        ahead = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]
        shift = self._name_lengths(backbone, names) if ahead < n_ctx else 0
        self.ids, self.slots = _lay_out(words, start, n_ctx, ahead, shift, word)
        self.end = tower.pooled_position(self.ids)
        self.shared = start if class_specific else start + ahead
        self.n_ctx = n_ctx
        self.class_specific = class_specific

    @staticmethod
    def _name_lengths(backbone: Backbone, names: Sequence[str]) -> Tensor:
        """Return the number of tokens (C, 1) of each name."""
        ids, empty = backbone.tokenize(names), backbone.tokenize([""])
        return (ids != backbone.pad_id).sum(1, keepdim=True) - (empty != backbone.pad_id).sum()

    def encode(self, context: Tensor, deep: Iterable[Tensor] = ()) -> Tensor:
        """Compute text features, differentiable in `context` and `deep`.

        Args:
            context: (B, M, w) context vectors, or (B, C, M, w) where they are class-specific. CoOp has
                B = 1, CoCoOp one context per image.
            deep: (M, w) vectors that replace the outputs of the context tokens before the second layer, the
                third layer and so on; the tower must be `cacheable`.

        Returns:
            (B, C, d) L2-normalized text features.
        """
        if context.ndim == 3:
            context = context[:, None]
        if distributed.world_size() == 1:
            return self._encode(context, tuple(deep))
        classes = len(self.ids)
        context = distributed.sum_gradients(context)
        if self.class_specific:
            context = context[:, distributed.rank_indices(classes).to(context.device)]
        rows = self.rank_prompts._encode(context, tuple(map(distributed.sum_gradients, deep)))
        return distributed.gather_rows(rows.transpose(0, 1), classes).transpose(0, 1)

    @functools.cached_property
    def rank_prompts(self) -> Prompts:
        """The prompts of the classes that this rank encodes."""
        prompts = copy.copy(self)
        indices = distributed.rank_indices(len(self.ids)).to(self.ids.device)
        prompts.ids, prompts.slots, prompts.end = self.ids[indices], self.slots[indices], self.end[indices]
        return prompts

    def _encode(self, context: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """Compute L2-normalized text features (B, C, d) of contexts (B, C or 1, M, w)."""
        with self.autocast():
            if self.tower.cacheable:
                features = self._encode_cached(context, deep)
            else:
                features = self._encode_plain(context)
        return F.normalize(features.float(), dim=-1)

    def _encode_cached(self, context: Tensor, deep: Sequence[Tensor]) -> Tensor:
        """Compute text features with a shared prefix."""
        blocks = self.blocks
        run_layer = _compiled_layer() if self.compiled and torch.is_grad_enabled() else _run_layer
        parts = []
        for block in blocks:
            chunk_size = max(1, self.chunk_tokens // len(block.ids))
            recompute = len(blocks) > 1 or len(context) > chunk_size
            run = functools.partial(_run_block, self.tower, block, run_layer, deep)
            chunks = [_run_checkpointed(run, chunk, recompute) for chunk in context.split(chunk_size)]
            parts.append(torch.cat(chunks))
            if len(blocks) > 1:
                _trim_memory()
        order = torch.cat([block.order for block in blocks])
        return torch.cat(parts, dim=1)[:, order.argsort()]

    def _encode_plain(self, context: Tensor) -> Tensor:
        """Compute text features at all positions, for towers that are not causal or pool another token."""
        classes = len(self.ids)
        chunk_size = max(1, self.chunk_tokens // self.ids.shape[1])
        recompute = len(context) * classes > chunk_size
        features = []
        for one_context in context:
            for indices in torch.arange(classes, device=one_context.device).split(chunk_size):
                run = functools.partial(self._run_plain, indices)
                features.append(_run_checkpointed(run, one_context, recompute))
                if recompute:
                    _trim_memory()
        return torch.cat(features).unflatten(0, (len(context), classes))

    def _run_plain(self, indices: Tensor, context: Tensor) -> Tensor:
        """Compute features (n, d) of n classes for one context (C or 1, M, w)."""
        return self.tower.project(self.tower.run(self.embed(indices, context), self.ids[indices]))

    def embed(self, indices: Tensor, context: Tensor) -> Tensor:
        """Return input embeddings (n, L, w) of n classes, without positions, for a context (C or 1, M, w)."""
        slots = self.slots[indices]
        owner = indices[:, None].expand_as(slots) if len(context) > 1 else torch.zeros_like(slots)
        x = self.tower.embed(self.ids[indices])
        return torch.where(slots[..., None] < 0, x, context[owner, slots.clamp(min=0)].to(x.dtype))

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """The tokens of all prompts, shortest first, in blocks of at most `chunk_tokens`."""
        return [self._block(order, groups) for order, groups in self._group()]

    def _group(self) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Split the classes, sorted by length, into blocks, and each block into groups of similar length."""
        lengths = (self.end + 1 - self.shared).tolist()
        max_padding = MAX_PADDING_CPU if self.ids.device.type == "cpu" else MAX_PADDING_GPU
        order: list[int] = []
        groups: list[tuple[int, int]] = []
        rows = self.shared
        group_tokens = 0  # tokens of the current group without padding
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            length = lengths[index]
            if order and rows + length > self.chunk_tokens:
                yield order, groups
                order, groups, rows = [], [], self.shared
            count = groups[-1][0] + 1 if groups else 1
            if groups and count * length <= (1 + max_padding) * (group_tokens + length):
                rows += count * length - groups[-1][0] * groups[-1][1]
                groups[-1] = (count, length)
                group_tokens += length
            else:
                groups.append((1, length))
                rows, group_tokens = rows + length, length
            order.append(index)
        yield order, groups

    def _block(self, order: list[int], groups: list[tuple[int, int]]) -> Block:
        """Lay out the tokens of a block."""
        device = self.ids.device
        prefix = torch.arange(self.shared)
        owner, positions = [torch.zeros_like(prefix)], [prefix]
        first = 0
        for count, length in groups:
            classes = torch.tensor(order[first : first + count])
            owner.append(classes.repeat_interleave(length))
            positions.append((self.shared + torch.arange(length)).repeat(count))
            first += count
        class_index, position = torch.cat(owner).to(device), torch.cat(positions).to(device)
        indices = torch.tensor(order, device=device)
        # The first row of a class follows the rows of all classes before it.
        lengths = torch.tensor([length for count, length in groups for _ in range(count)], device=device)
        first_rows = self.shared + lengths.cumsum(0) - lengths
        return Block(
            order=indices,
            ids=self.ids[class_index, position],
            slots=self.slots[class_index, position],
            positions=position,
            owner=class_index if self.class_specific else torch.zeros_like(class_index),
            groups=tuple(groups),
            masks=tuple(
                torch.full((n, n), float("-inf"), device=device).triu(1)
                for n in (self.shared, *(length for _, length in groups))
            ),
            end_rows=first_rows + self.end[indices] - self.shared,
        )


def _run_block(
    tower: TextTower, block: Block, run_layer: Callable, deep: Sequence[Tensor], context: Tensor
) -> Tensor:
    """Compute features (B, n, d) of one block for contexts (B, C or 1, M, w) and deep prompts (M, w)."""
    x = tower.embed(block.ids).expand(len(context), -1, -1)
    learned = (block.slots >= 0).nonzero()[:, 0]
    x = x.index_copy(1, learned, context[:, block.owner[learned], block.slots[learned]].to(x.dtype))
    x = x + tower.positions[block.positions]
    for number, layer in enumerate(tower.blocks):
        if 0 < number <= len(deep):
            context_tokens = deep[number - 1][block.slots[learned]].to(x.dtype)
            x = x.index_copy(1, learned, context_tokens.expand(len(x), -1, -1))
        # Only the end tokens of the last layer are read.
        output_rows = (block.end_rows,) if layer is tower.blocks[-1] else ()
        x = run_layer(layer, x, block.groups, block.masks, *output_rows)
    return tower.project(x)


def _run_layer(
    layer: Any, x: Tensor, groups: Groups, masks: Sequence[Tensor], output_rows: Tensor | None = None
) -> Tensor:
    """Run one residual attention block on tokens (B, R, w); return all rows or `output_rows`."""
    attn = layer.attn
    qkv = F.linear(layer.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    attended = _attend(qkv.unflatten(-1, (3, attn.num_heads, -1)), groups, masks)
    if output_rows is not None:
        x, attended = x[:, output_rows], attended[:, output_rows]
    x = x + layer.ls_1(attn.out_proj(attended))
    return x + layer.ls_2(layer.mlp(layer.ln_2(x)))


@functools.cache
def _compiled_layer() -> Callable:
    """Return `_run_layer` with torch.compile; each set of classes is compiled once for all layers."""
    return torch.compile(_run_layer)


def _attend(qkv: Tensor, groups: Groups, masks: Sequence[Tensor]) -> Tensor:
    """Compute causal attention of a shared prefix and of classes that attend to the prefix and themselves.

    Args:
        qkv: (B, R, 3, H, D) queries, keys and values of H heads.
        groups: see `Block`.
        masks: see `Block`.

    Returns:
        (B, R, H * D) outputs.
    """
    shared, scale = len(masks[0]), qkv.shape[-1] ** -0.5
    prefix, *classes = qkv.split([shared, *(count * length for count, length in groups)], dim=1)
    q, k0, v0 = prefix.unbind(2)
    scores = torch.einsum("bshd,bthd->bhst", q * scale, k0) + masks[0]
    out = [torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v0).flatten(2)]
    for rows, (count, length), mask in zip(classes, groups, masks[1:], strict=True):
        q, k, v = rows.unflatten(1, (count, length)).unbind(3)
        q = q * scale
        to_prefix = torch.einsum("bnshd,bthd->bnhst", q, k0)
        to_class = torch.einsum("bnshd,bnthd->bnhst", q, k) + mask
        weights = torch.cat([to_prefix, to_class], dim=-1).softmax(-1)
        to_prefix, to_class = weights.split([shared, length], dim=-1)
        mixed = torch.einsum("bnhst,bthd->bnshd", to_prefix, v0)
        mixed = mixed + torch.einsum("bnhst,bnthd->bnshd", to_class, v)
        out.append(mixed.flatten(3).flatten(1, 2))
    return torch.cat(out, dim=1)


def _run_checkpointed(run: Callable, context: Tensor, recompute: bool) -> Tensor:
    """Return run(context); with `recompute`, activations are recomputed in the backward pass."""
    if not (recompute and torch.is_grad_enabled() and context.requires_grad):
        return run(context)
    features = checkpoint(run, context, use_reentrant=False)
    features.register_hook(lambda _: _trim_memory())
    return features


def _trim_memory() -> None:
    """Return freed memory to the operating system.

    glibc does not reuse the large aligned blocks that torch frees for chunks of another size, so that the
    process would grow with every chunk. Call this only where sizes differ: with chunks of one size, the new
    allocation would take a fifth of the time.
    """
    if trim := _malloc_trim():
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, or None on other systems."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def inspect_tokenizer(backbone: Backbone) -> tuple[int, int]:
    """Return the number of tokens before a text (1 for CLIP, 0 for SigLIP) and the id of a word."""
    first, second = backbone.tokenize(["a", "b"])
    start = int((first != second).int().argmax())
    return start, int(first[start])


def _lay_out(
    words: Tensor, start: int, n_ctx: int, ahead: int, name_length: Tensor | int, word: int
) -> tuple[Tensor, Tensor]:
    """Insert slots for context tokens into the token ids of class names.

    Args:
        words: (C, L - M) token ids of "name." with start and end tokens.
        start: number of tokens before the name.
        n_ctx: M, the number of context tokens.
        ahead: number of context tokens before the name; the others follow it.
        name_length: (C, 1) tokens of each name, 0 where all context tokens are before it.
        word: token id for the slots, which is neither padding nor an end token.

    Returns:
        Token ids and context slots, both (C, L); the slot of other tokens is -1.
    """
    column = torch.arange(words.shape[1] + n_ctx, device=words.device).expand(len(words), -1)
    first = (column >= start) & (column < start + ahead)
    second_start = start + ahead + name_length
    second = (column >= second_start) & (column < second_start + n_ctx - ahead)
    slots = torch.where(first, column - start, torch.where(second, column - second_start + ahead, -1))
    source = (
        column
        - ahead * (column >= start + ahead)
        - (n_ctx - ahead) * (column >= second_start + n_ctx - ahead)
    )
    ids = words.gather(1, source.clamp(0, words.shape[1] - 1))
    return torch.where(slots < 0, ids, word), slots
