"""A sequence of modules that hand on several values."""

from __future__ import annotations

from typing import Any

from torch import nn


class Sequential2(nn.Sequential):
    """nn.Sequential whose modules take as many arguments as the one before returned in a tuple."""

    def forward(self, *inputs: Any) -> Any:  # type: ignore[override]
        given: Any = inputs
        for module in self:
            given = module(*given) if isinstance(given, tuple) else module(given)
        return given
