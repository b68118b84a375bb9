"""Progress bars, all of which one switch hides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_HIDDEN = ContextVar("hidden", default=False)


@contextlib.contextmanager
def hide_progress_bars(quiet: bool = True) -> Iterator[None]:
    """No bar shows itself in this block, if `quiet`."""
    token = _HIDDEN.set(quiet)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


def progress_bar(
    iterable: Iterable | None = None, desc: str = "", leave: bool = False, **settings: Any
) -> tqdm:
    """tqdm's bar, which goes when its part of the work is done unless it is to `leave` its line."""
    if _HIDDEN.get():
        settings["disable"] = True
    return tqdm(iterable, desc, leave=leave, **settings)
