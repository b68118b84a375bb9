"""Stage 3's settings, and one training under them: a generator, its features of new classes, and all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.stages import checked

from .classifier import fit_rows, text_shift
from .generators import build_generator

if TYPE_CHECKING:
    pass

STAGE = "stage 3 (generation)"
MAX_GENERATED = 200_000  # features held at once; with thousands of new classes each gets fewer


@dataclass(frozen=True)
class StageThreeSettings:
    """All of stage 3. The config keys are the field names in capitals, under GENERATOR.

    Attributes:
        name: a generator of `generators.GENERATORS`; "none": new classes are not trained on, their rows are
            their (aligned) text features; "auto": "vmf" or "none", see `choose_generator`.
        num_per_class: virtual features per base class; num_generated: generated ones per new class.
        epochs, hidden, batch, lr: of a neural generator; 0 keeps its own (the paper's).
        holdout: share of base classes that watch the generator's training; patience: epochs without progress
            there before it stops.
        align: shift text features by one vector learned on the base classes (FLPT in feature space); those of
            new classes by the part of it that is to be trusted (`classifier.shift_reliability`).
        align_decay: weight of its squared length.
        pull, classifier_steps, classifier_batch, classifier_lr, classifier_anneal, log_prior: see
            `classifier.fit_rows`.
        calibrate: balance base against new classes on pseudo-new ones, see `calibrate`.
    """

    name: str = "auto"
    num_per_class: int = 100
    num_generated: int = 100
    epochs: int = 0
    hidden: int = 0
    batch: int = 0
    lr: float = 0.0
    holdout: float = 0.1
    patience: int = 20
    align: bool = True
    align_decay: float = 1.0
    pull: float = 1.0
    classifier_steps: int = 150
    classifier_batch: int = 1024
    classifier_lr: float = 2e-3
    classifier_anneal: bool = True
    log_prior: bool = True
    calibrate: bool = True


def affordable(wanted: int, classes: int) -> int:
    """How many features each of so many classes gets."""
    return min(wanted, max(1, MAX_GENERATED // classes))


def train(
    x: Tensor,
    y: Tensor,
    base_text: Tensor,
    new_text: Tensor,
    s: StageThreeSettings,
    rng: torch.Generator,
    trust: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of base (C, d) and new classes (K, d), and the shift of new text features or None.

    `trust` is the share of base classes' shift that new ones get.
    """
    moved = None
    conditions = new_text
    if s.align and len(base_text) > 1:
        moved = text_shift(x, y, base_text, rng, decay=s.align_decay, batch=s.classifier_batch)
        base_text, conditions = F.normalize(base_text + moved, dim=1), F.normalize(new_text + moved, dim=1)
        moved = trust * moved
        new_text = F.normalize(new_text + moved, dim=1)
    rows = base_text
    if s.name != "none" and len(new_text):
        own: dict[str, Any] = {
            key: getattr(s, key) for key in ("epochs", "hidden", "batch", "lr") if getattr(s, key)
        }
        if s.name != "vmf":
            own |= {"holdout": s.holdout, "patience": s.patience}
        model = build_generator(s.name, x.shape[1], base_text.shape[1], **own)
        model.fit(x, y, base_text, rng)
        count = affordable(s.num_generated, len(new_text))
        made = checked(model.sample(conditions, count, rng), STAGE, f"feature made by '{s.name}'")
        labels = torch.arange(len(base_text), len(base_text) + len(new_text), device=y.device)
        x, y = torch.cat([x, made]), torch.cat([y, labels.repeat_interleave(count)])
        rows = torch.cat([base_text, new_text])
    rows = fit_rows(
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
    base = rows[: len(base_text)]
    return base, rows[len(base_text) :] if len(rows) > len(base_text) else new_text, moved
