"""Image backbones by name. None is shipped: register your own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..utils import Registry, check_availability

BACKBONE_REGISTRY = Registry("BACKBONE")


class Backbone(nn.Module):
    """A module from images (B, 3, H, W) to features (B, out_features)."""

    @property
    def out_features(self) -> int | None:
        """Width of the features; a subclass sets `_out_features`."""
        return getattr(self, "_out_features", None)


def build_backbone(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Call what is registered under `name` with the keyword arguments (`pretrained` among them)."""
    check_availability(name, BACKBONE_REGISTRY.registered_names())
    if verbose:
        print(f"Backbone: {name}")
    return BACKBONE_REGISTRY.get(name)(**kwargs)
