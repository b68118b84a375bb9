"""Heads between backbone and classifier, by name."""

from __future__ import annotations

from typing import Any

from ...utils import Registry, check_availability

HEAD_REGISTRY = Registry("HEAD")


def build_head(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Call what is registered under `name` with the keyword arguments (MLP's)."""
    check_availability(name, HEAD_REGISTRY.registered_names())
    if verbose:
        print(f"Head: {name}")
    return HEAD_REGISTRY.get(name)(**kwargs)
