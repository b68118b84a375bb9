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
