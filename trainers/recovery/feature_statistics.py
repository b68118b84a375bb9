"""Provide the feature statistics of an image encoder: mean direction and within-class covariance."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import class_sums, unit

# Share of the within-class covariance that lies along differences of class means. On eight data sets it is
# 0.10 to 0.57, median 0.2 (docs/accuracy.md).
MIXING = 0.2
WHITENING_RIDGE = 3.0  # added to the covariance before whitening, in units of its mean variance
MIN_IMAGES = 100


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics of an encoder's image features, measured once on any images.

    The within-class covariance is a property of the encoder: those of different data sets have cosines of 0.4
    to 0.8 and effective ranks of 47 to 113, while isotropic samples have rank d.

    Attributes:
        mean: (d,) unit direction of the mean image feature.
        scatter: (d, d) within-class covariance with trace 1; covariance of all features if unlabeled.
        backbone: id of the image encoder.
        images: number of images that it was measured on.
        classes: number of their classes; 0 if unlabeled.
        source: description of these images.

    Raises:
        UserError: mean or covariance has a wrong shape or scale, or values that are not finite.
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
        classes = f"{self.classes} classes" if self.classes else "unlabeled"
        encoder = self.backbone or "unknown encoder"
        return f"FeatureStatistics(d={len(self.mean)}, {self.images:,} images, {classes}, {encoder})"

    @cached_property
    def whitener(self) -> Tensor:
        """((S / mean variance + 3 I) / 4)^-1 with the covariance S, (d, d) float64."""
        d = len(self.mean)
        eye = torch.eye(d, dtype=torch.float64)
        return torch.linalg.inv((self.scatter.double() * d + WHITENING_RIDGE * eye) / (1 + WHITENING_RIDGE))

    @cached_property
    def _factor(self) -> Tensor:
        """Symmetric square root of the covariance, (d, d)."""
        variance, axes = torch.linalg.eigh(self.scatter.double())
        return ((axes * variance.clamp(min=0).sqrt()) @ axes.T).float()

    def whiten(self, x: Tensor) -> Tensor:
        """Multiply x (n, d) by the whitener, which reduces directions of large within-class variance."""
        return x @ self.whitener.to(x)

    def noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n samples (n, d) from N(0, scatter); their mean squared length is 1."""
        return torch.randn(n, len(self.mean), generator=generator) @ self._factor

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a geometry file (safetensors)."""
        metadata = {name: getattr(self, name) for name in ("backbone", "images", "classes", "source")}
        save_tensors(path, {"mean": self.mean, "scatter": self.scatter}, {"kind": "geometry", **metadata})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """Load a file that `save` wrote. Raises UserError if it is missing, broken or of another kind."""
        tensors, metadata = load_tensors(path, "geometry")
        try:
            images, classes = int(metadata["images"]), int(metadata["classes"])  # type: ignore[call-overload]
            mean, scatter = tensors["mean"].float(), tensors["scatter"].float()
            return cls(mean, scatter, str(metadata["backbone"]), images, classes, str(metadata["source"]))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{path}: incomplete geometry file; measure it again") from None


def measure_feature_statistics(
    features: Tensor, labels: Tensor | None = None, *, backbone: str = "", source: str = ""
) -> FeatureStatistics:
    """Measure the feature statistics of an encoder on the features of any images.

    Args:
        features: (n, d) image features.
        labels: (n,) classes of the images, or None. With labels the covariance is pooled within classes of
            two or more images, else it is that of all images.
        backbone: id of the image encoder.
        source: description of the images.

    Returns:
        The feature statistics.

    Raises:
        UserError: fewer than 100 images, features that are not finite, or images that do not differ.
    """
    if features.dim() != 2 or len(features) < MIN_IMAGES:
        raise UserError(f"feature statistics need {MIN_IMAGES} images or more, got {len(features)}")
    if not torch.isfinite(features).all():
        raise UserError("features have values that are not finite")
    x = unit(features).double()
    classes = 0
    mean = x.mean(0)
    deviation = x - mean
    if labels is not None:
        class_ids, labels = labels.unique(return_inverse=True)
        classes = len(class_ids)
        sums, count = class_sums(x, labels, classes)
        deviation = (x - (sums / count[:, None])[labels])[count[labels] > 1]
    scatter = deviation.T @ deviation
    if not scatter.trace() > 0:
        raise UserError(
            "the images of each class are identical: the within-class covariance cannot be measured"
        )
    scatter = (scatter / scatter.trace()).float()
    return FeatureStatistics(F.normalize(mean, dim=0).float(), scatter, backbone, len(x), classes, source)
