from typing import Any

from . import transforms
from .transforms import (
    Cutout,
    GaussianNoise,
    InstanceNormalization,
    Random2DTranslation,
    build_img0_transform,
    build_transform,
)

__all__ = [
    "Cutout",
    "GaussianNoise",
    "InstanceNormalization",
    "Random2DTranslation",
    "build_img0_transform",
    "build_transform",
]


def __getattr__(name: str) -> Any:
    """INTERPOLATION_MODES, which needs torchvision."""
    return getattr(transforms, name)
