"""Digits-DG (Zhou et al., AAAI 2020): digits_dg/DOMAIN/{train,val}/CLASS/*.jpg."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..base_dataset import Datum
from ..build import DATASET_REGISTRY
from ..domains import DomainDataset, by_class


@DATASET_REGISTRY.offer
class DigitsDG(DomainDataset):
    """Trains and validates on the source domains' parts, tests on all of the target's."""

    dataset_dir = "digits_dg"
    domains: Sequence[str] = ("mnist", "mnist_m", "svhn", "syn")
    archive = "digits_dg.zip"
    data_url = "https://drive.google.com/uc?id=15V7EsHfCcfbKgsDmzQKj_DfXt_XYp_P7"

    def read(self, source: Sequence[str], target: Sequence[str]) -> dict[str, Any]:
        train, val = (self.read_data(self.dataset_dir, source, part) for part in ("train", "val"))
        return {"train_x": train, "val": val, "test": self.read_data(self.dataset_dir, target, "all")}

    @staticmethod
    def read_data(dataset_dir: str, input_domains: Sequence[str], split: str) -> list[Datum]:
        """split: train, val or all, the one after the other."""
        parts = ["train", "val"] if split == "all" else [split]
        return [
            item
            for domain, name in enumerate(input_domains)
            for item in by_class([os.path.join(dataset_dir, name, part) for part in parts], domain, ".jpg")
        ]
