"""Distribute the encoders' work over the ranks that `torchrun` starts.

Every rank runs the same program with the same seed. Each rank encodes a part of the classes or images, and
all ranks gather the results, so training takes the same steps as in one process, up to the rounding of sums.
Only rank 0 writes files and prints. Without torchrun there is one rank, and these functions have no effect.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from .errors import UserError


def world_size() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until every rank has reached this call."""
    if world_size() > 1:
        distributed.barrier()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0 first and then on the others, which can read the files that it wrote."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the ranks that torchrun started in this block. Only rank 0 prints.

    Raises:
        UserError: there are more ranks than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or world_size() > 1:
        yield
        return
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(local)
    if sys.platform == "linux":
        # Each rank has its own session, so end it if torchrun is killed (PR_SET_PDEATHSIG).
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # torchrun notices a rank that died, and a rank may wait for hours for another one.
    distributed.init_process_group(timeout=timedelta(days=7))
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(contextlib.redirect_stderr(null))
        yield
    distributed.destroy_process_group()


def rank_indices(n: int) -> Tensor:
    """Return the indices of the items that this rank encodes, equally many on each rank.

    If n is not divisible by the world size, the first items are repeated.
    """
    return torch.arange(rank(), rank() + -(-n // world_size()) * world_size(), world_size()) % n


def gather_rows(rows: Tensor, n: int) -> Tensor:
    """Gather n rows from the rows (k, ...) of `rank_indices(n)` that each rank has; differentiable."""
    return _GatherRows.apply(rows)[:n]


def sum_gradients(context: Tensor) -> Tensor:
    """Return `context`, whose gradient becomes the sum of the gradients of all ranks."""
    return _SumGradients.apply(context)


def encode_sharded(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return encode(x) for a frozen encoder; each rank encodes its share of the rows."""
    if world_size() == 1:
        return encode(x)
    return gather_rows(encode(x[rank_indices(len(x)).to(x.device)]), len(x))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank computes the whole loss and therefore the whole gradient of its rows.
        return gradients[0].unflatten(0, (-1, world_size()))[:, rank()]


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Tensor) -> Tensor:
        return context.view_as(context)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total
