"""Provide the result of stage 2: text embeddings of all classes, aligned with image features."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .class_prompts import ClassPrompts


@dataclass(frozen=True, eq=False)
class AlignedText:
    """Text embeddings of base and new classes, and the shift that aligns image features with them.

    Without prompt tuning these are CLIP's own text embeddings, and there is no shift.

    Attributes:
        base: (C, d) L2-normalized text embeddings of the base classes, in the order of the teacher's classes.
        new: (K, d) L2-normalized text embeddings of the new classes; K may be 0.
        new_classnames: the K names of the new classes.
        shift: (d,) vector that FLPT adds to every L2-normalized image feature, or None.
        prompts: prompts of the classes, for classes that are added later.
        backbone: open_clip's name of the model, or "".
        weights: pretrained tag of the model, or the hash of its weights file.
        epochs: epochs of FLPT; 0 where it was skipped.
        note: one sentence for the summary of the classifier, or "".
    """

    base: Tensor
    new: Tensor
    new_classnames: list[str]
    shift: Tensor | None = None
    prompts: ClassPrompts = field(default_factory=lambda: ClassPrompts(("a photo of a {}.",)))
    backbone: str = ""
    weights: str = ""
    epochs: int = 0
    note: str = ""
