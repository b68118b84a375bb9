"""Provide a loader of features that replaces Dassl's loader of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class FeatureLoader:
    """Load batches of features in Dassl's form: {"img": (B, d), "label", "domain", "impath", "index"}.

    Args:
        features: (n, d), in memory or mapped from a cache file; batches are float32.
        labels: (n,).
        batch_size: features per batch.
        shuffle: use a new random order in each pass.
        generator: generator of the order.
        drop_last: drop an incomplete last batch.

    Raises:
        ValueError: there are no features, or not as many labels.
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
            raise ValueError(
                f"{len(features)} features and {len(labels)} labels: the numbers must be equal and positive"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.dataset = torch.utils.data.TensorDataset(features, labels)
        self.features, self.labels, self.batch_size = features, labels, batch_size
        self.shuffle, self.generator, self.drop_last = shuffle, generator, drop_last

    def __len__(self) -> int:
        batches, rest = divmod(len(self.features), self.batch_size)
        return batches + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        n = len(self.features)
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        for index in order.split(self.batch_size)[: len(self)]:
            rows = index.to(self.features.device)
            yield {
                "img": self.features[rows].float(),
                "label": self.labels[rows],
                "domain": torch.zeros_like(index),
                "impath": [""] * len(index),
                "index": index,
            }
