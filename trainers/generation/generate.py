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
    fit_stacking_bias,
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
        The classifier. Its `decision` summarizes how it was built.

    Raises:
        UserError: a new class name repeats or is the name of a base class, shapes do not match, text
            embeddings are not L2-normalized, or a setting is unknown.
    """
    settings = settings or GenerationSettings()
    generator = generator or torch.Generator().manual_seed(0)
    base_text, new_text = _check_text(virtual, text)
    device = base_text.device
    rng = device_generator(generator, device)
    needs_bias = settings.calibrate and len(new_text) > 0 and len(base_text) > 1
    is_closed_form = settings.name == "closed_form"
    x = y = torch.empty(0)
    if needs_bias or not is_closed_form:
        max_total = MAX_CALIBRATION_SAMPLES if is_closed_form else 0
        num_samples = samples_per_class(settings.num_per_class, len(base_text), max_total)
        x, y = virtual.sample(num_samples, generator)
        x, y = x.to(base_text), y.to(device)
        if text.shift is not None:
            x = F.normalize(x + text.shift.to(x), dim=1)
    weight = virtual.weight.to(base_text)
    biases = torch.zeros(len(weight), device=device) if virtual.bias is None else virtual.bias.to(weight)
    training_index = itertools.count()

    def compute_weights(base: Tensor, new: Tensor) -> ClassWeights:
        """Compute class weights of the base classes with indices `base` and of new text embeddings."""
        if is_closed_form:
            return closed_form(
                base_text[base],
                new,
                weight[base],
                biases[base],
                owner_weight=virtual.owner_weight,
                geometry=virtual.geometry,
            )
        relabel = torch.full((len(base_text),), -1, device=device)
        relabel[base] = torch.arange(len(base), device=device)
        is_base = relabel[y] >= 0
        checkpoint = folder and folder / f"{next(training_index)}.safetensors"
        return train(x[is_base], relabel[y[is_base]], base_text[base], new, settings, rng, checkpoint)

    weights = compute_weights(torch.arange(len(base_text), device=device), new_text)
    stacking_bias = 0.0
    if needs_bias:
        min_folds = max(MIN_FOLDS, MIN_CLASS_FOLDS // len(base_text) if is_closed_form else 0)
        folds = pseudo_novel_folds(x, y, base_text, len(new_text), compute_weights, rng, min_folds)
        stacking_bias = fit_stacking_bias(folds, device)
    new_bias = torch.full((len(new_text),), stacking_bias, device=device)
    return Classifier(
        weight=torch.cat([weights.base_weight, weights.new_weight]),
        classnames=[*virtual.classnames, *text.new_classnames],
        is_new=torch.arange(len(base_text) + len(new_text), device=device) >= len(base_text),
        bias=torch.cat([weights.base_bias, new_bias]),
        shift=text.shift,
        text_map=weights.text_map,
        text_shift=weights.text_shift,
        new_bias=stacking_bias,
        backbone=text.backbone,
        weights=text.weights,
        prompts=text.prompts,
        decision=_describe(virtual, text, settings, weights, stacking_bias),
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
    virtual: VirtualClasses,
    text: AlignedText,
    settings: GenerationSettings,
    weights: ClassWeights,
    stacking_bias: float,
) -> Decision:
    """Summarize the stages."""
    encoder = virtual.backbone or "features"
    return Decision(
        teacher=f"{len(virtual.classnames)} base classes, {virtual.level} of {encoder}",
        recovery=f"{virtual.summary}, kappa {float(virtual.kappa.mean()):,.0f}",
        feature_statistics=str(virtual.geometry) if virtual.geometry else "none (isotropic covariance)",
        prompts=text.prompts.description,
        alignment="; ".join(filter(None, [f"FLPT, {text.epochs} epochs" if text.epochs else "", text.note])),
        generator=settings.name,
        teacher_weight=weights.teacher_weight,
        reason=weights.reason,
        new_classes=len(text.new_classnames),
        stacking_bias=stacking_bias,
    )
