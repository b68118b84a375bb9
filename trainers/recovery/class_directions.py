"""Estimate the mean directions and the concentration of base classes without images.

A client knows the teacher's class weights, the text embeddings of the class names, and general statistics of
CLIP's image features. Measured on three data sets (ViT-B/32; docs/black_box.md): the mean resultant length of
each class is 0.86 to 0.90, and class means have cosine 0.85 to 0.96 to their common mean. The mean image and
text features have a cosine of about 0.3 (the modality gap).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import split_rows, unit

from . import vmf

MEAN_RESULTANT_LENGTH = 0.88  # typical value of a class
CONE_SLOPE = 0.38  # 1 - cone^2 per unit of the spread of texts, see `estimate_class_mean_cosine`


def paper_concentration(text: Tensor) -> float:
    """Return the paper's concentration: max_c 36 / theta_c^2.

    theta_c is the angle in radians from the text embedding of class c to its nearest other one.

    Args:
        text: (C, d) L2-normalized text embeddings, C >= 2.

    Raises:
        UserError: there is one class, or two embeddings are equal.
    """
    if len(text) < 2:
        raise UserError("RECOVERY.CONCENTRATION paper needs at least two classes; set it to geometry")
    nearest = -1.0
    for rows in split_rows(torch.arange(len(text)), len(text)):
        cosine = text[rows].double() @ text.double().T
        cosine[torch.arange(len(rows)), rows] = -1
        nearest = max(nearest, float(cosine.max()))
    theta = math.acos(min(nearest, 1.0))
    if theta < 1e-4:
        raise UserError(
            "two classes have the same text features, so the paper's concentration is infinite; "
            "set RECOVERY.CONCENTRATION to geometry"
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
    """Estimate the common mean direction of image features, such that it favors no class.

    The teacher's weights do not determine the common mean m of image features, which adds t_k.m to the score
    of class k. For real images this term is nearly equal for all classes (standard deviation 0.006 to 0.028);
    for the mean text embedding it is not (0.026 to 0.074). The estimate is the shortest m with t_k.m = 1 for
    all k, in least squares, scaled to length 1.

    Args:
        text: (K, d) L2-normalized text embeddings.

    Returns:
        (d,) unit direction.
    """
    ones = torch.ones(len(text), 1, dtype=torch.float64, device=text.device)
    direction = torch.linalg.pinv(text.double(), rtol=1e-3) @ ones
    return F.normalize(direction.flatten(), dim=0).to(text)


def estimate_class_mean_cosine(text: Tensor) -> float:
    """Estimate the class-mean cosine, i.e. the mean cosine of class means to their common mean, from text.

    cosine^2 = 1 - 0.38 s with the root mean square distance s of text embeddings from their mean, because
    classes with different texts have different images. s = 0.35 to 0.65 gives 0.93 to 0.87. This is halfway,
    in logarithms, between the value that suits all data sets (0.92) and a fit on text alone
    (docs/accuracy.md).

    Args:
        text: (C, d) L2-normalized text embeddings.
    """
    spread = float((text - text.mean(0)).square().sum(1).mean().sqrt())
    return math.sqrt(1 - min(max(CONE_SLOPE * spread, 0.04), 0.3))


def class_directions(weight: Tensor, common: Tensor, cone: float) -> Tensor:
    """Estimate the mean directions of classes: cone * common + sqrt(1 - cone^2) * unit deviation.

    The weight vector of a class in multinomial logistic regression is a sum of training features with
    coefficients that (nearly) sum to zero. It determines how its class differs from the others (cosine 0.98
    to 0.998 to the centered class mean), but not their common mean. However, the L2-normalized weights of an
    unbalanced teacher have a mean u that is an artifact. Unrelated unit vectors have |u|^2 = 1 / C, so the
    share |u|^2 / (|u|^2 + 1 / C) of the component along u is removed.

    Args:
        weight: (C, d) the teacher's class weights.
        common: (d,) common mean direction of features.
        cone: class-mean cosine.

    Returns:
        (C, d) unit directions.

    Raises:
        UserError: `cone` is not in [0, 1).
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
