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
    """Interface of `VirtualClasses` (trainers/recovery/virtual_classes.py)."""

    classnames: list[str]

    def sample(self, n_per_class: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]: ...

    def assigned_to_own_class(self, features: Tensor, labels: Tensor) -> Tensor: ...


class VirtualLoader:
    """Load batches of virtual features in Dassl's form, with L2-normalized features (B, d) as "img".

    Nothing is sampled before the first pass.

    Args:
        virtual: the recovered classes.
        batch_size: features per batch. An incomplete last batch is dropped, as Dassl does in training, unless
            it is the only one.
        num_per_class: features per class and pass.
        filter: replace samples that the recovered teacher does not assign to their own class. A class of
            which it accepts hardly any sample stays unfiltered.
        fresh: draw new samples in each pass, else only once.
        generator: generator of the samples and their order.

    Attributes:
        acceptance_rate: share of samples that the filter has accepted.
        unfiltered_classes: names of classes that stay unfiltered.
    """

    MAX_DRAWS_PER_SAMPLE = 50  # of a class, before it stays unfiltered
    MIN_ACCEPTANCE_RATE = 0.02  # of a class in the first draw, below which it stays unfiltered

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
        """Sample one pass.

        Returns:
            Features (C * num_per_class, d), class by class, and their labels.
        """
        num, classes = self.num_per_class, len(self.virtual.classnames)
        features, labels = self.virtual.sample(num, self.generator)
        if not self.filter:
            return features, labels
        accepted = self._accept(features, labels)
        feature_parts, label_parts = [features[accepted]], [labels[accepted]]
        counts = torch.bincount(labels[accepted], minlength=classes)
        filterable = counts >= self.MIN_ACCEPTANCE_RATE * num
        drawn = num
        while (
            filterable.any()
            and (missing := num - int(counts[filterable].min())) > 0
            and drawn < self.MAX_DRAWS_PER_SAMPLE * num
        ):
            more_features, more_labels = self.virtual.sample(missing, self.generator)
            drawn += missing
            accepted = self._accept(more_features, more_labels)
            feature_parts.append(more_features[accepted])
            label_parts.append(more_labels[accepted])
            counts += torch.bincount(more_labels[accepted], minlength=classes)
        # Classes with too few accepted samples get those of the first draw.
        if (unfiltered := counts < num).any():
            feature_parts, label_parts = [torch.cat(feature_parts)], [torch.cat(label_parts)]
            in_filtered, first = ~unfiltered[label_parts[0]], unfiltered[labels]
            feature_parts = [feature_parts[0][in_filtered], features[first]]
            label_parts = [label_parts[0][in_filtered], labels[first]]
            counts = torch.where(unfiltered, num, counts)
        self.unfiltered_classes = [self.virtual.classnames[c] for c in unfiltered.nonzero()[:, 0]]
        # The first samples of each class, in the order in which they were drawn.
        sorted_labels, order = torch.cat(label_parts).sort(stable=True)
        rank = torch.arange(len(sorted_labels)) - (counts.cumsum(0) - counts)[sorted_labels]
        return torch.cat(feature_parts)[order[rank < num]], torch.arange(classes).repeat_interleave(num)

    def _accept(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the mask of samples that the filter accepts, and count them."""
        kept = self.virtual.assigned_to_own_class(features, labels)
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
                f"The teacher assigns hardly any virtual feature of {count} classes to their class; "
                f"these classes stay unfiltered: {names}"
            )


class DataFreeManager:
    """Dassl's DataManager for a run that has a teacher in place of training images.

    It has the same attributes; the loaders are None, since the trainer builds its own.

    Args:
        cfg: the run's config.
        dataset: a data set without training images; by default the one that DATASET.NAME names.

    Raises:
        UserError: the data set has read training or validation images although TEACHER.FILE is set.
    """

    def __init__(self, cfg: Any, dataset: DatasetBase | None = None) -> None:
        self.dataset: Any = build_dataset(cfg) if dataset is None else dataset
        if self.dataset.train_x or self.dataset.train_u or self.dataset.val:
            raise UserError(
                f"DATASET.NAME {cfg.DATASET.NAME} reads training images although TEACHER.FILE is set; use a "
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
