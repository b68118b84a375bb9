"""Stage 3 in one function: from virtual base classes and the names' text features to the final classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.errors import UserError
from dfzsl.files import checked_names
from dfzsl.stages import checked

from .classifier import Classifier, shift_reliability
from .generators.base import device_generator

if TYPE_CHECKING:
    from ..recovery.virtual import VirtualClasses

from .rehearsal import calibrate, choose_generator
from .training import STAGE, StageThreeSettings, affordable, train


def build_classifier(
    virtual: VirtualClasses,
    base_text: Tensor,
    new_text: Tensor,
    *,
    new_classnames: Sequence[str],
    untuned_text: Tensor | None = None,
    shift: Tensor | None = None,
    settings: StageThreeSettings | None = None,
    generator: torch.Generator,
    backbone: str = "",
    weights: str = "",
) -> Classifier:
    """The classifier for base and new classes.

    Args:
        virtual: the recovered base classes (stage 1), in the order of `base_text`.
        base_text: (C, d) unit text features of base classes; new_text: (K, d) of new ones, K may be 0. Both
            in the tuned context when FLPT ran. Training runs on their device.
        untuned_text: (C, d) text features of base classes before FLPT, or None where it did not run.
        shift: (d,) FLPT's shift of image features, or None.
        generator: the source of everything random.
        backbone, weights: ids of the image encoder, kept in the classifier.

    Raises UserError for new names that repeat or are base names, shapes that do not fit, unknown settings.
    """
    settings = settings or StageThreeSettings()
    base_classnames = list(virtual.classnames)
    checked_names(new_classnames, "the new classes", taken=base_classnames)
    if len(base_text) != len(base_classnames) or new_text.shape != (len(new_classnames), base_text.shape[1]):
        raise UserError(
            f"{len(base_classnames)} base and {len(new_classnames)} new classes need as many text features, "
            f"got {tuple(base_text.shape)} and {tuple(new_text.shape)}"
        )
    device = base_text.device
    rng = device_generator(generator, device)
    base_text, new_text = base_text.float(), new_text.to(base_text).float()
    checked(base_text, STAGE, "text feature", base_classnames)
    checked(new_text, STAGE, "text feature", new_classnames)
    x, y = virtual.sample(affordable(settings.num_per_class, len(base_text)), generator)
    x, y = x.to(base_text), y.to(device)
    if settings.name == "auto":
        # In the tuned context base classes make poor players: their own text was tuned on them.
        text = base_text if untuned_text is None else untuned_text.to(base_text)
        name = choose_generator(x, y, text, len(new_text), settings, rng)
        print(f"Generator chosen on base classes that play new ones: {name}")
        settings = replace(settings, name=name)
    if shift is not None:
        shift = shift.to(x)
        x = F.normalize(x + shift, dim=1)
    trust = 1.0
    if settings.align and len(new_text):
        trust = shift_reliability(
            x, y, base_text, rng, decay=settings.align_decay, batch=settings.classifier_batch
        )
    base, new, moved = train(x, y, base_text, new_text, settings, rng, trust)
    bias = 0.0
    if settings.calibrate and len(new) and len(base) > 1:
        bias = calibrate(x, y, base_text, len(new), settings, rng, trust)
    is_new = torch.arange(len(base) + len(new), device=device) >= len(base)
    names = [*base_classnames, *new_classnames]
    return Classifier(
        weight=checked(torch.cat([base, new]), STAGE, "row of the classifier", names),
        classnames=names,
        is_new=is_new,
        bias=bias * is_new,
        shift=shift,
        text_shift=moved,
        new_bias=bias,
        backbone=backbone,
        weights=weights,
    )
