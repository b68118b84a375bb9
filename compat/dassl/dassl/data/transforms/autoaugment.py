"""AutoAugment: the learned policies of Cubuk et al., AutoAugment: learning augmentation strategies from data,
CVPR 2019. Draws come from Python's random.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GRAY = (128, 128, 128)


def _signed(value: float) -> float:
    return value * random.choice([-1, 1])


def _affine(img: Image.Image, data: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    return img.transform(img.size, Image.Transform.AFFINE, data, resample, fillcolor=GRAY)


# Each operation with its magnitudes at the levels 0 to 9.
OPERATIONS: dict[str, tuple[np.ndarray, Callable[[Image.Image, float], Image.Image]]] = {
    "ShearX": (
        np.linspace(0, 0.3, 10),
        lambda img, m: _affine(img, (1, _signed(m), 0, 0, 1, 0), Image.Resampling.BICUBIC),
    ),
    "ShearY": (
        np.linspace(0, 0.3, 10),
        lambda img, m: _affine(img, (1, 0, 0, _signed(m), 1, 0), Image.Resampling.BICUBIC),
    ),
    "TranslateX": (
        np.linspace(0, 150 / 331, 10),
        lambda img, m: _affine(img, (1, 0, _signed(m * img.width), 0, 1, 0), Image.Resampling.NEAREST),
    ),
    "TranslateY": (
        np.linspace(0, 150 / 331, 10),
        lambda img, m: _affine(img, (1, 0, 0, 0, 1, _signed(m * img.height)), Image.Resampling.NEAREST),
    ),
    "Rotate": (np.linspace(0, 30, 10), lambda img, m: img.rotate(m, fillcolor=GRAY)),
    "Color": (np.linspace(0, 0.9, 10), lambda img, m: ImageEnhance.Color(img).enhance(1 + _signed(m))),
    "Contrast": (np.linspace(0, 0.9, 10), lambda img, m: ImageEnhance.Contrast(img).enhance(1 + _signed(m))),
    "Sharpness": (
        np.linspace(0, 0.9, 10),
        lambda img, m: ImageEnhance.Sharpness(img).enhance(1 + _signed(m)),
    ),
    "Brightness": (
        np.linspace(0, 0.9, 10),
        lambda img, m: ImageEnhance.Brightness(img).enhance(1 + _signed(m)),
    ),
    "Posterize": (np.round(np.linspace(8, 4, 10)), lambda img, m: ImageOps.posterize(img, int(m))),
    "Solarize": (np.linspace(256, 0, 10), lambda img, m: ImageOps.solarize(img, m)),  # type: ignore[arg-type]
    "AutoContrast": (np.zeros(10), lambda img, m: ImageOps.autocontrast(img)),
    "Equalize": (np.zeros(10), lambda img, m: ImageOps.equalize(img)),
    "Invert": (np.zeros(10), lambda img, m: ImageOps.invert(img)),
}

# One line a sub-policy: twice operation, probability, level.
IMAGENET = """
Posterize 0.4 8 Rotate 0.6 9
Solarize 0.6 5 AutoContrast 0.6 0
Equalize 0.8 0 Equalize 0.6 0
Posterize 0.6 7 Posterize 0.6 6
Equalize 0.4 0 Solarize 0.2 4
Equalize 0.4 0 Rotate 0.8 8
Solarize 0.6 3 Equalize 0.6 0
Posterize 0.8 5 Equalize 1.0 0
Rotate 0.2 3 Solarize 0.6 8
Equalize 0.6 0 Posterize 0.4 6
Rotate 0.8 8 Color 0.4 0
Rotate 0.4 9 Equalize 0.6 0
Equalize 0.0 0 Equalize 0.8 0
Invert 0.6 0 Equalize 1.0 0
Color 0.6 4 Contrast 1.0 8
Rotate 0.8 8 Color 1.0 2
Color 0.8 8 Solarize 0.8 7
Sharpness 0.4 7 Invert 0.6 0
ShearX 0.6 5 Equalize 1.0 0
Color 0.4 0 Equalize 0.6 0
Equalize 0.4 0 Solarize 0.2 4
Solarize 0.6 5 AutoContrast 0.6 0
Invert 0.6 0 Equalize 1.0 0
Color 0.6 4 Contrast 1.0 8
Equalize 0.8 0 Equalize 0.6 0
"""
CIFAR10 = """
Invert 0.1 0 Contrast 0.2 6
Rotate 0.7 2 TranslateX 0.3 9
Sharpness 0.8 1 Sharpness 0.9 3
ShearY 0.5 8 TranslateY 0.7 9
AutoContrast 0.5 0 Equalize 0.9 0
ShearY 0.2 7 Posterize 0.3 7
Color 0.4 3 Brightness 0.6 7
Sharpness 0.3 9 Brightness 0.7 9
Equalize 0.6 0 Equalize 0.5 0
Contrast 0.6 7 Sharpness 0.6 5
Color 0.7 7 TranslateX 0.5 8
Equalize 0.3 0 AutoContrast 0.4 0
TranslateY 0.4 3 Sharpness 0.2 6
Brightness 0.9 6 Color 0.2 8
Solarize 0.5 2 Invert 0.0 0
Equalize 0.2 0 AutoContrast 0.6 0
Equalize 0.2 0 Equalize 0.6 0
Color 0.9 9 Equalize 0.6 0
AutoContrast 0.8 0 Solarize 0.2 8
Brightness 0.1 3 Color 0.7 0
Solarize 0.4 5 AutoContrast 0.9 0
TranslateY 0.9 9 TranslateY 0.7 9
AutoContrast 0.9 0 Solarize 0.8 3
Equalize 0.8 0 Invert 0.1 0
TranslateY 0.7 9 AutoContrast 0.9 0
"""
SVHN = """
ShearX 0.9 4 Invert 0.2 0
ShearY 0.9 8 Invert 0.7 0
Equalize 0.6 0 Solarize 0.6 6
Invert 0.9 0 Equalize 0.6 0
Equalize 0.6 0 Rotate 0.9 3
ShearX 0.9 4 AutoContrast 0.8 0
ShearY 0.9 8 Invert 0.4 0
ShearY 0.9 5 Solarize 0.2 6
Invert 0.9 0 AutoContrast 0.8 0
Equalize 0.6 0 Rotate 0.9 3
ShearX 0.9 4 Solarize 0.3 3
ShearY 0.8 8 Invert 0.7 0
Equalize 0.9 0 TranslateY 0.6 6
Invert 0.9 0 Equalize 0.6 0
Contrast 0.3 3 Rotate 0.8 4
Invert 0.8 0 TranslateY 0.0 2
ShearY 0.7 6 Solarize 0.4 8
Invert 0.6 0 Rotate 0.8 4
ShearY 0.3 7 TranslateX 0.9 3
ShearX 0.1 6 Invert 0.6 0
Solarize 0.7 2 TranslateY 0.6 7
ShearY 0.8 4 Invert 0.8 0
ShearX 0.7 9 TranslateY 0.8 3
ShearY 0.8 5 AutoContrast 0.7 0
ShearX 0.7 2 Invert 0.1 0
"""


class _Policy:
    """Applies one of its sub-policies, drawn at random: two operations, each with its probability."""

    table = ""

    def __init__(self) -> None:
        rows = [line.split() for line in self.table.strip().splitlines()]
        self.policies = [[(r[i], float(r[i + 1]), int(r[i + 2])) for i in (0, 3)] for r in rows]

    def __call__(self, img: Image.Image) -> Image.Image:
        policy = self.policies[random.randint(0, len(self.policies) - 1)]
        for name, probability, level in policy:
            if random.random() < probability:
                magnitudes, operation = OPERATIONS[name]
                img = operation(img, float(magnitudes[level]))
        return img


class ImageNetPolicy(_Policy):
    """The policy learned on ImageNet."""

    table = IMAGENET


class CIFAR10Policy(_Policy):
    """The policy learned on CIFAR-10."""

    table = CIFAR10


class SVHNPolicy(_Policy):
    """The policy learned on SVHN."""

    table = SVHN
