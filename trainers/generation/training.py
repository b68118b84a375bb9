"""Stage 3's settings, and one training under them: a generator, its features of new classes, and all rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfzsl.utils.numerics import check_unit_rows

from .classifier import ClassWeights, fit_class_weights
from .generators import build_generator

STAGE = "stage 3 (generation)"
MAX_GENERATED = 200_000  # features held at once; with thousands of new classes each gets fewer


@dataclass(frozen=True)
class GenerationSettings:
    """All of stage 3. The config keys are the field names in capitals, under GENERATOR.

    Attributes:
        name: "closed_form" (closed_form.py, the default: rows are computed, and of the settings below only
            num_per_class and calibrate are used), or a generator of `generators.GENERATORS`, whose features
            all rows are trained on; "none": rows of base classes are trained, new ones are their text.
        num_per_class: virtual features per base class; num_generated: generated ones per new class.
        epochs, hidden, batch, lr: of a neural generator; 0 keeps its own (the paper's).
        holdout: share of base classes that watch the generator's training; patience: epochs without progress
            there before it stops.
        pull, classifier_steps, classifier_batch, classifier_lr, classifier_anneal, log_prior: see
            `classifier.fit_class_weights`.
        calibrate: balance base against new classes on pseudo-new ones, see `calibrated_stacking.calibrate`.
    """

    name: str = "closed_form"
    num_per_class: int = 100
    num_generated: int = 100
    epochs: int = 0
    hidden: int = 0
    batch: int = 0
    lr: float = 0.0
    holdout: float = 0.1
    patience: int = 20
    pull: float = 1.0
    classifier_steps: int = 150
    classifier_batch: int = 1024
    classifier_lr: float = 2e-3
    classifier_anneal: bool = True
    log_prior: bool = True
    calibrate: bool = True


def samples_per_class(wanted: int, classes: int, most: int = 0) -> int:
    """How many features each of so many classes gets, `most` (MAX_GENERATED) in all."""
    return min(wanted, max(1, (most or MAX_GENERATED) // classes))


def train(
    x: Tensor,
    y: Tensor,
    base_text: Tensor,
    new_text: Tensor,
    s: GenerationSettings,
    rng: torch.Generator,
    checkpoint: Path | None = None,
) -> ClassWeights:
    """Unit rows of base (C, d) and new classes (K, d), trained on virtual features x (n, d) with labels y.

    A generator that trains for long keeps its state in the file `checkpoint`, and goes on from there."""
    rows = base_text
    if s.name != "none" and len(new_text):
        own: dict[str, Any] = {
            key: getattr(s, key) for key in ("epochs", "hidden", "batch", "lr") if getattr(s, key)
        }
        if s.name != "vmf":
            own |= {"holdout": s.holdout, "patience": s.patience}
        model = build_generator(s.name, x.shape[1], base_text.shape[1], **own)
        model.fit(x, y, base_text, rng, checkpoint)
        count = samples_per_class(s.num_generated, len(new_text))
        made = check_unit_rows(model.sample(new_text, count, rng), STAGE, f"feature made by '{s.name}'")
        labels = torch.arange(len(base_text), len(base_text) + len(new_text), device=y.device)
        x, y = torch.cat([x, made]), torch.cat([y, labels.repeat_interleave(count)])
        rows = torch.cat([base_text, new_text])
    rows = fit_class_weights(
        x,
        y,
        rows,
        rng,
        pull=s.pull,
        steps=s.classifier_steps,
        lr=s.classifier_lr,
        anneal=s.classifier_anneal,
        batch=s.classifier_batch,
        log_prior=s.log_prior,
    )
    rows = check_unit_rows(rows, STAGE, "row of the classifier")
    base, new = rows[: len(base_text)], rows[len(base_text) :]
    return ClassWeights(base, new if len(new) else new_text, torch.zeros(len(base), device=y.device))
