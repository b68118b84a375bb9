"""VLCS (Torralba and Efros, CVPR 2011): VLCS/DOMAIN/{train,crossval,test}/CLASS/*.jpg."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..base_dataset import Datum
from ..build import DATASET_REGISTRY
from ..domains import DomainDataset, by_class


@DATASET_REGISTRY.offer
class VLCS(DomainDataset):
    """Trains and validates on the source domains' parts, tests on the target's. Folders are in capitals."""

    dataset_dir = "VLCS"
    domains = ("caltech", "labelme", "pascal", "sun")
    archive = "vlcs.zip"
    data_url = "https://drive.google.com/uc?id=1r0WL5DDqKfSPp9E3tRENwHaXNs1olLZd"

    def read(self, source: Sequence[str], target: Sequence[str]) -> dict[str, Any]:
        parts = {"train_x": (source, "train"), "val": (source, "crossval"), "test": (target, "test")}
        return {name: self._part(*part) for name, part in parts.items()}

    def _part(self, names: Sequence[str], part: str) -> list[Datum]:
        return [
            item
            for domain, name in enumerate(names)
            for item in by_class([os.path.join(self.dataset_dir, name.upper(), part)], domain, ".jpg")
        ]
