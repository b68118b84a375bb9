"""Office-Home (Venkateswara et al., CVPR 2017): office_home/DOMAIN/CLASS/*."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..build import DATASET_REGISTRY
from ..domains import DomainDataset, by_class


@DATASET_REGISTRY.offer
class OfficeHome(DomainDataset):
    """Labelled images of the source domains; the target's are unlabelled, and the test set."""

    dataset_dir = "office_home"
    domains: Sequence[str] = ("art", "clipart", "product", "real_world")
    lower = True  # class names

    def read(self, source: Sequence[str], target: Sequence[str]) -> dict[str, Any]:
        parts = [
            [
                item
                for domain, name in enumerate(names)
                for item in by_class([os.path.join(self.dataset_dir, name)], domain, lower=self.lower)
            ]
            for names in (source, target)
        ]
        return {"train_x": parts[0], "train_u": parts[1], "test": parts[1]}
