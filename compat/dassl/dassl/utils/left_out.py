"""Names of the original that are not here: whoever asks for one is told so."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any


def left_out(module: str, names: Collection[str]) -> Callable[[str], Any]:
    """A module's `__getattr__`: ImportError, in one line, for one of `names`; AttributeError for others."""

    def missing(name: str) -> Any:
        if name in names:
            raise ImportError(
                f"{module}.{name} is not in this drop-in for Dassl (see its README: what is left out)"
            )
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return missing
