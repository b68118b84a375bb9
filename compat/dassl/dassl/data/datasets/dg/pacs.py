"""PACS (Li et al., ICCV 2017): pacs/images/DOMAIN/CLASS/*, pacs/splits/DOMAIN_{train,crossval}_kfold.txt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..base_dataset import Datum
from ..build import DATASET_REGISTRY
from ..domains import DomainDataset, listed

BROKEN = ("sketch/dog/n02103406_4068-1.png",)


@DATASET_REGISTRY.offer
class PACS(DomainDataset):
    """Trains and validates on the source domains' parts, tests on all of the target's."""

    dataset_dir = "pacs"
    domains = ("art_painting", "cartoon", "photo", "sketch")
    archive = "pacs.zip"
    data_url = "https://drive.google.com/uc?id=1m4X4fROCCXMO0lRLrr6Zz9Vb3974NWhE"

    def read(self, source: Sequence[str], target: Sequence[str]) -> dict[str, Any]:
        return {
            "train_x": self._part(source, ["train"]),
            "val": self._part(source, ["crossval"]),
            "test": self._part(target, ["train", "crossval"]),
        }

    def _part(self, names: Sequence[str], parts: Sequence[str]) -> list[Datum]:
        images, splits = (os.path.join(self.dataset_dir, folder) for folder in ("images", "splits"))
        return [
            item
            for domain, name in enumerate(names)
            for part in parts
            for item in listed(os.path.join(splits, f"{name}_{part}_kfold.txt"), images, domain, 1, BROKEN)
        ]
