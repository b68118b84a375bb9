"""The owner's base classifier: fit it on features, save it, load it. How a client reaches it: oracle.py."""

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

from .logistic import regression
from .teacher_card import TeacherCard, cross_validate

PAPER_STRENGTH = 0.316  # the paper's C


@dataclass(repr=False)
class Teacher:
    """A linear or cosine classifier on image features.

    Attributes:
        weight: (C, d) float32 rows, row c of class `classnames[c]`.
        classnames: C different names.
        backbone: id of the image encoder whose features it reads.
        normalized: True for the cosine classifier (logits cos(x, w_c) + b_c), False for the linear one
            (x.w_c + b_c).
        bias: (C,) float32 intercepts b_c, or None for none.
        card: what its owner says of it, or None.
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
        of = self.backbone or "an unknown encoder"
        return f"Teacher({kind}{offset}, {len(self.weight)} classes, d = {self.weight.shape[1]}, {of})"

    def __post_init__(self) -> None:
        shape, names = tuple(self.weight.shape), len(self.classnames)
        if len(shape) != 2 or shape[0] != names or 0 in shape:
            raise UserError(f"a teacher needs one weight row per class; got shape {shape} and {names} names")
        check_class_names(self.classnames, "the teacher")
        check_unit_rows(unit(self.weight), "the teacher", "row", self.classnames)
        if self.bias is not None:
            if self.bias.shape != self.weight.shape[:1]:
                raise UserError(f"a teacher needs one intercept per class; got {tuple(self.bias.shape)}")
            if not torch.isfinite(self.bias).all():
                raise UserError("a teacher's intercepts must be finite")

    def logits(self, x: Tensor) -> Tensor:
        """(n, C) logits of features x (n, d)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = self.weight.to(x)
        if self.normalized:
            x, weight = unit(x), unit(weight)
        logits = x @ weight.T
        return logits if self.bias is None else logits + self.bias.to(x)

    def beside_text(self) -> tuple[Tensor, Tensor]:
        """Rows (C, d) and intercepts (C,) that decide as the teacher does, comparable to cosines with text:
        unit rows of a cosine teacher, rows of mean length 1 of a linear one."""
        bias = torch.zeros(len(self.weight)) if self.bias is None else self.bias
        if self.normalized:
            return unit(self.weight), bias
        length = torch.linalg.vector_norm(self.weight, dim=1).mean()
        return self.weight / length, bias / length

    def save(self, path: str | os.PathLike[str]) -> None:
        about = {
            "kind": "teacher",
            "classnames": list(self.classnames),
            "backbone": self.backbone,
            "normalized": self.normalized,
            "card": self.card and self.card.as_dict(),
        }
        tensors = {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}
        save_tensors(path, {name: tensor.float() for name, tensor in tensors.items()}, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Teacher:
        """Read `save`'s file. Raises UserError when it is missing, broken or not a teacher."""
        tensors, about = load_tensors(path, "teacher")
        weight, bias = tensors.get("weight"), tensors.get("bias")
        backbone, normalized = about.get("backbone", ""), about.get("normalized")
        if weight is None or not isinstance(backbone, str) or not isinstance(normalized, bool):
            raise UserError(f"{path}: an incomplete teacher file; write it again with TeacherZeroshot")
        try:
            names = check_class_names(about.get("classnames"), "the teacher")
            card = None if about.get("card") is None else TeacherCard.of(about["card"], len(names))
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
    said: str = "",
    normalized: bool = True,
    balanced: bool = False,
    shots: int = 0,
    generator: torch.Generator | None = None,
) -> Teacher:
    """Multinomial logistic regression without intercept. The paper's teacher has C = 0.316 and no card.

    Args:
        features: (n, d) unit rows; labels: (n,) integers below len(classnames).
        C: inverse L2 strength (scikit-learn's).
        text: (C, d) unit text features of the classes: C and the weight beside text are then found by
            cross-validation and noted on its card (teacher_card.py), with what was `said` of a class.
        normalized: serve the rows as a cosine classifier, as the paper does, else as the fitted linear one.
        balanced: weigh the classes equally whatever their sizes.
        shots: fit on this many rows per class, drawn with `generator`; 0 for all rows.

    At the optimum the rows sum to zero and w_c is proportional to sum_i (1[y_i = c] - p_ic) x_i: they show
    how class means differ from each other, not where all of them lie.
    Raises UserError for fewer than two classes, a class without enough rows, or features that are not finite.
    """
    if len(classnames) < 2:
        raise UserError("a teacher needs at least two classes")
    if features.dim() != 2 or labels.shape != (len(features),):
        raise UserError("features must have shape (n, d) and labels (n,)")
    if not torch.isfinite(features).all():
        raise UserError("features have values that are not finite")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classnames):
        raise UserError(f"labels must lie in 0 ... {len(classnames) - 1}, one for each class name")
    counts = torch.bincount(labels, minlength=len(classnames))
    needed = max(shots, 1)
    if (counts < needed).any():
        short = int((counts < needed).nonzero()[0])
        raise UserError(f"class '{classnames[short]}' has {int(counts[short])} features, {needed} are needed")
    if shots:
        kept = [
            rows[torch.randperm(len(rows), generator=generator)[:shots]]
            for rows in ((labels == c).nonzero().flatten() for c in range(len(classnames)))
        ]
        features, labels = features[torch.cat(kept)], labels[torch.cat(kept)]
    card = None
    if text is not None:
        if text.shape != (len(classnames), features.shape[1]):
            raise UserError(f"text features have shape {tuple(text.shape)}, expected one row for each class")
        card = cross_validate(features.float(), labels, text.float(), balanced=balanced)
        card = replace(card, text=said)
        C = card.strength
    weight = regression(features, labels, len(classnames), C, balanced=balanced)
    return Teacher(weight, list(classnames), backbone, normalized, card=card)
