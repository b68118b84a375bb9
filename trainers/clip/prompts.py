"""Context tokens that are learned, and the text encoder that runs them: exact, and fast where it can be.

A prompt is `[start] v_1 .. v_M [class name] . [end]` with learned vectors v (Zhou et al., CoOp, IJCV 2022).
CLIP's text transformer is causal: what stands after the end token cannot matter, and positions before the
first class name are the same for every class. So those are run once, and of each class only the tokens from
its name to its end. The rows of all classes lie behind one another in one matrix, with next to no padding.
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
# Padding tolerated where classes of different lengths share one attention call: a GPU would rather compute
# twice as much than be called twice as often.
PADDING_ON_CPU, PADDING_ON_GPU = 1 / 8, 1.0


Groups = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Block:
    """Rows of one text encoder call: the shared prefix, then classes with padding at most at their ends.

    Attributes:
        order: (n,) the classes, in the order of their rows.
        ids, slots, positions: (R,) of each row: token id, context vector in its place (-1: none), position.
        owner: (R,) the class of each row, 0 in the prefix.
        groups: (classes, length) of consecutive rows with the same length.
        masks: causal masks (length, length), to be added to scores: of the prefix, then of each group.
        last: (n,) the row of each class's end token.
    """

    order: Tensor
    ids: Tensor
    slots: Tensor
    positions: Tensor
    owner: Tensor
    groups: tuple[tuple[int, int], ...]
    masks: tuple[Tensor, ...]
    last: Tensor


class Prompts:
    """The token layout of one prompt a class, and its text features for any context.

    Args:
        backbone: the frozen model.
        classnames: C names; "_" counts as a blank.
        n_ctx: M, the number of context tokens.
        position: where the class name stands: after the context, in its middle or before it.
        class_specific: each class has its own context vectors, so that no prefix but the start is shared.

    Raises UserError for an empty or repeated name, a name that leaves no room for the context, and an
    `n_ctx` larger than the text tower.
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
            raise UserError(f"unknown class token position '{position}'; known: {', '.join(POSITIONS)}")
        if not classnames:
            raise UserError("no class names: nothing to make prompts of")
        names = [name.replace("_", " ") for name in check_class_names(classnames, "prompts")]
        tower = self.tower = backbone.text_tower
        self.autocast = backbone.autocast
        self.rows_at_once = backbone.rows_at_once
        self.compiled = backbone.compiled
        length = tower.context_length
        start, word = start_and_word(backbone)
        # Start token, a word, full stop, end token.
        if not 0 < n_ctx <= length - start - 3:
            raise UserError(
                f"{n_ctx} context tokens in the {length} positions of {backbone.name}: "
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
        """Tokens (C, 1) of each bare name."""
        bare, none = backbone.tokenize(names), backbone.tokenize([""])
        return (bare != backbone.pad_id).sum(1, keepdim=True) - (none != backbone.pad_id).sum()

    def encode(self, context: Tensor, deep: Iterable[Tensor] = ()) -> Tensor:
        """Unit text features (B, C, d) of B contexts: (B, M, w), or (B, C, M, w) where class-specific.

        Exact, whichever way the tower allows; differentiable in `context`. CoOp has B = 1, CoCoOp one
        context an image. `deep` are tokens (M, w) that take the context's places in the second layer, the
        third and so on; the tower must be `cacheable`.
        """
        if context.ndim == 3:
            context = context[:, None]
        if distributed.world_size() == 1:
            return self._encode(context, tuple(deep))
        classes = len(self.ids)
        context = distributed.sum_gradients(context)
        if self.class_specific:
            context = context[:, distributed.rank_indices(classes).to(context.device)]
        rows = self.my_share._encode(context, tuple(map(distributed.sum_gradients, deep)))
        return distributed.gather_rows(rows.transpose(0, 1), classes).transpose(0, 1)

    @functools.cached_property
    def my_share(self) -> Prompts:
        """The prompts of the classes that this rank encodes."""
        part = copy.copy(self)
        chosen = distributed.rank_indices(len(self.ids)).to(self.ids.device)
        part.ids, part.slots, part.end = self.ids[chosen], self.slots[chosen], self.end[chosen]
        return part

    def _encode(self, context: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """Unit text features (B, C, d) of contexts (B, C or 1, M, w)."""
        with self.autocast():
            fast = self.tower.cacheable
            features = self._encode_fast(context, deep) if fast else self._encode_plain(context)
        return F.normalize(features.float(), dim=-1)

    def _encode_fast(self, context: Tensor, deep: Sequence[Tensor]) -> Tensor:
        blocks = self.blocks
        run_layer = _compiled_layer() if self.compiled and torch.is_grad_enabled() else _run_layer
        parts = []
        for block in blocks:
            at_once = max(1, self.rows_at_once // len(block.ids))
            several = len(blocks) > 1 or len(context) > at_once
            run = functools.partial(_run_block, self.tower, block, run_layer, deep)
            parts.append(torch.cat([_recomputed(run, part, several) for part in context.split(at_once)]))
            if len(blocks) > 1:
                _give_back()
        order = torch.cat([block.order for block in blocks])
        return torch.cat(parts, dim=1)[:, order.argsort()]

    def _encode_plain(self, context: Tensor) -> Tensor:
        """All positions of every prompt: for towers that look both ways, or end somewhere else."""
        classes = len(self.ids)
        at_once = max(1, self.rows_at_once // self.ids.shape[1])
        several = len(context) * classes > at_once
        rows = []
        for one in context:
            for chosen in torch.arange(classes, device=one.device).split(at_once):
                rows.append(_recomputed(functools.partial(self._run_plain, chosen), one, several))
                if several:
                    _give_back()
        return torch.cat(rows).unflatten(0, (len(context), classes))

    def _run_plain(self, chosen: Tensor, context: Tensor) -> Tensor:
        """Features (n, d) of the chosen classes for one context (C or 1, M, w)."""
        return self.tower.project(self.tower.run(self.embeddings(chosen, context), self.ids[chosen]))

    def embeddings(self, chosen: Tensor, context: Tensor) -> Tensor:
        """Input embeddings (n, L, w), without positions, of chosen classes for a context (C or 1, M, w)."""
        slots = self.slots[chosen]
        owner = chosen[:, None].expand_as(slots) if len(context) > 1 else torch.zeros_like(slots)
        x = self.tower.embed(self.ids[chosen])
        return torch.where(slots[..., None] < 0, x, context[owner, slots.clamp(min=0)].to(x.dtype))

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """The rows of all prompts, shortest first, in blocks of at most `rows_at_once`."""
        return [self._block(order, groups) for order, groups in self._group()]

    def _group(self) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Cut the classes, sorted by length, into blocks, and each block into groups of nearly one length."""
        lengths = (self.end + 1 - self.shared).tolist()
        padding = PADDING_ON_CPU if self.ids.device.type == "cpu" else PADDING_ON_GPU
        order: list[int] = []
        groups: list[tuple[int, int]] = []
        rows = self.shared
        in_group = 0  # rows without padding of the group under way
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            length = lengths[index]
            if order and rows + length > self.rows_at_once:
                yield order, groups
                order, groups, rows = [], [], self.shared
            count = groups[-1][0] + 1 if groups else 1
            if groups and count * length <= (1 + padding) * (in_group + length):
                rows += count * length - groups[-1][0] * groups[-1][1]
                groups[-1] = (count, length)
                in_group += length
            else:
                groups.append((1, length))
                rows, in_group = rows + length, length
            order.append(index)
        yield order, groups

    def _block(self, order: list[int], groups: list[tuple[int, int]]) -> Block:
        device = self.ids.device
        prefix = torch.arange(self.shared)
        owner, positions = [torch.zeros_like(prefix)], [prefix]
        taken = 0
        for count, length in groups:
            classes = torch.tensor(order[taken : taken + count])
            owner.append(classes.repeat_interleave(length))
            positions.append((self.shared + torch.arange(length)).repeat(count))
            taken += count
        owners, places = torch.cat(owner).to(device), torch.cat(positions).to(device)
        chosen = torch.tensor(order, device=device)
        # Rows follow one another class by class, so a class's first row is where the lengths before it end.
        lengths = torch.tensor([length for count, length in groups for _ in range(count)], device=device)
        first = self.shared + lengths.cumsum(0) - lengths
        return Block(
            order=chosen,
            ids=self.ids[owners, places],
            slots=self.slots[owners, places],
            positions=places,
            owner=owners if self.class_specific else torch.zeros_like(owners),
            groups=tuple(groups),
            masks=tuple(
                torch.full((n, n), float("-inf"), device=device).triu(1)
                for n in (self.shared, *(length for _, length in groups))
            ),
            last=first + self.end[chosen] - self.shared,
        )


def _run_block(
    tower: TextTower, block: Block, run_layer: Callable, deep: Sequence[Tensor], context: Tensor
) -> Tensor:
    """Features (B, n, d) of one block for contexts (B, C or 1, M, w), `deep` (M, w) in later layers."""
    x = tower.embed(block.ids).expand(len(context), -1, -1)
    learned = (block.slots >= 0).nonzero()[:, 0]
    x = x.index_copy(1, learned, context[:, block.owner[learned], block.slots[learned]].to(x.dtype))
    x = x + tower.positions[block.positions]
    for number, layer in enumerate(tower.blocks):
        if 0 < number <= len(deep):
            mine = deep[number - 1][block.slots[learned]].to(x.dtype)
            x = x.index_copy(1, learned, mine.expand(len(x), -1, -1))
        # Of the last layer's rows only the end tokens are looked at.
        wanted = (block.last,) if layer is tower.blocks[-1] else ()
        x = run_layer(layer, x, block.groups, block.masks, *wanted)
    return tower.project(x)


def _run_layer(
    layer: Any, x: Tensor, groups: Groups, masks: Sequence[Tensor], wanted: Tensor | None = None
) -> Tensor:
    """One residual attention block on rows (B, R, w), for the `wanted` rows if not all."""
    attn = layer.attn
    qkv = F.linear(layer.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    mixed = _attend(qkv.unflatten(-1, (3, attn.num_heads, -1)), groups, masks)
    if wanted is not None:
        x, mixed = x[:, wanted], mixed[:, wanted]
    x = x + layer.ls_1(attn.out_proj(mixed))
    return x + layer.ls_2(layer.mlp(layer.ln_2(x)))


@functools.cache
def _compiled_layer() -> Callable:
    """`_run_layer` as fused kernels; all layers share them, each new set of classes makes its own."""
    return torch.compile(_run_layer)


def _attend(qkv: Tensor, groups: Groups, masks: Sequence[Tensor]) -> Tensor:
    """Causal attention of rows (B, R, 3, H, D) that hold a prefix and, behind it, classes that each see
    the prefix and themselves. Returns (B, R, w)."""
    shared, scale = len(masks[0]), qkv.shape[-1] ** -0.5
    prefix, *classes = qkv.split([shared, *(count * length for count, length in groups)], dim=1)
    q, k0, v0 = prefix.unbind(2)
    scores = torch.einsum("bshd,bthd->bhst", q * scale, k0) + masks[0]
    out = [torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v0).flatten(2)]
    for rows, (count, length), mask in zip(classes, groups, masks[1:], strict=True):
        q, k, v = rows.unflatten(1, (count, length)).unbind(3)
        q = q * scale
        before = torch.einsum("bnshd,bthd->bnhst", q, k0)
        within = torch.einsum("bnshd,bnthd->bnhst", q, k) + mask
        weights = torch.cat([before, within], dim=-1).softmax(-1)
        before, within = weights.split([shared, length], dim=-1)
        mixed = torch.einsum("bnhst,bthd->bnshd", before, v0) + torch.einsum("bnhst,bnthd->bnshd", within, v)
        out.append(mixed.flatten(3).flatten(1, 2))
    return torch.cat(out, dim=1)


def _recomputed(run: Callable, context: Tensor, several: bool) -> Tensor:
    """run(context); if one of several, with its activations dropped and recomputed for the gradient."""
    if not (several and torch.is_grad_enabled() and context.requires_grad):
        return run(context)
    features = checkpoint(run, context, use_reentrant=False)
    features.register_hook(lambda _: _give_back())
    return features


def _give_back() -> None:
    """Return freed memory to the system between chunks of different sizes.

    glibc keeps the large aligned blocks that torch has freed without using them for others, so that a process
    grows with every chunk. Where all are of one size, getting them anew takes a fifth of the time.
    """
    if trim := _malloc_trim():
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def start_and_word(backbone: Backbone) -> tuple[int, int]:
    """How many tokens the tokenizer puts before a text (1 for CLIP, 0 for SigLIP), and some word's id."""
    one, other = backbone.tokenize(["a", "b"])
    start = int((one != other).int().argmax())
    return start, int(one[start])


def _lay_out(
    words: Tensor, start: int, n_ctx: int, ahead: int, name_length: Tensor | int, word: int
) -> tuple[Tensor, Tensor]:
    """Token ids and context slots (C, L) of prompts from the tokens (C, L - M) of "name." alone.

    The first `ahead` of the M context tokens stand before the name, the others behind it; a slot has the
    id of some `word`, so that nobody takes it for padding or an end.
    """
    column = torch.arange(words.shape[1] + n_ctx, device=words.device).expand(len(words), -1)
    first = (column >= start) & (column < start + ahead)
    resume = start + ahead + name_length
    second = (column >= resume) & (column < resume + n_ctx - ahead)
    slots = torch.where(first, column - start, torch.where(second, column - resume + ahead, -1))
    source = column - ahead * (column >= start + ahead) - (n_ctx - ahead) * (column >= resume + n_ctx - ahead)
    ids = words.gather(1, source.clamp(0, words.shape[1] - 1))
    return torch.where(slots < 0, ids, word), slots
