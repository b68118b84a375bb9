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


def count() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def mine() -> int:
    """This process's rank; the first is 0."""
    return distributed.get_rank() if count() > 1 else 0


def wait() -> None:
    """Until every rank is here."""
    if count() > 1:
        distributed.barrier()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first rank runs the block; the others run it once that has left its files."""
    if mine() > 0:
        wait()
    yield
    if mine() == 0:
        wait()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the ranks that torchrun started; all but the first are silent.

    Raises UserError where there are more ranks than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or count() > 1:
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
        if mine() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    distributed.destroy_process_group()


def share(n: int) -> Tensor:
    """Which of n items this rank encodes: equally many on each; the first items fill the last places up."""
    return torch.arange(mine(), mine() + -(-n // count()) * count(), count()) % n


def gathered(rows: Tensor, n: int) -> Tensor:
    """All n rows, from the rows (k, ...) of `share(n)` that each rank has; differentiable."""
    return _Gathered.apply(rows)[:n]


def shared(context: Tensor) -> Tensor:
    """`context` itself; its gradient is the sum over the ranks, of which each used it for its share."""
    return _Shared.apply(context)


def encoded(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """encode(x) of frozen `encode`, each rank encoding its share of the rows."""
    if count() == 1:
        return encode(x)
    return gathered(encode(x[share(len(x)).to(x.device)]), len(x))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(count())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank computes the whole loss, and so has the gradient of its rows already.
        return gradients[0].unflatten(0, (-1, count()))[:, mine()]


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Tensor) -> Tensor:
        return context.view_as(context)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total
