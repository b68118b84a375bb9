"""Tensorboard, where it is installed."""

from __future__ import annotations

import warnings
from typing import Any

__all__ = ["SummaryWriter"]


class SummaryWriter:
    """torch.utils.tensorboard's SummaryWriter; without tensorboard, a writer that ignores all calls.

    tensorboard takes seconds to import, so this waits until a writer is made.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            from torch.utils import tensorboard
        except ImportError:
            warnings.warn("tensorboard is not installed: no event files are written", stacklevel=2)
            return super().__new__(cls)
        return tensorboard.SummaryWriter(*args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None
