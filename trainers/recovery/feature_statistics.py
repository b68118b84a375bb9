"""Where base-class features lie on CLIP's sphere, as well as a client can tell without an image.

What a client has: the teacher's rows, the class names' text features, and how CLIP's image features of
classes lie in general. Measured on three data sets (ViT-B/32; docs/black_box.md): a class's features have
mean resultant length 0.86 to 0.90, whatever the class; class means have cosine 0.85 to 0.96 to their common
mean; and image and text features lie in different cones, about cosine 0.3 apart (the modality gap).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import portions, unit

from . import vmf

COHERENCE = 0.88
BREADTH = 0.38  # 1 - cone^2 per unit of the texts' spread, see `cone_of`
# Within-class covariance holds this much of the covariance of the data set's own class means: images of a
# class differ most where classes differ. On eight data sets 0.10 to 0.57, median 0.2 (docs/accuracy.md).
MIXING = 0.2
FLOOR = 3.0  # what whitening adds to the covariance, in units of its mean variance
LEAST_IMAGES = 100


@dataclass(frozen=True, eq=False)
class Geometry:
    """How an encoder's image features scatter: measured once, on pictures that need not be of any task.

    Within-class covariance belongs to the encoder: that of one data set has cosine 0.4 to 0.8 to another's,
    and an effective rank of 47 to 113 where isotropic draws have d.

    Attributes:
        mean: (d,) unit direction of the mean image feature.
        scatter: (d, d) covariance of the features of a class, its trace 1.
        backbone: id of the image encoder; images, classes: what it was measured on (0 classes: unlabelled,
            and `scatter` is the covariance of all); source: where these came from, in words.
    """

    mean: Tensor
    scatter: Tensor
    backbone: str = ""
    images: int = 0
    classes: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        d = len(self.mean)
        fits = self.mean.shape == (d,) and self.scatter.shape == (d, d)
        if not fits or not torch.isfinite(self.scatter).all() or not torch.isfinite(self.mean).all():
            raise UserError("a geometry needs a finite mean (d,) and covariance (d, d)")
        if not abs(float(self.mean.norm()) - 1) < 1e-3 or not abs(float(self.scatter.trace()) - 1) < 1e-3:
            raise UserError("a geometry's mean has length 1 and its covariance trace 1")

    def __repr__(self) -> str:
        labelled = f"{self.classes} classes" if self.classes else "unlabelled"
        of = self.backbone or "features"
        return f"Geometry(d={len(self.mean)}, {self.images:,} images, {labelled}, of {of})"

    @cached_property
    def whitener(self) -> Tensor:
        """((S / mean variance + 3 I) / 4)^-1, (d, d) float64."""
        d = len(self.mean)
        eye = torch.eye(d, dtype=torch.float64)
        return torch.linalg.inv((self.scatter.double() * d + FLOOR * eye) / (1 + FLOOR))

    @cached_property
    def _factor(self) -> Tensor:
        """The symmetric square root of the scatter, (d, d)."""
        variance, axes = torch.linalg.eigh(self.scatter.double())
        return ((axes * variance.clamp(min=0).sqrt()) @ axes.T).float()

    def whiten(self, x: Tensor) -> Tensor:
        """Rows x (n, d) times the whitener: directions in which images of any class differ count less."""
        return x @ self.whitener.to(x)

    def noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws (n, d) from N(0, scatter): of length 1 in the mean square."""
        return torch.randn(n, len(self.mean), generator=generator) @ self._factor

    def save(self, path: str | os.PathLike[str]) -> None:
        about = {name: getattr(self, name) for name in ("backbone", "images", "classes", "source")}
        save_tensors(path, {"mean": self.mean, "scatter": self.scatter}, {"kind": "geometry", **about})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Geometry:
        """Read `save`'s file. Raises UserError when it is missing, broken or of another kind."""
        tensors, about = load_tensors(path, "geometry")
        try:
            images, classes = int(about["images"]), int(about["classes"])  # type: ignore[call-overload]
            mean, scatter = tensors["mean"].float(), tensors["scatter"].float()
            return cls(mean, scatter, str(about["backbone"]), images, classes, str(about["source"]))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{path}: an incomplete geometry file; measure it again") from None


def measure_geometry(
    features: Tensor, labels: Tensor | None = None, *, backbone: str = "", source: str = ""
) -> Geometry:
    """The geometry of an encoder from the features (n, d) of any pictures, labelled (n,) or not.

    With labels the scatter is the pooled covariance within classes of two and more images, without them the
    covariance of all. Raises UserError for fewer than 100 images and for features that are not finite.
    """
    if features.dim() != 2 or len(features) < LEAST_IMAGES:
        raise UserError(f"a geometry needs {LEAST_IMAGES} images or more, got {len(features)}")
    if not torch.isfinite(features).all():
        raise UserError("features have values that are not finite")
    x = unit(features).double()
    classes = 0
    mean = x.mean(0)
    deviation = x - mean
    if labels is not None:
        _, place, count = labels.unique(return_inverse=True, return_counts=True)
        classes = len(count)
        means = torch.zeros(classes, x.shape[1], dtype=x.dtype).index_add_(0, place, x) / count[:, None]
        deviation = (x - means[place])[count[place] > 1]
    scatter = deviation.T @ deviation
    if not scatter.trace() > 0:
        raise UserError("the images do not differ within any class: their geometry cannot be measured")
    scatter = (scatter / scatter.trace()).float()
    return Geometry(F.normalize(mean, dim=0).float(), scatter, backbone, len(x), classes, source)


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


def cone_of(text: Tensor) -> float:
    """Mean cosine of class means to their common mean, as far as the texts (C, d) of the classes tell.

    Classes that differ in words differ in images: cone^2 = 1 - 0.38 s, s the root mean square distance of a
    text from the mean text (0.35 to 0.65: cone 0.93 to 0.87). That is half the way, in logarithms, from the
    cone that suits all sets (0.92) to what the texts alone say (docs/accuracy.md).
    """
    spread = float((text - text.mean(0)).square().sum(1).mean().sqrt())
    return math.sqrt(1 - min(max(BREADTH * spread, 0.04), 0.3))


def class_directions(weight: Tensor, common: Tensor, cone: float) -> Tensor:
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
