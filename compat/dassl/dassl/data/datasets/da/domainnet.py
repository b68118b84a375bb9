"""DomainNet (Peng et al., ICCV 2019): domainnet/DOMAIN/CLASS/*, domainnet/splits/DOMAIN_{train,test}.txt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..base_dataset import Datum
from ..build import DATASET_REGISTRY
from ..domains import DomainDataset, listed


@DATASET_REGISTRY.offer
class DomainNet(DomainDataset):
    """Train lists of the source are labelled, of the target unlabelled; the source's test lists validate."""

    dataset_dir = "domainnet"
    domains: Sequence[str] = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    splits, validates = "splits", True

    def read(self, source: Sequence[str], target: Sequence[str]) -> dict[str, Any]:
        parts = {
            "train_x": self._part(source, "train"),
            "train_u": self._part(target, "train"),
            "test": self._part(target, "test"),
        }
        return {**parts, "val": self._part(source, "test")} if self.validates else parts

    def _part(self, names: Sequence[str], part: str) -> list[Datum]:
        return [
            item
            for domain, name in enumerate(names)
            for item in listed(
                os.path.join(self.dataset_dir, self.splits, f"{name}_{part}.txt"), self.dataset_dir, domain
            )
        ]
