"""Text and teacher in one classifier of base classes: rows t_c + g u_c, and the weight g of the teacher.

u_c are the teacher's unit rows, centred over the classes, which changes no decision among them, and of mean
square length 1. The sum is not normalised: the lengths of its rows carry part of the accuracy.
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

# ln g = A - B ln(1 - near) + C found - D ln(spread): a regression on 360 cells of four data sets and their
# parts, kept because it holds on each set when fitted on the three others (docs/accuracy.md). No derivation.
PLAIN = (-12.1, 3.0, 4.7, 0.0)
WHITENED = (-6.1, 2.3, 2.6, 3.0)
WEIGHTS = (0.01, 3.0)  # no weight outside is taken from the rule
MOST_SURE = 0.99  # of what text foretells; more is not believed
TEXT_ALREADY = (
    0.8  # mean cosine to text from which rows are text with corrections; images' own reach 0.3 to 0.72
)


@dataclass(frozen=True)
class Mixture:
    """Rows of base classes (C, d) relative to any point, their biases (C,), the weight g and why it is g.

    foretell: (d, d) map from centred text features to the teacher's unit rows. sure: (s^2 / (1 - s^2))^2 with
    s the mean cosine of what text foretells of a row that was left out to this row.
    """

    rows: Tensor
    bias: Tensor
    weight: float
    reason: str
    text_to_weight: Tensor
    loo_predictability: float


def teacher_rows(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """u (C, d) and biases (C,) in the same scale: unit rows, centred, then of mean square length 1."""
    length = weight.norm(dim=1).clamp(min=1e-30)
    rows = unit(weight)
    offset = torch.zeros_like(length) if bias is None else bias.to(length) / length
    rows, offset = rows - rows.mean(0), offset - offset.mean()
    scale = rows.square().sum(1).mean().sqrt().clamp(min=1e-12)
    return rows / scale, offset / scale


def text_teacher_statistics(text: Tensor, rows: Tensor) -> tuple[float, float, float]:
    """What a client sees of text (C, d) and teacher `rows` (C, d) of the same classes.

    near: mean cosine of a text to its nearest other one: how alike the classes are in words.
    found: share of rows whose best text is their own (scores centred over the rows): how well the two agree.
    alike: mean cosine of a row to its text, both centred: near 1 for a teacher that was trained from text.
    """
    centred = text - text.mean(0)
    rows = unit(rows - rows.mean(0))
    middle = centred @ rows.mean(0)
    nearest_text_cosine, retrieval_accuracy = [], []
    for index in split_rows(torch.arange(len(text), device=text.device), len(text)):
        cosine = text[index] @ text.T
        cosine[torch.arange(len(index)), index] = -1
        nearest_text_cosine.append(cosine.max(1).values)
        retrieval_accuracy.append((rows[index] @ centred.T - middle).argmax(1) == index)
    text_teacher_cosine = float((rows * unit(centred)).sum(1).mean())
    return (
        float(torch.cat(nearest_text_cosine).mean()),
        float(torch.cat(retrieval_accuracy).float().mean()),
        text_teacher_cosine,
    )


def spread_along(rows: Tensor, geometry: FeatureStatistics) -> float:
    """How much of the teacher's `rows` (C, d) lies where images of any class scatter: 1 if isotropic."""
    centred = unit(rows - rows.mean(0))
    return float(((centred @ geometry.scatter.to(rows)) * centred).sum(1).mean()) * rows.shape[1]


def fit_text_to_weight(text: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """The map from centred text (C, d) to rows of length 1 in the mean, and `Mixture.loo_predictability` of it."""
    ridge, left_out = leave_one_out_ridge(text, rows)
    s = float(F.cosine_similarity(left_out, rows, dim=1).mean().clamp(0, MOST_SURE))
    return ridge / left_out.norm(dim=1).mean().clamp(min=1e-6), (s * s / (1 - s * s)) ** 2


def predict_teacher_weight(
    text: Tensor, rows: Tensor, geometry: FeatureStatistics | None = None, loo_predictability: float = 0.0
) -> float:
    """The teacher's weight g from what can be seen; infinite where its rows hold the text already.

    Noise cannot be foretold: a teacher whose left-out rows text foretells (`loo_predictability` above 1) is heard the more.
    """
    nearest_text_cosine, retrieval_accuracy, text_teacher_cosine = text_teacher_statistics(text, rows)
    if text_teacher_cosine > TEXT_ALREADY:
        return math.inf
    start, words, agreement, scatter = PLAIN if geometry is None else WHITENED
    spread = 1.0 if geometry is None else spread_along(rows, geometry)
    logarithm = start - words * math.log(max(1 - nearest_text_cosine, 1e-3)) + agreement * retrieval_accuracy
    logarithm -= scatter * math.log(max(spread, 1e-3))
    return min(max(max(loo_predictability, 1.0) * math.exp(logarithm), WEIGHTS[0]), WEIGHTS[1])


def mix(
    text: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    known: float | None = None,
    geometry: FeatureStatistics | None = None,
) -> Mixture:
    """Text (C, d) and a teacher's rows (C, d) and intercepts (C,) combined.

    known: the weight g of plain rows as the owner found it by cross-validation; else `predict_teacher_weight`, and with
    a geometry rows that are whitened by it, unless they hold the text already.
    """
    plain, plain_offset = rows, offset = teacher_rows(weight, bias)
    if geometry is not None and known is None:
        rows = geometry.whiten(rows)
        scale = rows.square().sum(1).mean().sqrt().clamp(min=1e-12)
        rows, offset = rows / scale, offset / scale
    text_to_weight, loo_predictability = fit_text_to_weight(text, unit(rows))
    if known is not None:
        return Mixture(
            text + known * rows,
            known * offset,
            known,
            "the owner's cross-validation",
            text_to_weight,
            loo_predictability,
        )
    g = predict_teacher_weight(text, plain, geometry, loo_predictability)
    if math.isinf(g):
        return Mixture(
            plain, plain_offset, g, "the teacher's rows hold the text already", text_to_weight, 0.0
        )
    reason = "how alike words are, and how teacher and words agree"
    return Mixture(text + g * rows, g * offset, g, reason, text_to_weight, loo_predictability)
