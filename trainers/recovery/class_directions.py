"""Estimate the mean directions and the concentration of base classes without an image.

A client knows the teacher's rows, the text features of the class names, and how CLIP's image features of
classes lie in general. Measured on three data sets (ViT-B/32; docs/black_box.md): the features of a class
have mean resultant length 0.86 to 0.90, whatever the class; class means have cosine 0.85 to 0.96 to their
common mean; image and text features lie in different cones, about cosine 0.3 apart (the modality gap).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import split_rows, unit

from . import vmf

MEAN_RESULTANT_LENGTH = 0.88  # mean resultant length of a class
CONE_SLOPE = 0.38  # 1 - cone^2 for each unit of the texts' spread, see `estimate_class_mean_cosine`


def paper_concentration(text: Tensor) -> float:
    """Return the paper's concentration: max_c 36 / theta_c^2.

    theta_c is the angle in radians from the text feature of class c to its nearest other one.

    Args:
        text: (C, d) unit text features, C >= 2.

    Raises:
        UserError: one class, or two equal rows.
    """
    if len(text) < 2:
        raise UserError("the paper's concentration rule compares classes: it needs at least two")
    nearest = -1.0
    for rows in split_rows(torch.arange(len(text)), len(text)):
        cosine = text[rows].double() @ text.double().T
        cosine[torch.arange(len(rows)), rows] = -1
        nearest = max(nearest, float(cosine.max()))
    theta = math.acos(min(nearest, 1.0))
    if theta < 1e-4:
        raise UserError(
            "two classes have the same text features: the paper's concentration is infinite there"
        )
    return 36 / theta**2


def typical_concentration(d: int, coherence: float = MEAN_RESULTANT_LENGTH) -> float:
    """Return the concentration of a vMF in d dimensions with mean resultant length `coherence`.

    Raises:
        UserError: `coherence` is not between 0 and 1.
    """
    if not 0 < coherence < 1:
        raise UserError(f"RECOVERY.COHERENCE must lie between 0 and 1, got {coherence}")
    return float(vmf.concentration(coherence, d))


def common_direction(text: Tensor) -> Tensor:
    """Return a direction that all image features could share and that favors no class.

    The teacher's rows do not determine where images lie as a whole. Any estimate m adds t_k.m to the score of
    class k. Real images add nearly the same to all classes (standard deviation 0.006 to 0.028), but the mean
    text feature does not (0.026 to 0.074). The result is the shortest m with t_k.m = 1 for all k, in least
    squares, scaled to length 1.

    Args:
        text: (K, d) unit text features.

    Returns:
        (d,) unit direction.
    """
    ones = torch.ones(len(text), 1, dtype=torch.float64, device=text.device)
    direction = torch.linalg.pinv(text.double(), rtol=1e-3) @ ones
    return F.normalize(direction.flatten(), dim=0).to(text)


def estimate_class_mean_cosine(text: Tensor) -> float:
    """Estimate the mean cosine of class means to their common mean from text features.

    Classes that differ in text differ in images: cone^2 = 1 - 0.38 s, where s is the root mean square
    distance of a text feature from their mean (0.35 to 0.65: cone 0.93 to 0.87). That is half the way, in
    logarithms, from the cone that suits all data sets (0.92) to a fit on text features alone
    (docs/accuracy.md).

    Args:
        text: (C, d) unit text features.
    """
    spread = float((text - text.mean(0)).square().sum(1).mean().sqrt())
    return math.sqrt(1 - min(max(CONE_SLOPE * spread, 0.04), 0.3))


def class_directions(weight: Tensor, common: Tensor, cone: float) -> Tensor:
    """Estimate the mean directions of classes: cone * common + sqrt(1 - cone^2) * unit deviation.

    A row of multinomial logistic regression is a weighted sum of real features with weights that (nearly)
    sum to zero: it shows how its class differs from the others (cosine 0.98 to 0.998 to the centered mean of
    the features it was fitted on) and nothing of what they share. But the unit rows of an unbalanced teacher
    share a direction that no class has, u = mean of the rows. Rows without anything in common have
    |u|^2 = 1 / C, so the share |u|^2 / (|u|^2 + 1 / C) of their part along u is removed.

    Args:
        weight: (C, d) the teacher's rows.
        common: (d,) unit direction that all features share.
        cone: mean cosine of class means to `common`.

    Returns:
        (C, d) unit directions.

    Raises:
        UserError: the cone is not in [0, 1).
    """
    if not 0 <= cone < 1:
        raise UserError(f"RECOVERY.CONE must be at least 0 and less than 1, got {cone}")
    weight = unit(weight)
    u = weight.mean(0)
    excess = u.square().sum() / (u.square().sum() + 1 / len(weight))
    along = F.normalize(u, dim=0)
    weight = weight - excess * (weight @ along)[:, None] * along
    deviation = unit(weight - (weight @ common)[:, None] * common)
    return F.normalize(cone * common + math.sqrt(1 - cone * cone) * deviation, dim=1)
