"""Provide the teacher: the owner's classifier of base classes, and its fit on image features.

Clients query it through an oracle (oracle.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfzsl.io.class_names import check_class_names
from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import check_unit_rows, unit

from .logistic import fit_logistic_regression
from .teacher_card import TeacherCard, cross_validate

PAPER_STRENGTH = 0.316  # C of the paper's logistic regression


@dataclass(repr=False)
class Teacher:
    """A linear or cosine classifier on image features.

    Attributes:
        weight: (C, d) float32 class weights in the order of `classnames`.
        classnames: C unique class names.
        backbone: id of the image encoder whose features it reads.
        normalized: True for a cosine classifier (logits cos(x, w_c) + b_c), False for a linear one
            (x.w_c + b_c).
        bias: (C,) float32 intercepts b_c, or None for none.
        card: model card of the teacher, or None.

    Raises:
        UserError: shapes do not match, class names repeat, or values are zero or not finite.
    """

    weight: Tensor
    classnames: list[str]
    backbone: str = ""
    normalized: bool = True
    bias: Tensor | None = None
    card: TeacherCard | None = None

    def __repr__(self) -> str:
        kind = "cosine" if self.normalized else "linear"
        offset = "" if self.bias is None else " with intercepts"
        encoder = self.backbone or "unknown encoder"
        return f"Teacher({kind}{offset}, {len(self.weight)} classes, d = {self.weight.shape[1]}, {encoder})"

    def __post_init__(self) -> None:
        shape, names = tuple(self.weight.shape), len(self.classnames)
        if len(shape) != 2 or shape[0] != names or 0 in shape:
            raise UserError(f"a teacher needs one weight vector per class: got {shape} and {names} names")
        check_class_names(self.classnames, "the teacher")
        check_unit_rows(unit(self.weight), "the teacher", "weight vector", self.classnames)
        if self.bias is not None:
            if self.bias.shape != self.weight.shape[:1]:
                raise UserError(f"a teacher needs one intercept per class; got {tuple(self.bias.shape)}")
            if not torch.isfinite(self.bias).all():
                raise UserError("a teacher's intercepts must be finite")

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (n, C) of features x (n, d)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = self.weight.to(x)
        if self.normalized:
            x, weight = unit(x), unit(weight)
        logits = x @ weight.T
        return logits if self.bias is None else logits + self.bias.to(x)

    def cosine_scale_weights(self) -> tuple[Tensor, Tensor]:
        """Return class weights (C, d) and intercepts (C,) on the scale of cosines, with the same decisions.

        The weights of a cosine teacher are L2-normalized; those of a linear one have mean length 1.
        """
        bias = torch.zeros(len(self.weight)) if self.bias is None else self.bias
        if self.normalized:
            return unit(self.weight), bias
        length = torch.linalg.vector_norm(self.weight, dim=1).mean()
        return self.weight / length, bias / length

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a teacher file (safetensors)."""
        metadata = {
            "kind": "teacher",
            "classnames": list(self.classnames),
            "backbone": self.backbone,
            "normalized": self.normalized,
            "card": self.card and self.card.as_dict(),
        }
        tensors = {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}
        save_tensors(path, {name: tensor.float() for name, tensor in tensors.items()}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Teacher:
        """Load a file that `save` wrote. Raises UserError if it is missing, broken or not a teacher."""
        tensors, metadata = load_tensors(path, "teacher")
        weight, bias = tensors.get("weight"), tensors.get("bias")
        backbone, normalized = metadata.get("backbone", ""), metadata.get("normalized")
        if weight is None or not isinstance(backbone, str) or not isinstance(normalized, bool):
            raise UserError(f"{path}: incomplete teacher file; fit it again with TeacherZeroshot")
        try:
            names = check_class_names(metadata.get("classnames"), "the teacher")
            card = metadata.get("card")
            card = None if card is None else TeacherCard.from_dict(card, len(names))
            bias = None if bias is None else bias.float()
            return cls(weight.float(), names, backbone, normalized, bias, card)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def fit_teacher(
    features: Tensor,
    labels: Tensor,
    classnames: Sequence[str],
    backbone: str = "",
    *,
    C: float = PAPER_STRENGTH,
    text: Tensor | None = None,
    prompts: str = "",
    normalized: bool = True,
    balanced: bool = False,
    shots: int = 0,
    generator: torch.Generator | None = None,
) -> Teacher:
    """Fit a teacher by multinomial logistic regression without intercepts.

    The paper's teacher has C = 0.316 and no model card. At the optimum the class weights sum to zero, and w_c
    is proportional to sum_i (1[y_i = c] - p_ic) x_i: they determine how class means differ from each other,
    but not their common mean.

    Args:
        features: (n, d) L2-normalized image features.
        labels: (n,) integers below C.
        classnames: C class names.
        backbone: id of the image encoder.
        C: inverse L2 strength, as in scikit-learn.
        text: (C, d) L2-normalized text embeddings of the classes, or None. With text, C and the mixing weight
            are chosen by cross-validation and recorded in the model card of the teacher (teacher_card.py).
        prompts: description of the prompts of `text`, for the card.
        normalized: whether to serve a cosine classifier, as the paper does, or else the fitted linear one.
        balanced: whether to weight classes equally, whatever their sizes.
        shots: number of features per class to fit on, drawn with `generator`; 0 for all.
        generator: source of the draws of `shots`.

    Returns:
        The teacher.

    Raises:
        UserError: fewer than two classes, a class with too few features, wrong shapes or labels, or features
            that are not finite.
    """
    if len(classnames) < 2:
        raise UserError("a teacher needs at least two classes")
    if features.dim() != 2 or labels.shape != (len(features),):
        raise UserError("features must have shape (n, d) and labels (n,)")
    if not torch.isfinite(features).all():
        raise UserError("features have values that are not finite")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classnames):
        raise UserError(f"labels must lie in 0 ... {len(classnames) - 1} for {len(classnames)} class names")
    counts = torch.bincount(labels, minlength=len(classnames))
    needed = max(shots, 1)
    if (counts < needed).any():
        c = int((counts < needed).nonzero()[0])
        raise UserError(f"class '{classnames[c]}' has {int(counts[c])} features, {needed} are needed")
    if shots:
        selected = [
            members[torch.randperm(len(members), generator=generator)[:shots]]
            for members in ((labels == c).nonzero().flatten() for c in range(len(classnames)))
        ]
        features, labels = features[torch.cat(selected)], labels[torch.cat(selected)]
    card = None
    if text is not None:
        expected = (len(classnames), features.shape[1])
        if text.shape != expected:
            raise UserError(f"text features have shape {tuple(text.shape)}, expected {expected}")
        card = cross_validate(features.float(), labels, text.float(), balanced=balanced)
        card = replace(card, text=prompts)
        C = card.strength
    weight = fit_logistic_regression(features, labels, len(classnames), C, balanced=balanced)
    return Teacher(weight, list(classnames), backbone, normalized, card=card)
