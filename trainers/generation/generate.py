"""Stage 3 in one function: from virtual base classes and the names' text features to the final classifier."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.io.class_names import checked_names
from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import checked

from .calibrated_stacking import MOST_REHEARSED, PERFORMANCES, REHEARSALS, calibrate, plays
from .classifier import Classifier, Rows
from .closed_form import closed_form
from .generators.base import device_generator
from .training import STAGE, StageThreeSettings, affordable, train

if TYPE_CHECKING:
    from ..recovery.virtual_classes import VirtualClasses


def build_classifier(
    virtual: VirtualClasses,
    base_text: Tensor,
    new_text: Tensor,
    *,
    new_classnames: Sequence[str],
    shift: Tensor | None = None,
    settings: StageThreeSettings | None = None,
    generator: torch.Generator,
    folder: Path | None = None,
    backbone: str = "",
    weights: str = "",
) -> Classifier:
    """The classifier for base and new classes.

    Args:
        virtual: the recovered base classes (stage 1), in the order of `base_text`.
        base_text: (C, d) unit text features of base classes; new_text: (K, d) of new ones, K may be 0. Both
            in the tuned context when FLPT ran. Training runs on their device.
        shift: (d,) FLPT's shift of image features, or None.
        generator: the source of everything random.
        folder: where trained generators keep their states; a call that was interrupted goes on from there.
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
    balanced = settings.calibrate and len(new_text) > 0 and len(base_text) > 1
    closed = settings.name == "closed_form"
    if balanced or not closed:
        draws = affordable(settings.num_per_class, len(base_text), MOST_REHEARSED if closed else 0)
        x, y = virtual.sample(draws, generator)
        x, y = x.to(base_text), y.to(device)
        if shift is not None:
            x = F.normalize(x + shift.to(x), dim=1)
    weight = virtual.weight.to(base_text)
    intercepts = torch.zeros(len(weight), device=device) if virtual.bias is None else virtual.bias.to(weight)

    trainings = itertools.count()

    def rows_of(known: Tensor, others: Tensor) -> Rows:
        """Rows of the base classes with these indices, and of others with these texts."""
        if closed:
            return closed_form(
                base_text[known],
                others,
                weight[known],
                intercepts[known],
                known_weight=virtual.known_weight,
                geometry=virtual.geometry,
            )
        relabel = torch.full((len(base_text),), -1, device=device)
        relabel[known] = torch.arange(len(known), device=device)
        mine = relabel[y] >= 0
        checkpoint = folder and folder / f"{next(trainings)}.safetensors"
        return train(x[mine], relabel[y[mine]], base_text[known], others, settings, rng, checkpoint)

    made = rows_of(torch.arange(len(base_text), device=device), new_text)
    bias = 0.0
    if balanced:
        rehearsals = max(REHEARSALS, PERFORMANCES // len(base_text) if closed else 0)
        bias = calibrate(plays(x, y, base_text, len(new_text), rows_of, rng, rehearsals), device)
    if made.note:
        print(made.note)
    is_new = torch.arange(len(base_text) + len(new_text), device=device) >= len(base_text)
    return Classifier(
        weight=torch.cat([made.base, made.new]),
        classnames=[*base_classnames, *new_classnames],
        is_new=is_new,
        bias=torch.cat([made.bias, torch.full((len(new_text),), bias, device=device)]),
        shift=shift,
        text_map=made.text_map,
        text_shift=made.text_shift,
        new_bias=bias,
        backbone=backbone,
        weights=weights,
    )
