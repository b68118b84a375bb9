"""Provide virtual features in place of training images, and a data manager without training images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from dassl.data.datasets import DatasetBase, build_dataset
from torch import Tensor

from dfzsl.utils.errors import UserError
from dfzsl.utils.log import logger

from .loader import FeatureLoader


class Virtual(Protocol):
    """What the loader draws from: `VirtualClasses` of trainers/recovery/virtual_classes.py."""

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
        filter: keep only draws that the recovered teacher assigns to their own class (each is replaced). A
            class that it disowns keeps the draws it has, and is named in `unfiltered_classes`.
        fresh: draw anew for every pass, else once.
        generator: decides the draws and their order.

    Nothing is drawn before the first pass. `acceptance_rate` is the share of draws the filter has let through.
    """

    MAX_DRAWS_PER_SAMPLE = 50  # draws of a class for each one that is needed, before it is left unfiltered
    MIN_ACCEPTANCE_RATE = (
        0.02  # share that the filter lets through at first, below which a class is left unfiltered at once
    )

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
        self._num_drawn = self._num_kept = 0
        self.unfiltered_classes: list[str] = []
        self._pass: tuple[Tensor, Tensor] | None = None

    @property
    def acceptance_rate(self) -> float:
        return self._num_kept / max(self._num_drawn, 1)

    def draw(self) -> tuple[Tensor, Tensor]:
        """One pass: (features (C * num_per_class, d), labels), class after class."""
        need, classes = self.num_per_class, len(self.virtual.classnames)
        features, labels = self.virtual.sample(need, self.generator)
        if not self.filter:
            return features, labels
        owned = self._accept(features, labels)
        found, owner = [features[owned]], [labels[owned]]
        counts = torch.bincount(labels[owned], minlength=classes)
        wanted = counts >= self.MIN_ACCEPTANCE_RATE * need
        drawn = need
        while (
            wanted.any()
            and (missing := need - int(counts[wanted].min())) > 0
            and drawn < self.MAX_DRAWS_PER_SAMPLE * need
        ):
            more, of = self.virtual.sample(missing, self.generator)
            drawn += missing
            owned = self._accept(more, of)
            found.append(more[owned])
            owner.append(of[owned])
            counts += torch.bincount(of[owned], minlength=classes)
        if (disowned := counts < need).any():
            found, owner = [torch.cat(found)], [torch.cat(owner)]
            own, first = ~disowned[owner[0]], disowned[labels]
            found, owner = [found[0][own], features[first]], [owner[0][own], labels[first]]
            counts = torch.where(disowned, need, counts)
        self.unfiltered_classes = [self.virtual.classnames[c] for c in disowned.nonzero()[:, 0]]
        # The first ones of each class, in the order in which they were drawn.
        of, order = torch.cat(owner).sort(stable=True)
        place = torch.arange(len(of)) - (counts.cumsum(0) - counts)[of]
        return torch.cat(found)[order[place < need]], torch.arange(classes).repeat_interleave(need)

    def _accept(self, features: Tensor, labels: Tensor) -> Tensor:
        kept = self.virtual.kept(features, labels)
        self._num_drawn, self._num_kept = self._num_drawn + len(labels), self._num_kept + int(kept.sum())
        return kept

    def __len__(self) -> int:
        return max(self.num_per_class * len(self.virtual.classnames) // self.batch_size, 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._pass is None or self.fresh:
            first, self._pass = self._pass is None, self.draw()
            if first:
                self._log_pass()
        features, labels = self._pass
        yield from FeatureLoader(
            features,
            labels,
            self.batch_size,
            shuffle=True,
            generator=self.generator,
            drop_last=len(labels) >= self.batch_size,
        )

    def _log_pass(self) -> None:
        filtered = f"the teacher keeps {self.acceptance_rate:.1%}" if self.filter else "not filtered"
        classes = len(self.virtual.classnames)
        logger.info(f"Virtual features: {classes} classes x {self.num_per_class}, {filtered}")
        if self.unfiltered_classes:
            names = ", ".join(self.unfiltered_classes[:5]) + (
                ", ..." if len(self.unfiltered_classes) > 5 else ""
            )
            count = len(self.unfiltered_classes)
            logger.warning(
                f"The teacher assigns hardly any virtual feature of {count} classes to them; these stay "
                f"unfiltered: {names}"
            )


class DataFreeManager:
    """Dassl's DataManager for a run that has a teacher in the place of training images.

    It has the same attributes; the loaders are None, as the trainer makes its own.

    Args:
        cfg: the run's config.
        dataset: a data set without training images; by default the one that DATASET.NAME names.

    Raises:
        UserError: the data set has read training or validation images in spite of TEACHER.FILE.
    """

    def __init__(self, cfg: Any, dataset: DatasetBase | None = None) -> None:
        self.dataset: Any = build_dataset(cfg) if dataset is None else dataset
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
            name, images = cfg.DATASET.NAME or "of class names", len(self.dataset.test)
            logger.info(f"Data set {name}: {self.num_classes} classes, 0 training and {images:,} test images")
