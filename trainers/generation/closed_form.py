"""The default of stage 3: rows of base and new classes in closed form, nothing drawn and nothing trained.

Base rows mix text and teacher (recovery/mixture.py). New rows start from their text and go two steps, each an
affine map of text features, so that a class added later gets the row it would have had from the start:

    r_k = t_k + 0.375 P (t_k - m) + w p(t_k)

P whitens by the encoder's geometry, if one was measured; m is the mean text. p is the conditional
mean of a generator: the teacher's row that ridge regression from text, fitted on base classes, foretells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recovery.feature_statistics import FeatureStatistics
from ..recovery.mixture import mix
from .classifier import ClassWeights

WHITENING = 0.375  # of text features: 0.25 to 0.75 do as well on the four sets of docs/accuracy.md
MAP_WEIGHT = 0.1  # w = 0.1 (s^2 / (1 - s^2))^2 C / (C + 50) with s as in `Mixture.loo_predictability` and C base classes
SHRINKAGE_CLASSES = 50


def closed_form(
    base_text: Tensor,
    new_text: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    owner_weight: float | None = None,
    geometry: FeatureStatistics | None = None,
) -> ClassWeights:
    """Rows from text features of base (C, d) and new classes (K, d), K >= 0, and the teacher's rows (C, d).

    Both groups get the spread that their texts have around the mean text, as mean square: within a group that
    changes no decision, between the groups it keeps either from outshouting the other.
    """
    middle = torch.cat([base_text, new_text]).mean(0)
    mixture = mix(base_text, weight, bias, owner_weight=owner_weight, geometry=geometry)
    base, scale = match_rms(
        mixture.class_weights - mixture.class_weights.mean(0), base_text - base_text.mean(0)
    )
    base = base + base_text.mean(0)
    eye = torch.eye(base_text.shape[1]).to(base_text)
    step = eye.clone()
    if geometry is not None:
        step = step + WHITENING * geometry.whiten(eye)
    shift = middle - middle @ step
    share = MAP_WEIGHT * mixture.loo_predictability * len(base_text) / (len(base_text) + SHRINKAGE_CLASSES)
    step = step + share * mixture.text_to_weight
    shift = shift - share * (base_text.mean(0) @ mixture.text_to_weight)
    if len(new_text):
        _, spread = match_rms(new_text @ step + shift - middle, new_text - middle)
        step, shift = spread * step, spread * (shift - middle) + middle
    new = new_text @ step + shift
    return ClassWeights(base, new, scale * mixture.bias, step, shift, mixture.teacher_weight, mixture.reason)


def match_rms(rows: Tensor, like: Tensor) -> tuple[Tensor, float]:
    """Rows (n, d) scaled to the mean square length of `like` (n, d), and the factor."""
    factor = (like.square().sum(1).mean() / rows.square().sum(1).mean().clamp(min=1e-12)).sqrt()
    return factor * rows, float(factor)
