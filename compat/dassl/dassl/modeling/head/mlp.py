"""A multi-layer perceptron as a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .build import HEAD_REGISTRY

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


class MLP(nn.Module):
    """For each of `hidden_layers`: linear, batch normalisation, activation, dropout."""

    def __init__(
        self,
        in_features: int,
        hidden_layers: Sequence[int],
        activation: str = "relu",
        bn: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not hidden_layers:
            raise ValueError("an MLP needs at least one hidden layer (MODEL.HEAD.HIDDEN_LAYERS)")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, but got {activation}")
        layers: list[nn.Module] = []
        for width in hidden_layers:
            layers.append(nn.Linear(in_features, width))
            if bn:
                layers.append(nn.BatchNorm1d(width))
            layers.append(ACTIVATIONS[activation](inplace=True))
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            in_features = width
        self.out_features = in_features
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Any) -> Any:
        return self.mlp(x)


@HEAD_REGISTRY.register()
def mlp(**kwargs: Any) -> MLP:
    return MLP(**kwargs)
