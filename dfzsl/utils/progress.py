"""Provide progress bars that can be hidden together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_HIDDEN = ContextVar("hidden", default=False)


@contextlib.contextmanager
def hide_progress_bars(quiet: bool = True) -> Iterator[None]:
    """Hide all progress bars in this block, unless `quiet` is false."""
    token = _HIDDEN.set(quiet)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


def progress_bar(
    iterable: Iterable | None = None, desc: str = "", leave: bool = False, **settings: Any
) -> tqdm:
    """Create a tqdm progress bar.

    Args:
        iterable: iterable to wrap, or None for manual updates.
        desc: label of the bar.
        leave: keep the bar on the terminal after the last step.
        settings: further arguments of tqdm.
    """
    if _HIDDEN.get():
        settings["disable"] = True
    return tqdm(iterable, desc, leave=leave, **settings)
