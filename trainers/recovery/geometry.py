"""Where base-class features lie on CLIP's sphere, as well as a client can tell without an image.

What a client has: the teacher's rows, the class names' text features, and how CLIP's image features of
classes lie in general. Measured on three data sets (ViT-B/32; docs/black_box.md): a class's features have
mean resultant length 0.86 to 0.90, whatever the class; class means have cosine 0.85 to 0.96 to their common
mean; and image and text features lie in different cones, about cosine 0.3 apart (the modality gap).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.errors import UserError
from dfzsl.stages import portions, unit

from . import vmf

COHERENCE = 0.88
CONE = 0.92


def paper_concentration(text: Tensor) -> float:
    """The paper's rule: max_c 36 / theta_c^2, theta_c in radians from text c to its nearest other text.

    text: (C, d) unit rows, C >= 2. Raises UserError for two equal rows.
    """
    if len(text) < 2:
        raise UserError("the paper's concentration rule compares classes: it needs at least two")
    nearest = -1.0
    for rows in portions(torch.arange(len(text)), len(text)):
        cosine = text[rows].double() @ text.double().T
        cosine[torch.arange(len(rows)), rows] = -1
        nearest = max(nearest, float(cosine.max()))
    theta = math.acos(min(nearest, 1.0))
    if theta < 1e-4:
        raise UserError(
            "two classes have the same text features: the paper's concentration is infinite there"
        )
    return 36 / theta**2


def geometry_concentration(d: int, coherence: float = COHERENCE) -> float:
    """The kappa of a vMF in d dimensions whose mean cosine to its mean direction is `coherence`."""
    if not 0 < coherence < 1:
        raise UserError(f"RECOVERY.COHERENCE must lie between 0 and 1, got {coherence}")
    return float(vmf.concentration(coherence, d))


def common_direction(text: Tensor) -> Tensor:
    """A unit direction (d,) for what all image features share, which favours no class's text (K, d).

    Where images lie as a whole cannot be seen from a teacher's rows. Any guess m adds t_k.m to the score of
    class k; real images add nearly the same to all classes (standard deviation 0.006 to 0.028), the mean
    text feature does not (0.026 to 0.074). So: the shortest m with t_k.m = 1 for all k, in least squares.
    """
    ones = torch.ones(len(text), 1, dtype=torch.float64, device=text.device)
    direction = torch.linalg.pinv(text.double(), rtol=1e-3) @ ones
    return F.normalize(direction.flatten(), dim=0).to(text)


def class_directions(weight: Tensor, common: Tensor, cone: float = CONE) -> Tensor:
    """Estimated mean directions (C, d) of the classes: cone * common + sqrt(1 - cone^2) * unit deviation.

    A row of multinomial logistic regression is a weighted sum of real features with weights that (nearly)
    sum to zero: it shows how its class differs from the others (cosine 0.98 to 0.998 to the centred mean of
    the features it was fitted on) and nothing of what they share. But the unit rows of an unbalanced teacher
    share a direction that no class has, u = mean of the rows. Rows without anything in common have
    |u|^2 = 1 / C, so |u|^2 / (|u|^2 + 1 / C) of their part along u is taken out.
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
