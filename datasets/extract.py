"""Encode a data set into a feature file, to be used as the data set `features:FILE` (`dfzsl extract`)."""

from __future__ import annotations

import os
from typing import Any

import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY

from dfzsl.configs import dataset_config
from dfzsl.io.tensors import save_tensors
from dfzsl.utils import distributed
from dfzsl.utils.errors import UserError

from .base import ClassDataset
from .encoding import encode_datums
from .features import FeatureDatum


def open_dataset(data: str, root: str) -> ClassDataset:
    """Open a whole data set, with all classes and every image.

    Args:
        data: name of a config in configs/datasets, or KIND:PATH (folder:PATH, csv:PATH).
        root: data folder of a data set named by its config.
    """
    kind, _, path = data.partition(":")
    cfg = get_cfg_default()
    cfg.merge_from_file(str(dataset_config(kind)))
    cfg.merge_from_list(["DATASET.ROOT", path or root])
    return DATASET_REGISTRY.get(cfg.DATASET.NAME)(cfg)


def extract(
    dataset: ClassDataset,
    backbone: Any,
    output: str | os.PathLike[str],
    batch_size: int = 256,
    num_workers: int = 4,
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Encode a data set's images and class names into a feature file (see `Features`).

    Within torch.distributed every rank calls this and rank 0 writes.

    Raises:
        UserError: an image cannot be read, or the data set is a feature file already.
    """
    if isinstance(dataset.test[0], FeatureDatum):
        raise UserError(f"{dataset.dataset_dir} is a feature file already")
    tensors: dict[str, torch.Tensor] = {}
    parts = {"train": [] if dataset.test_only else dataset.train_x, "val": dataset.val, "test": dataset.test}
    for part, datums in parts.items():
        if datums:
            tensors[f"x_{part}"] = encode_datums(
                backbone, datums, backbone.transform, cache_dir, batch_size, num_workers, device
            )
            tensors[f"y_{part}"] = torch.tensor([datum.label for datum in datums])
    tensors["text"] = backbone.class_features(dataset.all_classnames, [dataset.template])
    new = set(dataset.new_classnames)
    tensors["new"] = torch.tensor([c for c, name in enumerate(dataset.all_classnames) if name in new])
    metadata = {
        "kind": "features",
        "classnames": dataset.all_classnames,
        "backbone": backbone.name,
        "weights": backbone.weights_id,
        "template": dataset.template,
    }
    if distributed.rank() == 0:
        save_tensors(output, tensors, metadata)
