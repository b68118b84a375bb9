"""Networks by name, for what is neither backbone nor head (DDAIG's generators, say)."""

from __future__ import annotations

from typing import Any

from ...utils import Registry, check_availability

NETWORK_REGISTRY = Registry("NETWORK")


def build_network(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Call what is registered under `name` with the keyword arguments."""
    check_availability(name, NETWORK_REGISTRY.registered_names())
    if verbose:
        print(f"Network: {name}")
    return NETWORK_REGISTRY.get(name)(**kwargs)
