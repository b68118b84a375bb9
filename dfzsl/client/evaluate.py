"""Evaluate a classifier on labeled images or features, among base, new and all classes."""

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
    """Accuracies in percent; NaN if there are no images of such a class.

    Attributes:
        base: accuracy on images of base classes, among base classes (base-to-new protocol).
        new: accuracy on images of new classes, among new classes.
        joint_base: accuracy on images of base classes, among all classes (GZSL protocol).
        joint_new: accuracy on images of new classes, among all classes.
        confusion: counts of shape (C, C), true class by predicted class among all classes.
        classnames: names of the C classes.
        wrong: messages about images that could not be read.
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
        """Harmonic mean of `base` and `new`."""
        return harmonic_mean(self.base, self.new)

    @property
    def joint_h(self) -> float:
        """Harmonic mean of `joint_base` and `joint_new`."""
        return harmonic_mean(self.joint_base, self.joint_new)

    def __repr__(self) -> str:
        parts = f"base {self.base:.1f}, new {self.new:.1f}, H {self.h:.1f}"
        return f"Evaluation({parts}; among all classes H {self.joint_h:.1f})"

    def table(self) -> str:
        """Return the accuracies as a table."""
        rows = [
            ("base", self.base, self.joint_base),
            ("new", self.new, self.joint_new),
            ("H", self.h, self.joint_h),
        ]
        cells = [
            (name, *("-" if value != value else f"{value:.1f}" for value in values)) for name, *values in rows
        ]
        return tabulate(
            cells,
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
    """Evaluate a classifier on labeled images or features.

    Args:
        classifier: the classifier.
        data: a folder with one folder of images per class, a feature file with x_test and y_test, or what
            `labeled_images.read_labeled_features` returns.
        backbone: image encoder for a folder; by default the one that the classifier names.
        batch_size: images that are encoded at a time.
        num_workers: processes that decode images.
        device: device of the encoder.
        quiet: hide the progress bar.

    Returns:
        Accuracies and confusion matrix.

    Raises:
        UserError: the data cannot be read, do not fit the classifier, or have a class that it does not have.
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
    expected = f"{classifier.backbone} ({classifier.weights})"
    if data.backbone and classifier.backbone and data.backbone != expected:
        raise UserError(f"the features are those of {data.backbone}, the classifier reads {expected}")
    if (dim := data.features.shape[1]) != (expected_dim := classifier.weight.shape[1]):
        raise UserError(f"the features have {dim} dimensions, the classifier reads {expected_dim}")
    index = _classifier_labels(classifier, data)
    return _accuracies(classifier, data.features, index[data.labels], data.errors)


def _accuracies(classifier: Classifier, x: Tensor, y: Tensor, wrong: list[str]) -> Evaluation:
    names, is_new = classifier.classnames, classifier.is_new.to(y.device)
    logits = classifier.logits(x)
    joint = logits.argmax(1)
    within = logits.masked_fill(is_new[None] != is_new[y][:, None], -torch.inf).argmax(1)

    def accuracy(correct: Tensor, new: bool) -> float:
        subset = correct[is_new[y] == new]
        return 100 * int(subset.sum()) / len(subset) if len(subset) else float("nan")

    confusion = torch.bincount(y * len(names) + joint, minlength=len(names) ** 2).view(len(names), -1)
    base, new, joint_base, joint_new = (
        accuracy(predicted == y, new) for predicted in (within, joint) for new in (False, True)
    )
    return Evaluation(base, new, joint_base, joint_new, confusion.cpu(), names, wrong)


def _classifier_labels(classifier: Classifier, data: LabeledFeatures) -> Tensor:
    """Return the classifier's label of each class of the data, or -1 for a class without images.

    The name of a folder may have an underscore in place of a space.
    """
    label_of = {name.replace("_", " "): label for label, name in enumerate(classifier.classnames)}
    label_of |= {name: label for label, name in enumerate(classifier.classnames)}
    present = set(data.labels.tolist())
    labels = [label_of.get(name, label_of.get(name.replace("_", " "), -1)) for name in data.classnames]
    if missing := [data.classnames[label] for label in sorted(present) if labels[label] < 0]:
        raise UserError(
            f"the classifier has no class '{missing[0]}' ({len(missing)} of {len(present)} are unknown); map "
            "the folder to a class name in classnames.txt, or add the class with dfzsl add"
        )
    return torch.tensor(labels)
