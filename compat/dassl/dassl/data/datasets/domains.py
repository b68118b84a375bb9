"""What data sets of several domains share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from yacs.config import CfgNode

from ...utils import listdir_nohidden
from .base_dataset import DatasetBase, Datum


class DomainDataset(DatasetBase):
    """Under DATASET.ROOT/`dataset_dir`; DATASET.SOURCE_DOMAINS and TARGET_DOMAINS are among `domains`.

    A domain's number is its place in the given list. Images are listed in alphabetical order. Where the
    folder is missing and there is an `archive`, that file is downloaded from `data_url` (Google Drive).
    """

    dataset_dir = ""
    domains: Sequence[str] = ()
    archive = data_url = ""

    def __init__(self, cfg: CfgNode) -> None:
        root = os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT))
        self.dataset_dir = os.path.join(root, self.dataset_dir)
        if self.archive and not os.path.exists(self.dataset_dir):
            self.download_data(self.data_url, os.path.join(root, self.archive), from_gdrive=True)
        source, target = cfg.DATASET.SOURCE_DOMAINS, cfg.DATASET.TARGET_DOMAINS
        self.check_input_domains(source, target)
        super().__init__(**self.read(source, target))

    def read(self, source: Sequence[str], target: Sequence[str]) -> dict[str, Any]:
        """Lists of Datum: train_x, and train_u, val, test where there are any."""
        raise NotImplementedError


def by_class(
    directories: Iterable[str], domain: int, endings: str | tuple[str, ...] = "", lower: bool = True
) -> list[Datum]:
    """Images in directories that hold a folder a class; labels count the folders in alphabetical order."""
    return [
        Datum(
            impath=os.path.join(directory, folder, image),
            label=label,
            domain=domain,
            classname=folder.lower() if lower else folder,
        )
        for directory in directories
        for label, folder in enumerate(listdir_nohidden(directory, sort=True))
        for image in listdir_nohidden(os.path.join(directory, folder), sort=True)
        if image.endswith(endings)
    ]


def listed(path: str, images: str, domain: int, first: int = 0, without: Sequence[str] = ()) -> list[Datum]:
    """Images of a file with lines of "path label"; the last folder is the class, labels start at `first`."""
    with open(path, encoding="utf-8") as file:
        rows = [line.split() for line in file if line.strip()]
    return [
        Datum(
            impath=os.path.join(images, image),
            label=int(label) - first,
            domain=domain,
            classname=image.split("/")[-2],
        )
        for image, label in rows
        if image not in without
    ]
