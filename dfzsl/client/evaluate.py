"""What a classifier is worth on labelled pictures or features: base, new, all classes at once."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor

from dfzsl.datasets.labeled_images import LabeledFeatures, read_labeled_features
from dfzsl.io.results import harmonic_mean
from dfzsl.trainers.clip.backbone import Backbone
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.utils.errors import UserError

from .encoder import load_encoder


@dataclass(repr=False)
class Evaluation:
    """Accuracies in percent; NaN where there is no picture of such a class.

    Attributes:
        base, new: among the base and among the new classes alone (base-to-new); h: their harmonic mean.
        joint_base, joint_new: of the same pictures among all classes at once (generalized); joint_h.
        confusion: (C, C) counts, true class by predicted one among all `classnames`.
        wrong: what is wrong with the pictures that could not be read.
    """

    base: float
    new: float
    joint_base: float
    joint_new: float
    confusion: Tensor
    classnames: list[str]
    wrong: list[str]

    @property
    def h(self) -> float:
        return harmonic_mean(self.base, self.new)

    @property
    def joint_h(self) -> float:
        return harmonic_mean(self.joint_base, self.joint_new)

    def __repr__(self) -> str:
        parts = f"base {self.base:.1f}, new {self.new:.1f}, H {self.h:.1f}"
        return f"Evaluation({parts}; among all classes H {self.joint_h:.1f})"

    def table(self) -> str:
        rows = [
            ("base", self.base, self.joint_base),
            ("new", self.new, self.joint_new),
            ("H", self.h, self.joint_h),
        ]
        shown = [
            (name, *("-" if value != value else f"{value:.1f}" for value in values)) for name, *values in rows
        ]
        return tabulate(
            shown,
            headers=("%", "within its part", "among all classes"),
            disable_numparse=True,
            colalign=("left", "right", "right"),
        )


def evaluate(
    classifier: Classifier,
    data: str | os.PathLike[str] | LabeledFeatures,
    backbone: Backbone | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 4,
    device: str | torch.device = "cpu",
    quiet: bool = True,
) -> Evaluation:
    """Try a classifier on labelled pictures or features: a folder by class, or x_test of a feature file.

    See `labeled_images.read_labeled_features`. Raises UserError for a class that the classifier does
    not know, and for data that are none.
    """
    if not isinstance(data, LabeledFeatures):
        data = read_labeled_features(
            data,
            lambda: backbone or load_encoder(classifier, device=device),
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            quiet=quiet,
        )
    mine = f"{classifier.backbone} ({classifier.weights})"
    if data.backbone and classifier.backbone and data.backbone != mine:
        raise UserError(f"the features are those of {data.backbone}, the classifier reads {mine}")
    if (found := data.features.shape[1]) != (d := classifier.weight.shape[1]):
        raise UserError(f"features of {found} dimensions, the classifier reads {d}")
    place = _places(classifier, data)
    return _measured(classifier, data.features, place[data.labels], data.errors)


def _measured(classifier: Classifier, x: Tensor, y: Tensor, wrong: list[str]) -> Evaluation:
    names, is_new = classifier.classnames, classifier.is_new.to(y.device)
    everything = classifier.logits(x)
    joint = everything.argmax(1)
    within = everything.masked_fill(is_new[None] != is_new[y][:, None], -torch.inf).argmax(1)

    def percent(right: Tensor, new: bool) -> float:
        of = right[is_new[y] == new]
        return 100 * int(of.sum()) / len(of) if len(of) else float("nan")

    confusion = torch.bincount(y * len(names) + joint, minlength=len(names) ** 2).view(len(names), -1)
    base, new, joint_base, joint_new = (
        percent(predicted == y, new) for predicted in (within, joint) for new in (False, True)
    )
    return Evaluation(base, new, joint_base, joint_new, confusion.cpu(), names, wrong)


def _places(classifier: Classifier, data: LabeledFeatures) -> Tensor:
    """The classifier's row of each class of the data that is there. In folders a space may be written _."""
    rows = {name.replace("_", " "): row for row, name in enumerate(classifier.classnames)}
    rows |= {name: row for row, name in enumerate(classifier.classnames)}
    there = set(data.labels.tolist())
    found = [rows.get(name, rows.get(name.replace("_", " "), -1)) for name in data.classnames]
    if missing := [data.classnames[label] for label in sorted(there) if found[label] < 0]:
        raise UserError(
            f"the classifier has no class '{missing[0]}' ({len(missing)} of {len(there)} are unknown): say "
            "in classnames.txt how a folder's class is called, or add it with dfzsl add"
        )
    return torch.tensor(found)
