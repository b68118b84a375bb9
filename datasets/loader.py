"""Batches of features in the place of batches of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class FeatureLoader:
    """Batches of features in the form of Dassl's: {"img": (B, d), "label", "domain", "impath", "index"}.

    features (n, d) and labels (n,) stay where they are, in memory or mapped from a file of the cache; what
    leaves is float32. If `shuffle`, `generator` orders each pass anew.
    Raises ValueError if there is nothing to serve.
    """

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> None:
        if not 0 < len(features) == len(labels):
            raise ValueError(f"{len(features)} features with {len(labels)} labels: nothing to serve")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.dataset = torch.utils.data.TensorDataset(features, labels)
        self.features, self.labels, self.batch_size = features, labels, batch_size
        self.shuffle, self.generator, self.drop_last = shuffle, generator, drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.features), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        n = len(self.features)
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        for index in order.split(self.batch_size)[: len(self)]:
            place = index.to(self.features.device)
            yield {
                "img": self.features[place].float(),
                "label": self.labels[place],
                "domain": torch.zeros_like(index),
                "impath": [""] * len(index),
                "index": index,
            }
