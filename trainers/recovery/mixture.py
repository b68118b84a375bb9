"""Combine text embeddings and a teacher's class weights into one classifier of base classes.

The weight vector of a base class is t_c + g u_c with its text embedding t_c, the mixing weight g, and the
teacher's normalized weight vector u_c (`teacher_rows`). The sum is not normalized: the lengths of its weight
vectors carry part of the accuracy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.numerics import split_rows, unit

from .feature_statistics import FeatureStatistics
from .ridge import leave_one_out_ridge

# ln g = A - B ln(1 - nearest text cosine) + C retrieval accuracy - D ln(relative scatter). An empirical rule,
# fitted by regression on 360 cells of four data sets and their parts. It also holds on each data set when
# it is fitted on the three others (docs/accuracy.md).
WEIGHT_COEFFICIENTS = (-12.1, 3.0, 4.7, 0.0)
WHITENED_WEIGHT_COEFFICIENTS = (-6.1, 2.3, 2.6, 3.0)
TEACHER_WEIGHT_RANGE = (0.01, 3.0)  # limits of a predicted mixing weight
MAX_LOO_COSINE = 0.99
# Above this mean cosine to text a teacher was trained from text. Teachers of images reach 0.3 to 0.72.
MAX_TEXT_TEACHER_COSINE = 0.8


@dataclass(frozen=True)
class Mixture:
    """A classifier of base classes that combines text and teacher.

    Attributes:
        class_weights: (C, d) class weights; a vector that all classes share is arbitrary.
        bias: (C,) intercepts.
        teacher_weight: mixing weight g; infinite if text is not used.
        reason: explanation of g for the user.
        text_to_weight: (d, d) map from centered text embeddings to the teacher's L2-normalized weights.
        loo_predictability: (s^2 / (1 - s^2))^2 for the mean leave-one-out cosine s of this map.
    """

    class_weights: Tensor
    bias: Tensor
    teacher_weight: float
    reason: str
    text_to_weight: Tensor
    loo_predictability: float


def teacher_rows(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L2-normalize class weights, center them over classes, and scale them to mean squared length 1.

    Centering changes no decision among the classes.

    Args:
        weight: (C, d) the teacher's class weights.
        bias: (C,) intercepts, or None for none.

    Returns:
        Class weights u (C, d), and intercepts (C,) on the same scale.
    """
    length = weight.norm(dim=1).clamp(min=1e-30)
    rows = unit(weight)
    offset = torch.zeros_like(length) if bias is None else bias.to(length) / length
    rows, offset = rows - rows.mean(0), offset - offset.mean()
    scale = rows.square().sum(1).mean().sqrt().clamp(min=1e-12)
    return rows / scale, offset / scale


def text_teacher_statistics(text: Tensor, rows: Tensor) -> tuple[float, float, float]:
    """Compare text embeddings with the teacher's class weights.

    Args:
        text: (C, d) L2-normalized text embeddings.
        rows: (C, d) the teacher's weights of the same classes.

    Returns:
        nearest_text_cosine: mean cosine of a text embedding to its nearest other one.
        retrieval_accuracy: share of weight vectors whose best text is that of their own class, with scores
            centered over the weight vectors.
        text_teacher_cosine: mean cosine of a weight vector to its text, both centered; near 1 for a teacher
            that was trained from text.
    """
    centered = text - text.mean(0)
    rows = unit(rows - rows.mean(0))
    mean_score = centered @ rows.mean(0)
    nearest_text_cosine, retrieval_accuracy = [], []
    for index in split_rows(torch.arange(len(text), device=text.device), len(text)):
        cosine = text[index] @ text.T
        cosine[torch.arange(len(index)), index] = -1
        nearest_text_cosine.append(cosine.max(1).values)
        retrieval_accuracy.append((rows[index] @ centered.T - mean_score).argmax(1) == index)
    text_teacher_cosine = float((rows * unit(centered)).sum(1).mean())
    return (
        float(torch.cat(nearest_text_cosine).mean()),
        float(torch.cat(retrieval_accuracy).float().mean()),
        text_teacher_cosine,
    )


def relative_scatter(rows: Tensor, geometry: FeatureStatistics) -> float:
    """Return the within-class variance along the teacher's weights (C, d), relative to the mean variance."""
    centered = unit(rows - rows.mean(0))
    return float(((centered @ geometry.scatter.to(rows)) * centered).sum(1).mean()) * rows.shape[1]


def fit_text_to_weight(text: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """Fit the text-to-weight regression.

    Args:
        text: (C, d) text embeddings.
        rows: (C, d) the teacher's L2-normalized class weights.

    Returns:
        The (d, d) map from centered text embeddings to weights of mean length 1, and its
        `Mixture.loo_predictability`.
    """
    ridge, loo_prediction = leave_one_out_ridge(text, rows)
    loo_cosine = float(F.cosine_similarity(loo_prediction, rows, dim=1).mean().clamp(0, MAX_LOO_COSINE))
    text_to_weight = ridge / loo_prediction.norm(dim=1).mean().clamp(min=1e-6)
    return text_to_weight, (loo_cosine * loo_cosine / (1 - loo_cosine * loo_cosine)) ** 2


def predict_teacher_weight(
    text: Tensor, rows: Tensor, geometry: FeatureStatistics | None = None, loo_predictability: float = 0.0
) -> float:
    """Predict the mixing weight g from text and teacher alone.

    Noise in a teacher's weights cannot be predicted from text. So g grows with `loo_predictability` where
    that is above 1.

    Args:
        text: (C, d) L2-normalized text embeddings.
        rows: (C, d) the teacher's weights of the same classes.
        geometry: feature statistics of the encoder, if the weights are whitened by them.
        loo_predictability: see `Mixture`.

    Returns:
        g, within `TEACHER_WEIGHT_RANGE`; infinity for a teacher that was trained from text.
    """
    nearest_text_cosine, retrieval_accuracy, text_teacher_cosine = text_teacher_statistics(text, rows)
    if text_teacher_cosine > MAX_TEXT_TEACHER_COSINE:
        return math.inf
    coefficients = WEIGHT_COEFFICIENTS if geometry is None else WHITENED_WEIGHT_COEFFICIENTS
    intercept, text_slope, retrieval_slope, scatter_slope = coefficients
    scatter = 1.0 if geometry is None else relative_scatter(rows, geometry)
    log_weight = intercept - text_slope * math.log(max(1 - nearest_text_cosine, 1e-3))
    log_weight = log_weight + retrieval_slope * retrieval_accuracy
    log_weight -= scatter_slope * math.log(max(scatter, 1e-3))
    smallest, largest = TEACHER_WEIGHT_RANGE
    return min(max(max(loo_predictability, 1.0) * math.exp(log_weight), smallest), largest)


def mix(
    text: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    owner_weight: float | None = None,
    geometry: FeatureStatistics | None = None,
) -> Mixture:
    """Combine text embeddings with a teacher.

    Args:
        text: (C, d) L2-normalized text embeddings.
        weight: (C, d) the teacher's class weights.
        bias: (C,) the teacher's intercepts, or None for none.
        owner_weight: mixing weight g that the owner measured by cross-validation; None to predict it.
        geometry: feature statistics of the encoder, by which the teacher's weights are whitened unless
            `owner_weight` is set or the teacher was trained from text.

    Returns:
        The combined classifier.
    """
    plain, plain_offset = rows, offset = teacher_rows(weight, bias)
    if geometry is not None and owner_weight is None:
        rows = geometry.whiten(rows)
        scale = rows.square().sum(1).mean().sqrt().clamp(min=1e-12)
        rows, offset = rows / scale, offset / scale
    text_to_weight, loo_predictability = fit_text_to_weight(text, unit(rows))
    if owner_weight is not None:
        return Mixture(
            text + owner_weight * rows,
            owner_weight * offset,
            owner_weight,
            "the owner's cross-validation",
            text_to_weight,
            loo_predictability,
        )
    g = predict_teacher_weight(text, plain, geometry, loo_predictability)
    if math.isinf(g):
        return Mixture(plain, plain_offset, g, "the teacher was trained from text", text_to_weight, 0.0)
    reason = "predicted from the similarity of the text embeddings and their agreement with the teacher"
    return Mixture(text + g * rows, g * offset, g, reason, text_to_weight, loo_predictability)
