"""Provide the classifier of base and new classes (a cosine softmax), and train its class weights.

    logits(x) = (unit(x + shift) . w_c + b_c) / temperature

`shift` aligns image features with text (FLPT). x . w_c is a cosine where w_c is L2-normalized. b_c is the
teacher's bias for a base class and the stacking bias for a new class.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.io.class_names import check_class_names
from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import UserError, unknown_name
from dfzsl.utils.progress import progress_bar

from ..clip.class_prompts import ClassPrompts
from .decision import Decision

TEMPERATURE = 0.01  # 1 / logit_scale of CLIP
TEMPLATE = "a photo of a {}."
METADATA_TYPES = {"temperature": float | int, "new_bias": float | int, "backbone": str, "weights": str}
# L2 norms of class weights. Logits are in units of the cosine, so norms are near 1.
MIN_WEIGHT_NORM, MAX_WEIGHT_NORM = 1e-3, 1e3


@dataclass(frozen=True)
class ClassWeights:
    """Class weights of base and new classes.

    Attributes:
        base_weight: (C, d) weights of the base classes.
        new_weight: (K, d) weights of the new classes.
        base_bias: (C,) biases of the base classes, in units of the cosine.
        text_map: see `Classifier`.
        text_shift: see `Classifier`.
        teacher_weight: mixing weight g of the teacher; None where class weights are trained.
        reason: why this mixing weight was chosen.
    """

    base_weight: Tensor
    new_weight: Tensor
    base_bias: Tensor
    text_map: Tensor | None = None
    text_shift: Tensor | None = None
    teacher_weight: float | None = None
    reason: str = ""


@dataclass(repr=False)
class Classifier:
    """Cosine classifier of base and new classes on the L2-normalized features of a backbone.

    Attributes:
        weight: (C, d) class weights.
        classnames: C unique class names.
        is_new: (C,) bool, whether a class is new.
        bias: (C,) biases in units of the cosine.
        temperature: of the softmax.
        shift: (d,) vector that is added to every L2-normalized image feature, or None.
        text_map: (d, d) map from the text embedding t of a class that is added later to its weight vector
            t @ text_map + text_shift; None: the weight vector is t.
        text_shift: (d,) offset of this map, or None.
        new_bias: bias of classes that are added later.
        backbone: open_clip's name of the image encoder, or "".
        weights: pretrained tag of the image encoder, or the hash of its weights file.
        prompts: prompts of classes that are added later.
        decision: summary of how the classifier was built; None for a classifier that was loaded from a file.

    Raises:
        UserError: shapes do not match, a class name repeats, or a value is not finite or out of range.
    """

    weight: Tensor
    classnames: list[str]
    is_new: Tensor
    bias: Tensor
    temperature: float = TEMPERATURE
    shift: Tensor | None = None
    text_map: Tensor | None = None
    text_shift: Tensor | None = None
    new_bias: float = 0.0
    backbone: str = ""
    weights: str = ""
    prompts: ClassPrompts = field(default_factory=lambda: ClassPrompts((TEMPLATE,)))
    decision: Decision | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        new = int(self.is_new.sum())
        return (
            f"Classifier({len(self.classnames) - new} base + {new} new classes, d = {self.weight.shape[1]}, "
            f"{self.backbone or 'features'} ({self.weights}))"
        )

    def __post_init__(self) -> None:
        classes, shape = len(check_class_names(self.classnames, "a classifier")), tuple(self.weight.shape)
        is_valid = len(shape) == 2 and 0 not in shape and self.is_new.shape == self.bias.shape == (classes,)
        if not is_valid or shape[0] != classes:
            raise UserError(
                "a classifier needs one weight vector, is_new flag and bias per class; "
                f"got weights of shape {shape} and {classes} class names"
            )
        if any(s is not None and s.shape != shape[1:] for s in (self.shift, self.text_shift)):
            raise UserError("shift and text_shift of a classifier must have the dimension of its weights")
        if (self.text_map is None) != (self.text_shift is None) or (
            self.text_map is not None and self.text_map.shape != (shape[1], shape[1])
        ):
            raise UserError("text_map of a classifier must be a (d, d) matrix, with a text_shift (d,)")
        norm = torch.linalg.vector_norm(self.weight.float(), dim=1)
        if (invalid := ~((norm > MIN_WEIGHT_NORM) & (norm < MAX_WEIGHT_NORM))).any():
            index = int(invalid.nonzero()[0])
            raise UserError(
                f"the classifier's weight vector of class '{self.classnames[index]}' has norm "
                f"{float(norm[index]):.3g}; it must be finite and near 1"
            )
        if not 0 < self.temperature < math.inf:
            raise UserError(f"classifier temperature must be greater than 0, got {self.temperature}")
        if not (math.isfinite(self.new_bias) and torch.isfinite(self.bias).all()):
            raise UserError("classifier biases must be finite")

    def logits(self, x: Tensor, classnames: Sequence[str] | None = None) -> Tensor:
        """Compute logits of image features.

        Args:
            x: (n, d) image features.
            classnames: classes of the columns, in this order; by default all classes.

        Returns:
            (n, C) logits.

        Raises:
            UserError: the classifier does not have a class of this name.
        """
        weight, bias = self.weight.to(x), self.bias.to(x)
        if classnames is not None and list(classnames) != self.classnames:
            indices = self._indices(classnames)
            weight, bias = weight[indices], bias[indices]
        x = F.normalize(x, dim=1)
        if self.shift is not None:
            x = F.normalize(x + self.shift.to(x), dim=1)
        return (x @ weight.T + bias) / self.temperature

    def _indices(self, classnames: Sequence[str]) -> list[int]:
        """Return the indices of classes."""
        index = {name: number for number, name in enumerate(self.classnames)}
        for name in classnames:
            if name not in index:
                raise unknown_name("class", name, index)
        return [index[name] for name in classnames]

    def extend(self, classnames: Sequence[str], text: Tensor) -> Classifier:
        """Return a classifier with K more new classes; the weights of its classes do not change.

        Args:
            classnames: K names that the classifier does not have.
            text: (K, d) L2-normalized text embeddings of these classes.

        Raises:
            UserError: a name repeats, or the shape of `text` does not match.
        """
        check_class_names(classnames, "the new classes", taken=self.classnames)
        if text.shape != (len(classnames), self.weight.shape[1]):
            raise UserError(
                f"{len(classnames)} new classes need text features ({len(classnames)}, "
                f"{self.weight.shape[1]}), got {tuple(text.shape)}"
            )
        weight = text.to(self.weight)
        if self.text_map is not None and self.text_shift is not None:
            weight = weight @ self.text_map.to(weight) + self.text_shift.to(weight)
        is_new = torch.ones(len(classnames), dtype=torch.bool, device=self.weight.device)
        return replace(
            self,
            weight=torch.cat([self.weight, weight]),
            classnames=[*self.classnames, *classnames],
            is_new=torch.cat([self.is_new, is_new]),
            bias=torch.cat([self.bias, torch.full_like(is_new, self.new_bias, dtype=self.bias.dtype)]),
        )

    def add(
        self, classnames: Sequence[str], backbone: Any, prompts: ClassPrompts | None = None
    ) -> Classifier:
        """Return a classifier with more new classes, which are given by name.

        Args:
            classnames: K names that the classifier does not have.
            backbone: the backbone of the classifier.
            prompts: prompts of these classes; by default those of the classifier. A tuned context does not
                change.

        Raises:
            UserError: a name repeats, or a class has no prompt.
        """
        if prompts is None:
            prompts = self.prompts
        else:
            prompts = replace(prompts, context=self.prompts.context, context_init=self.prompts.context_init)
        return replace(self.extend(classnames, prompts.features(backbone, classnames)), prompts=prompts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the classifier to a safetensors file."""
        tensors = {"weight": self.weight.float(), "is_new": self.is_new, "bias": self.bias.float()}
        for name in ("shift", "text_map", "text_shift"):
            if (value := getattr(self, name)) is not None:
                tensors[name] = value.float()
        if self.prompts.context is not None:
            tensors["context"] = self.prompts.context.float()
        fields = ("classnames", "temperature", "new_bias", "backbone", "weights")
        metadata = {
            "kind": "classifier",
            **{name: getattr(self, name) for name in fields},
            "templates": list(self.prompts.templates),
            "prompts": self.prompts.source,
            "words": self.prompts.context_init,
        }
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """Load a file of `save`.

        Raises:
            UserError: the file is missing, broken or not a classifier.
        """
        tensors, metadata = load_tensors(path, "classifier")
        metadata.pop("kind")
        try:
            names = check_class_names(metadata.pop("classnames"), "the class names")
            templates = check_class_names(metadata.pop("templates", [TEMPLATE]), "the prompt templates")
            source, context_init = (str(metadata.pop(name, "")) for name in ("prompts", "words"))
            prompts = ClassPrompts(tuple(templates), {}, source, tensors.pop("context", None), context_init)
            if not all(isinstance(value, METADATA_TYPES[name]) for name, value in metadata.items()):
                raise TypeError
            is_new = tensors.pop("is_new").bool()
            fields = {name: tensor.float() for name, tensor in tensors.items()}
            # Files of version 0.1 have a text shift only.
            if "text_shift" in fields and "text_map" not in fields:
                fields["text_map"] = torch.eye(fields["weight"].shape[1])
            return cls(classnames=names, is_new=is_new, prompts=prompts, **fields, **metadata)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{path}: an incomplete classifier file; build the classifier again") from None


def fit_class_weights(
    features: Tensor,
    labels: Tensor,
    init: Tensor,
    generator: torch.Generator,
    *,
    l2_to_init: float = 1.0,
    steps: int = 150,
    lr: float = 2e-3,
    anneal: bool = True,
    batch: int = 1024,
    log_prior: bool = True,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Train the class weights of a cosine softmax, starting from `init`.

    Minimizes CE(x . w_c / temperature + log p_c) + l2_to_init / 2 mean_c |w_c - init_c|^2, where p_c is the
    frequency of class c in the labels (logit adjustment, Menon et al., 2021). The weights of a class that
    `init` classifies well have almost no gradient and stay at `init`. The paper uses l2_to_init 0, lr 5e-5,
    batch 64 and anneal False.

    Args:
        features: (n, d) L2-normalized features.
        labels: (n,) classes, 0 to C - 1.
        init: (C, d) L2-normalized initial weights, usually text embeddings.
        generator: source of the random batches, on the device of the features.
        l2_to_init: L2 penalty on the distance from `init`.
        steps: number of Adam steps.
        lr: learning rate.
        anneal: whether the learning rate decays linearly to 0.
        batch: batch size.
        log_prior: whether logits are adjusted by the class frequencies.
        temperature: of the softmax.

    Returns:
        (C, d) L2-normalized weights.

    Raises:
        UserError: training diverged.
    """
    prior = torch.zeros(len(init), device=features.device)
    if log_prior:
        counts = torch.bincount(labels, minlength=len(init)).to(features)
        prior = (counts.clamp(min=1) / len(labels)).log()

    def loss(x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        logits = x @ (init + delta).T / temperature + prior
        return F.cross_entropy(logits, y) + 0.5 * l2_to_init * delta.square().sum(1).mean()

    delta = minimize_loss(
        loss,
        torch.zeros_like(init),
        features,
        labels,
        generator,
        steps=steps,
        lr=lr,
        anneal=anneal,
        batch=batch,
    )
    return F.normalize(init + delta, dim=1)


@torch.enable_grad()
def minimize_loss(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: Tensor,
    features: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    lr: float,
    batch: int,
    anneal: bool = True,
) -> Tensor:
    """Minimize `loss(x, y, parameter)` with Adam on random batches.

    Args:
        loss: scalar loss of a batch.
        start: initial parameter.
        features: (n, d) features.
        labels: (n,) labels.
        generator: source of the random batches, on the device of the features.
        steps: number of Adam steps.
        lr: learning rate.
        batch: batch size; all features are used at once where there are no more.
        anneal: whether the learning rate decays linearly to 0.

    Returns:
        The parameter after the last step.

    Raises:
        UserError: training diverged.
    """
    parameter = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=lr)
    for step in progress_bar(range(steps), "fit class weights", unit="step"):
        if anneal:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x, y = features, labels
        if len(features) > batch:
            indices = torch.randint(len(features), (batch,), device=features.device, generator=generator)
            x, y = features[indices], labels[indices]
        value = loss(x, y, parameter)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    if not torch.isfinite(parameter).all():
        raise UserError("the training of the class weights diverged; lower GENERATOR.CLASSIFIER_LR")
    return parameter.detach()
