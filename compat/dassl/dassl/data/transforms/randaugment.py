"""RandAugment (Cubuk et al., CVPR workshops 2020) and its variants. Draws come from Python's random, and the
place of a cutout from numpy's global generator.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

Operation = Callable[[Image.Image, float], Image.Image]
CUTOUT_COLOR = (125, 123, 114)


def _mirrored(value: float) -> float:
    return -value if random.random() > 0.5 else value


def _affine(img: Image.Image, *data: float) -> Image.Image:
    return img.transform(img.size, Image.Transform.AFFINE, data)


def _solarize_add(img: Image.Image, value: float) -> Image.Image:
    added = np.clip(np.asarray(img).astype(int) + int(value), 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(added), 128)


def _cutout(img: Image.Image, value: float) -> Image.Image:
    """A square of side `value` pixels around a random point, painted in CUTOUT_COLOR."""
    width, height = img.size
    x = int(max(0, np.random.uniform(width) - value / 2))
    y = int(max(0, np.random.uniform(height) - value / 2))
    corner = (min(width, x + value), min(height, y + value))
    img = img.copy()
    ImageDraw.Draw(img).rectangle((x, y, *corner), CUTOUT_COLOR)
    return img


OPERATIONS: dict[str, Operation] = {
    "Identity": lambda img, v: img,
    "AutoContrast": lambda img, v: ImageOps.autocontrast(img),
    "Equalize": lambda img, v: ImageOps.equalize(img),
    "Invert": lambda img, v: ImageOps.invert(img),
    "Rotate": lambda img, v: img.rotate(_mirrored(v)),
    "Posterize": lambda img, v: ImageOps.posterize(img, max(1, int(v))),
    "Solarize": lambda img, v: ImageOps.solarize(img, v),  # type: ignore[arg-type]
    "SolarizeAdd": _solarize_add,
    "Color": lambda img, v: ImageEnhance.Color(img).enhance(v),
    "Contrast": lambda img, v: ImageEnhance.Contrast(img).enhance(v),
    "Brightness": lambda img, v: ImageEnhance.Brightness(img).enhance(v),
    "Sharpness": lambda img, v: ImageEnhance.Sharpness(img).enhance(v),
    "ShearX": lambda img, v: _affine(img, 1, _mirrored(v), 0, 0, 1, 0),
    "ShearY": lambda img, v: _affine(img, 1, 0, 0, _mirrored(v), 1, 0),
    "TranslateX": lambda img, v: _affine(img, 1, 0, _mirrored(v * img.width), 0, 1, 0),
    "TranslateY": lambda img, v: _affine(img, 1, 0, 0, 0, 1, _mirrored(v * img.height)),
    "TranslateXabs": lambda img, v: _affine(img, 1, 0, _mirrored(v), 0, 1, 0),
    "TranslateYabs": lambda img, v: _affine(img, 1, 0, 0, 0, 1, _mirrored(v)),
    "CutoutAbs": _cutout,
}

# (operation, least, greatest value)
RANDAUGMENT = [
    ("AutoContrast", 0, 1),
    ("Equalize", 0, 1),
    ("Invert", 0, 1),
    ("Rotate", 0, 30),
    ("Posterize", 4, 8),
    ("Solarize", 0, 256),
    ("SolarizeAdd", 0, 110),
    ("Color", 0.1, 1.9),
    ("Contrast", 0.1, 1.9),
    ("Brightness", 0.1, 1.9),
    ("Sharpness", 0.1, 1.9),
    ("ShearX", 0.0, 0.3),
    ("ShearY", 0.0, 0.3),
    ("CutoutAbs", 0, 40),
    ("TranslateXabs", 0.0, 100),
    ("TranslateYabs", 0.0, 100),
]
RANDAUGMENT2 = [
    ("AutoContrast", 0, 1),
    ("Brightness", 0.1, 1.9),
    ("Color", 0.1, 1.9),
    ("Contrast", 0.1, 1.9),
    ("Equalize", 0, 1),
    ("Identity", 0, 1),
    ("Invert", 0, 1),
    ("Posterize", 4, 8),
    ("Rotate", -30, 30),
    ("Sharpness", 0.1, 1.9),
    ("ShearX", -0.3, 0.3),
    ("ShearY", -0.3, 0.3),
    ("Solarize", 0, 256),
    ("TranslateX", -0.3, 0.3),
    ("TranslateY", -0.3, 0.3),
]
FIXMATCH = [
    ("AutoContrast", 0, 1),
    ("Brightness", 0.05, 0.95),
    ("Color", 0.05, 0.95),
    ("Contrast", 0.05, 0.95),
    ("Equalize", 0, 1),
    ("Identity", 0, 1),
    ("Posterize", 4, 8),
    ("Rotate", -30, 30),
    ("Sharpness", 0.05, 0.95),
    ("ShearX", -0.3, 0.3),
    ("ShearY", -0.3, 0.3),
    ("Solarize", 0, 256),
    ("TranslateX", -0.3, 0.3),
    ("TranslateY", -0.3, 0.3),
]


class RandAugment:
    """`n` operations drawn at random, with replacement, all at magnitude `m` of 30."""

    def __init__(self, n: int = 2, m: float = 10) -> None:
        if not 0 <= m <= 30:
            raise ValueError(f"INPUT.RANDAUGMENT_M must be between 0 and 30, but got {m}")
        self.n = n
        self.m = m

    def __call__(self, img: Image.Image) -> Image.Image:
        for name, least, greatest in random.choices(RANDAUGMENT, k=self.n):
            img = OPERATIONS[name](img, least + self.m / 30 * (greatest - least))
        return img


class RandAugment2:
    """`n` operations of a list of its own, each applied with probability `p` at a random magnitude."""

    def __init__(self, n: int = 2, p: float = 0.6) -> None:
        self.n = n
        self.p = p

    def __call__(self, img: Image.Image) -> Image.Image:
        for name, least, greatest in random.choices(RANDAUGMENT2, k=self.n):
            if random.random() > self.p:
                continue
            img = OPERATIONS[name](img, least + random.random() * (greatest - least))
        return img


class RandAugmentFixMatch:
    """`n` operations of FixMatch's list (Sohn et al., NeurIPS 2020), each at a random magnitude."""

    def __init__(self, n: int = 2) -> None:
        self.n = n

    def __call__(self, img: Image.Image) -> Image.Image:
        for name, least, greatest in random.choices(FIXMATCH, k=self.n):
            img = OPERATIONS[name](img, least + random.random() * (greatest - least))
        return img
