"""VisDA-17 (Peng et al., 2017): visda17/{train,validation}/CLASS/*, each with image_list.txt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..build import DATASET_REGISTRY
from ..domains import DomainDataset, listed


@DATASET_REGISTRY.offer
class VisDA17(DomainDataset):
    """Synthetic images are the source, real ones the target; there is one domain of each."""

    dataset_dir = "visda17"
    domains = ("synthetic", "real")

    def read(self, source: Sequence[str], target: Sequence[str]) -> dict[str, Any]:
        folders = [os.path.join(self.dataset_dir, name) for name in ("train", "validation")]
        train, test = (listed(os.path.join(folder, "image_list.txt"), folder, 0) for folder in folders)
        return {"train_x": train, "train_u": test, "test": test}
