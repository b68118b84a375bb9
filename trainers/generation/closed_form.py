"""Compute class weights of base and new classes in closed form, the default of stage 3.

Base classes get the mixture of text and teacher of recovery/mixture.py. The weight vector of a new class is
an affine map of its text embedding t_k, so that a class added later gets the weights it would have had from
the start:

    w_k = t_k + 0.375 P (t_k - m) + a p(t_k)

P whitens by the encoder's feature statistics (0 without them), m is the mean text embedding, p(t_k) is the
teacher's weight vector predicted from text by ridge regression on the base classes, and the map weight a
shrinks the prediction towards 0 where base classes are few or the prediction is poor:

    a = MAP_WEIGHT (s^2 / (1 - s^2))^2 C / (C + SHRINKAGE_CLASSES)

with C base classes and s the mean leave-one-out cosine of the regression.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recovery.feature_statistics import FeatureStatistics
from ..recovery.mixture import mix
from .classifier import ClassWeights

WHITENING = 0.375  # values of 0.25 to 0.75 give the same accuracy on the four data sets of docs/accuracy.md
MAP_WEIGHT = 0.1
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
    """Compute class weights from text embeddings and the teacher's weights.

    The weights of each group are scaled to the mean squared distance that the text embeddings of the group
    have from their mean. This changes no decision within a group and keeps the scores of both comparable.

    Args:
        base_text: (C, d) L2-normalized text embeddings of the base classes.
        new_text: (K, d) L2-normalized text embeddings of the new classes, K >= 0.
        weight: (C, d) weights of the teacher.
        bias: (C,) biases of the teacher.
        owner_weight: mixing weight measured by the teacher's owner; by default it is estimated.
        geometry: feature statistics of the encoder.

    Returns:
        Weights of all classes and the affine map for classes that are added later.
    """
    mean = torch.cat([base_text, new_text]).mean(0)
    mixture = mix(base_text, weight, bias, owner_weight=owner_weight, geometry=geometry)
    base, base_scale = match_rms(
        mixture.class_weights - mixture.class_weights.mean(0), base_text - base_text.mean(0)
    )
    base = base + base_text.mean(0)
    eye = torch.eye(base_text.shape[1]).to(base_text)
    text_map = eye.clone()
    if geometry is not None:
        text_map = text_map + WHITENING * geometry.whiten(eye)
    text_shift = mean - mean @ text_map
    map_weight = (
        MAP_WEIGHT * mixture.loo_predictability * len(base_text) / (len(base_text) + SHRINKAGE_CLASSES)
    )
    text_map = text_map + map_weight * mixture.text_to_weight
    text_shift = text_shift - map_weight * (base_text.mean(0) @ mixture.text_to_weight)
    if len(new_text):
        _, scale = match_rms(new_text @ text_map + text_shift - mean, new_text - mean)
        text_map, text_shift = scale * text_map, scale * (text_shift - mean) + mean
    new = new_text @ text_map + text_shift
    return ClassWeights(
        base, new, base_scale * mixture.bias, text_map, text_shift, mixture.teacher_weight, mixture.reason
    )


def match_rms(rows: Tensor, reference: Tensor) -> tuple[Tensor, float]:
    """Scale rows (n, d) to the root mean square length of `reference` (n, d); return rows and factor."""
    factor = (reference.square().sum(1).mean() / rows.square().sum(1).mean().clamp(min=1e-12)).sqrt()
    return factor * rows, float(factor)
