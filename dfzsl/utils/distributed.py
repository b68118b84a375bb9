"""Share the work of the encoders between the processes that `torchrun` starts.

Every rank runs the same program with the same seed. Where an encoder runs, each rank encodes a part of the
classes or images, and all get the whole; so they take the same steps as one process would, up to the
rounding of sums. Only the first rank writes files and prints. Outside of torchrun there is one rank, and
every function here does nothing.
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
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's rank; the first is 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Until every rank is here."""
    if world_size() > 1:
        distributed.barrier()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """The first rank runs the block; the others run it once that has left its files."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the ranks that torchrun started; all but the first are silent.

    Raises UserError where there are more ranks than GPUs.
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
        # Ranks run in sessions of their own: where torchrun is killed, they go with it (PR_SET_PDEATHSIG).
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # A rank that dies is torchrun's to notice; one that waits may wait for hours of another's work.
    distributed.init_process_group(timeout=timedelta(days=7))
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    distributed.destroy_process_group()


def rank_indices(n: int) -> Tensor:
    """Which of n items this rank encodes: equally many on each; the first items fill the last places up."""
    return torch.arange(rank(), rank() + -(-n // world_size()) * world_size(), world_size()) % n


def gather_rows(rows: Tensor, n: int) -> Tensor:
    """All n rows, from the rows (k, ...) of `rank_indices(n)` that each rank has; differentiable."""
    return _Gathered.apply(rows)[:n]


def sum_gradients(context: Tensor) -> Tensor:
    """`context` itself; its gradient is the sum over the ranks, of which each used it for its share."""
    return _Shared.apply(context)


def encode_sharded(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """encode(x) of frozen `encode`, each rank encoding its share of the rows."""
    if world_size() == 1:
        return encode(x)
    return gather_rows(encode(x[rank_indices(len(x)).to(x.device)]), len(x))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank computes the whole loss, and so has the gradient of its rows already.
        return gradients[0].unflatten(0, (-1, world_size()))[:, rank()]


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Tensor) -> Tensor:
        return context.view_as(context)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total
