"""What a backbone is."""

from __future__ import annotations

from torch import nn


class Backbone(nn.Module):
    """A module from images (B, 3, H, W) to features (B, out_features)."""

    @property
    def out_features(self) -> int | None:
        """Width of the features; a subclass sets `_out_features`."""
        return getattr(self, "_out_features", None)
