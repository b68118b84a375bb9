"""Build one classifier for base and new classes (stage 3) from virtual classes and aligned text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.io.class_names import check_class_names
from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import check_unit_rows

from ..clip.aligned_text import AlignedText
from .calibrated_stacking import (
    MAX_CALIBRATION_SAMPLES,
    MIN_CLASS_FOLDS,
    MIN_FOLDS,
    calibrate,
    pseudo_novel_folds,
)
from .classifier import Classifier, ClassWeights
from .closed_form import closed_form
from .decision import Decision
from .generators.base import device_generator
from .training import STAGE, GenerationSettings, samples_per_class, train

if TYPE_CHECKING:
    from ..recovery.virtual_classes import VirtualClasses


def generate(
    virtual: VirtualClasses,
    text: AlignedText,
    settings: GenerationSettings | None = None,
    *,
    generator: torch.Generator | None = None,
    folder: Path | None = None,
) -> Classifier:
    """Build the classifier for base and new classes.

    Class weights are computed in closed form, or trained on virtual features of base classes and generated
    features of new classes. The bias of new classes is calibrated stacking on pseudo-novel classes.

    Args:
        virtual: C base classes, the result of stage 1.
        text: text embeddings of the same C base classes in the same order and of K new classes, the result of
            stage 2. All computation runs on their device.
        settings: of stage 3; by default those of `GenerationSettings`.
        generator: source of all random draws; by default seed 0.
        folder: where trained generators write checkpoints; an interrupted call resumes from them.

    Returns:
        The classifier. Its `decision` tells what was chosen and why.

    Raises:
        UserError: new class names that repeat or are names of base classes, shapes that do not fit, text
            embeddings that are not L2-normalized, and unknown settings.
    """
    settings = settings or GenerationSettings()
    generator = generator or torch.Generator().manual_seed(0)
    base_text, new_text = _check_text(virtual, text)
    device = base_text.device
    rng = device_generator(generator, device)
    calibrated = settings.calibrate and len(new_text) > 0 and len(base_text) > 1
    closed = settings.name == "closed_form"
    x = y = torch.empty(0)
    if calibrated or not closed:
        draws = samples_per_class(
            settings.num_per_class, len(base_text), MAX_CALIBRATION_SAMPLES if closed else 0
        )
        x, y = virtual.sample(draws, generator)
        x, y = x.to(base_text), y.to(device)
        if text.shift is not None:
            x = F.normalize(x + text.shift.to(x), dim=1)
    weight = virtual.weight.to(base_text)
    intercepts = torch.zeros(len(weight), device=device) if virtual.bias is None else virtual.bias.to(weight)
    trainings = itertools.count()

    def rows_of(known: Tensor, others: Tensor) -> ClassWeights:
        """Compute class weights of the base classes `known` (indices) and of others by text embeddings."""
        if closed:
            return closed_form(
                base_text[known],
                others,
                weight[known],
                intercepts[known],
                owner_weight=virtual.owner_weight,
                geometry=virtual.geometry,
            )
        relabel = torch.full((len(base_text),), -1, device=device)
        relabel[known] = torch.arange(len(known), device=device)
        of_known = relabel[y] >= 0
        checkpoint = folder and folder / f"{next(trainings)}.safetensors"
        return train(x[of_known], relabel[y[of_known]], base_text[known], others, settings, rng, checkpoint)

    rows = rows_of(torch.arange(len(base_text), device=device), new_text)
    bias = 0.0
    if calibrated:
        rehearsals = max(MIN_FOLDS, MIN_CLASS_FOLDS // len(base_text) if closed else 0)
        bias = calibrate(pseudo_novel_folds(x, y, base_text, len(new_text), rows_of, rng, rehearsals), device)
    return Classifier(
        weight=torch.cat([rows.base, rows.new]),
        classnames=[*virtual.classnames, *text.new_classnames],
        is_new=torch.arange(len(base_text) + len(new_text), device=device) >= len(base_text),
        bias=torch.cat([rows.bias, torch.full((len(new_text),), bias, device=device)]),
        shift=text.shift,
        text_map=rows.text_map,
        text_shift=rows.text_shift,
        new_bias=bias,
        backbone=text.backbone,
        weights=text.weights,
        texts=text.texts,
        decision=_describe(virtual, text, settings, rows, bias),
    )


def _check_text(virtual: VirtualClasses, text: AlignedText) -> tuple[Tensor, Tensor]:
    """Return text embeddings of base (C, d) and new classes (K, d) in float32 on one device."""
    base_classnames, new_classnames = list(virtual.classnames), text.new_classnames
    check_class_names(new_classnames, "the new classes", taken=base_classnames)
    expected = (len(new_classnames), text.base.shape[1])
    if len(text.base) != len(base_classnames) or text.new.shape != expected:
        raise UserError(
            f"{len(base_classnames)} base and {len(new_classnames)} new classes need as many text features, "
            f"got {tuple(text.base.shape)} and {tuple(text.new.shape)}"
        )
    base_text, new_text = text.base.float(), text.new.to(text.base).float()
    check_unit_rows(base_text, STAGE, "text feature", base_classnames)
    check_unit_rows(new_text, STAGE, "text feature", new_classnames)
    return base_text, new_text


def _describe(
    virtual: VirtualClasses, text: AlignedText, settings: GenerationSettings, rows: ClassWeights, bias: float
) -> Decision:
    encoder = virtual.backbone or "features"
    return Decision(
        teacher=f"{len(virtual.classnames)} base classes, {virtual.level} of {encoder}",
        recovered=f"{virtual.summary}, kappa {float(virtual.kappa.mean()):,.0f}",
        geometry=str(virtual.geometry) if virtual.geometry else "none given: isotropic",
        text=text.texts.about,
        aligned="; ".join(filter(None, [f"FLPT, {text.epochs} epochs" if text.epochs else "", text.note])),
        generator=settings.name,
        teacher_weight=rows.teacher_weight,
        reason=rows.reason,
        new_classes=len(text.new_classnames),
        stacking_bias=bias,
    )
