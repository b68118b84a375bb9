"""Virtual features in the place of training images, and a data manager that has no training images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from dassl.data.datasets import build_dataset
from torch import Tensor

from dfzsl.errors import UserError

from .loader import FeatureLoader


class Virtual(Protocol):
    """What the loader draws from: `VirtualClasses` of trainers/recovery/virtual.py."""

    classnames: list[str]

    def sample(self, n_per_class: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]: ...

    def kept(self, features: Tensor, labels: Tensor) -> Tensor: ...


class VirtualLoader:
    """Stands for `train_loader_x`: batches as Dassl's, "img" holding unit features (B, d).

    Args:
        virtual: the recovered classes.
        batch_size: the last incomplete batch of a pass is dropped, as Dassl does in training, unless it is
            the only one.
        num_per_class: features of each class in a pass.
        filter: keep only draws that the recovered teacher assigns to their own class (each is replaced).
        fresh: draw anew for every pass, else once.
        generator: decides the draws and their order.

    `kept_share` is the share of draws the filter has let through so far. Raises UserError naming the class
    for which the filter lets through too little.
    """

    TRIES = 50  # draws of a class for each one that is needed, before giving up

    def __init__(
        self,
        virtual: Virtual,
        batch_size: int,
        num_per_class: int,
        filter: bool = True,
        fresh: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if batch_size < 1 or num_per_class < 1:
            raise UserError("batch size and RECOVERY.NUM_PER_CLASS must be at least 1")
        self.virtual, self.batch_size, self.num_per_class = virtual, batch_size, num_per_class
        self.filter, self.fresh, self.generator = filter, fresh, generator
        self._drawn = self._kept = 0
        self._features, self._labels = self.draw()
        filtered = f"the teacher keeps {self.kept_share:.1%}" if filter else "not filtered"
        print(f"Virtual features: {len(virtual.classnames)} classes x {num_per_class}, {filtered}")

    @property
    def kept_share(self) -> float:
        return self._kept / self._drawn

    def draw(self) -> tuple[Tensor, Tensor]:
        """One pass: (features (C * num_per_class, d), labels), class after class."""
        need = self.num_per_class
        features, labels = self.virtual.sample(need, self.generator)
        if not self.filter:
            self._drawn, self._kept = self._drawn + len(labels), self._kept + len(labels)
            return features, labels
        classes = len(self.virtual.classnames)
        found: list[Tensor] = []
        owners: list[Tensor] = []
        counts = torch.zeros(classes, dtype=torch.long)
        drawn = need
        while True:
            kept = self.virtual.kept(features, labels)
            self._drawn, self._kept = self._drawn + len(labels), self._kept + int(kept.sum())
            found.append(features[kept])
            owners.append(labels[kept])
            counts += torch.bincount(labels[kept], minlength=classes)
            missing = need - int(counts.min())
            if missing <= 0:
                # The first ones of each class, in the order in which they were drawn.
                owner, order = torch.cat(owners).sort(stable=True)
                place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
                return torch.cat(found)[order[place < need]], torch.arange(classes).repeat_interleave(need)
            if drawn >= self.TRIES * need:
                break
            features, labels = self.virtual.sample(missing, self.generator)
            drawn += missing
        short = int(counts.argmin())
        raise UserError(
            f"class '{self.virtual.classnames[short]}': the teacher keeps {int(counts[short])} of "
            f"{drawn} virtual features, {need} are needed; raise RECOVERY.THETA, or set "
            "RECOVERY.FILTER False"
        )

    def __len__(self) -> int:
        return max(len(self._labels) // self.batch_size, 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.fresh:
            self._features, self._labels = self.draw()
        yield from FeatureLoader(
            self._features,
            self._labels,
            self.batch_size,
            shuffle=True,
            generator=self.generator,
            drop_last=len(self._labels) >= self.batch_size,
        )


class DataFreeManager:
    """Dassl's DataManager for a run that has a teacher in the place of training images.

    It has the same attributes; the loaders are None, as the trainer makes its own. Raises UserError where the
    data set has read training or validation images in spite of TEACHER.FILE.
    """

    def __init__(self, cfg: Any) -> None:
        self.dataset = build_dataset(cfg)
        if self.dataset.train_x or self.dataset.train_u or self.dataset.val:
            raise UserError(
                f"DATASET.NAME {cfg.DATASET.NAME} reads training images although TEACHER.FILE is set; take a "
                "data set of dfzsl.datasets, or leave TEACHER.FILE empty"
            )
        self.train_loader_x = None
        self.train_loader_u = None
        self.val_loader = None
        self.test_loader = None
        self.num_classes = self.dataset.num_classes
        self.num_source_domains = len(cfg.DATASET.SOURCE_DOMAINS)
        self.lab2cname = self.dataset.lab2cname
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        if cfg.VERBOSE:
            print(f"Data set {cfg.DATASET.NAME}: {self.num_classes} classes, 0 training and", end=" ")
            print(f"{len(self.dataset.test):,} test images")
