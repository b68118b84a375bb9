"""Image transforms by name.

Resizing, cropping, flipping and colour changes are torchvision's own, so that they draw from torch's
generator in torchvision's order. torchvision is imported when a transform is first built, not with this
module.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from ...utils.vision import import_torchvision
from .autoaugment import CIFAR10Policy, ImageNetPolicy, SVHNPolicy
from .randaugment import RandAugment, RandAugment2, RandAugmentFixMatch

AVAI_CHOICES = [
    "random_flip",
    "random_resized_crop",
    "normalize",
    "instance_norm",
    "random_crop",
    "random_translation",
    "center_crop",
    "cutout",
    "imagenet_policy",
    "cifar10_policy",
    "svhn_policy",
    "randaugment",
    "randaugment_fixmatch",
    "randaugment2",
    "gaussian_noise",
    "colorjitter",
    "randomgrayscale",
    "gaussian_blur",
]


def __getattr__(name: str) -> Any:
    """INTERPOLATION_MODES: torchvision's modes by name, made when asked for."""
    if name == "INTERPOLATION_MODES":
        modes = import_torchvision().transforms.InterpolationMode
        return {"bilinear": modes.BILINEAR, "bicubic": modes.BICUBIC, "nearest": modes.NEAREST}
    raise AttributeError(f"module {__name__} has no attribute {name}")


def _interpolation(name: str) -> Any:
    known = __getattr__("INTERPOLATION_MODES")
    if name not in known:
        raise ValueError(f"INPUT.INTERPOLATION must be one of {list(known)}, but got {name}")
    return known[name]


class Random2DTranslation:
    """With probability `p`: resize to 1.125 times (height, width) and crop at a random place; else resize."""

    def __init__(self, height: int, width: int, p: float = 0.5, interpolation: Any = None) -> None:
        self.height = height
        self.width = width
        self.p = p
        self.interpolation = _interpolation("bilinear") if interpolation is None else interpolation

    def __call__(self, img: Image.Image) -> Image.Image:
        functional = import_torchvision().transforms.functional
        if random.uniform(0, 1) > self.p:
            return functional.resize(img, [self.height, self.width], self.interpolation)
        height, width = round(self.height * 1.125), round(self.width * 1.125)
        img = functional.resize(img, [height, width], self.interpolation)
        left = round(random.uniform(0, width - self.width))
        top = round(random.uniform(0, height - self.height))
        return functional.crop(img, top, left, self.height, self.width)


class InstanceNormalization:
    """Each channel of an image (C, H, W) to mean 0 and standard deviation 1."""

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = eps

    def __call__(self, img: Tensor) -> Tensor:
        flat = img.reshape(img.shape[0], -1)
        mean = flat.mean(dim=1)[:, None, None]
        std = flat.std(dim=1)[:, None, None]
        return (img - mean) / (std + self.eps)


class Cutout:
    """Set `n_holes` squares of side `length` (pixels) of an image (C, H, W) to zero."""

    def __init__(self, n_holes: int = 1, length: int = 16) -> None:
        self.n_holes = n_holes
        self.length = length

    def __call__(self, img: Tensor) -> Tensor:
        height, width = img.shape[-2:]
        mask = torch.ones(height, width)
        half = self.length // 2
        for _ in range(self.n_holes):
            y, x = np.random.randint(height), np.random.randint(width)
            mask[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
        return img * mask


class GaussianNoise:
    """With probability `p`: add noise of that mean and standard deviation."""

    def __init__(self, mean: float = 0, std: float = 0.15, p: float = 0.5) -> None:
        self.mean = mean
        self.std = std
        self.p = p

    def __call__(self, img: Tensor) -> Tensor:
        if random.uniform(0, 1) > self.p:
            return img
        return img + torch.randn(img.shape) * self.std + self.mean


def build_transform(cfg: CfgNode, is_train: bool = True, choices: Sequence[str] | None = None) -> Any:
    """The transform from a PIL image to a tensor (3, H, W), or None with INPUT.NO_TRANSFORM.

    choices: names instead of INPUT.TRANSFORMS. Their order does not matter: in training it is resize (unless
    cropped at random), translation, random crop, random resized crop, flip, policies, RandAugment, colour
    jitter, grayscale, blur, tensor, cutout, normalization, noise, instance normalization; in testing resize
    the smaller edge, centre crop, tensor, normalization, instance normalization.
    Raises ValueError for an unknown name.
    """
    if cfg.INPUT.NO_TRANSFORM:
        print("Note: no transform is applied!")
        return None
    if choices is None:
        choices = cfg.INPUT.TRANSFORMS
    unknown = [choice for choice in choices if choice not in AVAI_CHOICES]
    if unknown:
        raise ValueError(f"unknown transform {unknown[0]!r}; known: {', '.join(AVAI_CHOICES)}")
    height, width = cfg.INPUT.SIZE
    normalize = import_torchvision().transforms.Normalize(mean=cfg.INPUT.PIXEL_MEAN, std=cfg.INPUT.PIXEL_STD)
    build = _build_transform_train if is_train else _build_transform_test
    return build(cfg, choices, f"{height}x{width}", normalize)


def build_img0_transform(cfg: CfgNode) -> Any:
    """Resize to INPUT.SIZE, tensor and, if it is among INPUT.TRANSFORMS, normalization."""
    transforms = import_torchvision().transforms
    steps = [
        transforms.Resize(tuple(cfg.INPUT.SIZE), interpolation=_interpolation(cfg.INPUT.INTERPOLATION)),
        transforms.ToTensor(),
    ]
    if "normalize" in cfg.INPUT.TRANSFORMS:
        steps.append(transforms.Normalize(mean=cfg.INPUT.PIXEL_MEAN, std=cfg.INPUT.PIXEL_STD))
    return transforms.Compose(steps)


def _to_tensor_steps(
    cfg: CfgNode, choices: Sequence[str], normalize: Callable, is_train: bool
) -> list[Callable]:
    """What follows the PIL image."""
    transforms, inputs = import_torchvision().transforms, cfg.INPUT
    print("+ to torch tensor of range [0, 1]")
    steps: list[Callable] = [transforms.ToTensor()]
    if is_train and "cutout" in choices:
        print(f"+ cutout (n_holes={inputs.CUTOUT_N}, length={inputs.CUTOUT_LEN})")
        steps.append(Cutout(inputs.CUTOUT_N, inputs.CUTOUT_LEN))
    if "normalize" in choices:
        print(f"+ normalization (mean={inputs.PIXEL_MEAN}, std={inputs.PIXEL_STD})")
        steps.append(normalize)
    if is_train and "gaussian_noise" in choices:
        print(f"+ gaussian noise (mean={inputs.GN_MEAN}, std={inputs.GN_STD})")
        steps.append(GaussianNoise(inputs.GN_MEAN, inputs.GN_STD))
    if "instance_norm" in choices:
        print("+ instance normalization")
        steps.append(InstanceNormalization())
    return steps


def _build_transform_train(
    cfg: CfgNode, choices: Sequence[str], target_size: str, normalize: Callable
) -> Any:
    transforms, inputs = import_torchvision().transforms, cfg.INPUT
    height, width = inputs.SIZE
    interpolation = _interpolation(inputs.INTERPOLATION)
    print("Building transform_train")
    steps: list[Callable] = []
    if "random_crop" not in choices and "random_resized_crop" not in choices:
        print(f"+ resize to {target_size}")
        steps.append(transforms.Resize((height, width), interpolation=interpolation))
    if "random_translation" in choices:
        print("+ random translation")
        steps.append(Random2DTranslation(height, width))
    if "random_crop" in choices:
        print(f"+ random crop (padding = {inputs.CROP_PADDING})")
        steps.append(transforms.RandomCrop((height, width), padding=inputs.CROP_PADDING))
    if "random_resized_crop" in choices:
        print(f"+ random resized crop (size={inputs.SIZE}, scale={inputs.RRCROP_SCALE})")
        steps.append(
            transforms.RandomResizedCrop(
                (height, width), scale=tuple(inputs.RRCROP_SCALE), interpolation=interpolation
            )
        )
    if "random_flip" in choices:
        print("+ random flip")
        steps.append(transforms.RandomHorizontalFlip())
    steps.extend(_policy_steps(cfg, choices))
    if "colorjitter" in choices:
        jitter = (inputs.COLORJITTER_B, inputs.COLORJITTER_C, inputs.COLORJITTER_S, inputs.COLORJITTER_H)
        print("+ color jitter (brightness={}, contrast={}, saturation={}, hue={})".format(*jitter))
        steps.append(transforms.ColorJitter(*jitter))
    if "randomgrayscale" in choices:
        print("+ random gray scale")
        steps.append(transforms.RandomGrayscale(p=inputs.RGS_P))
    if "gaussian_blur" in choices:
        print(f"+ gaussian blur (kernel={inputs.GB_K})")
        steps.append(transforms.RandomApply([transforms.GaussianBlur(inputs.GB_K)], p=inputs.GB_P))
    return transforms.Compose(steps + _to_tensor_steps(cfg, choices, normalize, is_train=True))


def _policy_steps(cfg: CfgNode, choices: Sequence[str]) -> list[Callable]:
    """The learned and the random augmentation policies."""
    n, m = cfg.INPUT.RANDAUGMENT_N, cfg.INPUT.RANDAUGMENT_M
    steps: list[Callable] = []
    if "imagenet_policy" in choices:
        print("+ imagenet policy")
        steps.append(ImageNetPolicy())
    if "cifar10_policy" in choices:
        print("+ cifar10 policy")
        steps.append(CIFAR10Policy())
    if "svhn_policy" in choices:
        print("+ svhn policy")
        steps.append(SVHNPolicy())
    if "randaugment" in choices:
        print(f"+ randaugment (n={n}, m={m})")
        steps.append(RandAugment(n, m))
    if "randaugment_fixmatch" in choices:
        print(f"+ randaugment_fixmatch (n={n})")
        steps.append(RandAugmentFixMatch(n))
    if "randaugment2" in choices:
        print(f"+ randaugment2 (n={n})")
        steps.append(RandAugment2(n))
    return steps


def _build_transform_test(cfg: CfgNode, choices: Sequence[str], target_size: str, normalize: Callable) -> Any:
    transforms = import_torchvision().transforms
    height, width = cfg.INPUT.SIZE
    print("Building transform_test")
    print(f"+ resize the smaller edge to {max(height, width)}")
    print(f"+ {target_size} center crop")
    return transforms.Compose(
        [
            transforms.Resize(max(height, width), interpolation=_interpolation(cfg.INPUT.INTERPOLATION)),
            transforms.CenterCrop((height, width)),
            *_to_tensor_steps(cfg, choices, normalize, is_train=False),
        ]
    )
