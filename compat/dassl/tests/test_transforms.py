import random

import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.data import transforms as package
from dassl.data.transforms import (
    Cutout,
    GaussianNoise,
    InstanceNormalization,
    Random2DTranslation,
    autoaugment,
    build_transform,
    randaugment,
)
from dassl.data.transforms.transforms import AVAI_CHOICES
from dassl.utils.vision import import_torchvision
from PIL import Image

T = import_torchvision().transforms


def make_cfg(*choices, **inputs):
    cfg = get_cfg_default()
    cfg.INPUT.SIZE = (16, 12)
    cfg.INPUT.TRANSFORMS = choices
    for key, value in inputs.items():
        cfg.INPUT[key] = value
    return cfg


@pytest.fixture
def image():
    noise = np.random.RandomState(0).randint(0, 255, (40, 30, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def seeded(function, *arguments):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    return function(*arguments)


@pytest.mark.parametrize("choice", AVAI_CHOICES)
def test_every_transform(choice, image):
    """Alone, with random crop for those that need a larger image: right shape, and the seed decides it."""
    for is_train in (True, False):
        transform = build_transform(make_cfg(choice, CROP_PADDING=2), is_train=is_train)
        first, second = seeded(transform, image), seeded(transform, image)
        assert first.shape == (3, 16, 12) and first.dtype == torch.float32
        assert torch.equal(first, second)


def test_all_transforms_together(image, capsys):
    cfg = make_cfg(*reversed(AVAI_CHOICES), GB_K=3)
    assert build_transform(cfg, is_train=True)(image).shape == (3, 16, 12)
    assert capsys.readouterr().out.splitlines() == [
        "Building transform_train",
        "+ random translation",
        "+ random crop (padding = 4)",
        "+ random resized crop (size=(16, 12), scale=(0.08, 1.0))",
        "+ random flip",
        "+ imagenet policy",
        "+ cifar10 policy",
        "+ svhn policy",
        "+ randaugment (n=2, m=10)",
        "+ randaugment_fixmatch (n=2)",
        "+ randaugment2 (n=2)",
        "+ color jitter (brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)",
        "+ random gray scale",
        "+ gaussian blur (kernel=3, p=0.5)",
        "+ to torch tensor of range [0, 1]",
        "+ cutout (n_holes=1, length=16)",
        "+ normalization (mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])",
        "+ gaussian noise (mean=0.0, std=0.15)",
        "+ instance normalization",
    ]


def test_log_of_coops_transforms(capsys):
    cfg = get_cfg_default()
    cfg.INPUT.TRANSFORMS = ["random_resized_crop", "random_flip", "normalize"]
    cfg.INPUT.INTERPOLATION = "bicubic"
    build_transform(cfg, is_train=True)
    build_transform(cfg, is_train=False)
    assert capsys.readouterr().out.splitlines() == [
        "Building transform_train",
        "+ random resized crop (size=(224, 224), scale=(0.08, 1.0))",
        "+ random flip",
        "+ to torch tensor of range [0, 1]",
        "+ normalization (mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])",
        "Building transform_test",
        "+ resize the smaller edge to 224",
        "+ 224x224 center crop",
        "+ to torch tensor of range [0, 1]",
        "+ normalization (mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])",
    ]


def test_stream_and_order_are_torchvisions(image):
    """The random transforms draw from torch's generator in the fixed order, whatever the configured one."""
    cfg = make_cfg(
        *(
            "normalize",
            "gaussian_blur",
            "randomgrayscale",
            "colorjitter",
            "random_flip",
            "random_resized_crop",
        ),
        INTERPOLATION="bicubic",
        GB_K=5,
    )
    modes = T.InterpolationMode
    expected = T.Compose(
        [
            T.RandomResizedCrop((16, 12), scale=(0.08, 1.0), interpolation=modes.BICUBIC),
            T.RandomHorizontalFlip(p=0.5),
            T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([T.GaussianBlur(5)], p=0.5),
            T.ToTensor(),
            T.Normalize(mean=cfg.INPUT.PIXEL_MEAN, std=cfg.INPUT.PIXEL_STD),
        ]
    )
    transform = build_transform(cfg, is_train=True)
    torch.manual_seed(9)
    got = [transform(image) for _ in range(10)]
    torch.manual_seed(9)
    assert all(torch.equal(g, expected(image)) for g in got)


def test_the_test_transform_is_deterministic(image):
    cfg = make_cfg("random_resized_crop", "random_flip", "normalize", INTERPOLATION="bicubic")
    modes = T.InterpolationMode
    expected = T.Compose(
        [
            T.Resize(16, interpolation=modes.BICUBIC),
            T.CenterCrop((16, 12)),
            T.ToTensor(),
            T.Normalize(mean=cfg.INPUT.PIXEL_MEAN, std=cfg.INPUT.PIXEL_STD),
        ]
    )
    state = torch.get_rng_state()
    assert torch.equal(build_transform(cfg, is_train=False)(image), expected(image))
    assert torch.equal(torch.get_rng_state(), state)


def test_choices_replace_the_configured(image, capsys):
    cfg = make_cfg("random_flip", "normalize")
    out = build_transform(cfg, is_train=True, choices=[])(image)
    assert torch.equal(out, T.Compose([T.Resize((16, 12)), T.ToTensor()])(image))
    assert "+ resize to 16x12" in capsys.readouterr().out


def test_errors():
    with pytest.raises(ValueError, match="unknown transform 'random_flop'; known: random_flip"):
        build_transform(make_cfg("random_flop"))
    with pytest.raises(ValueError, match=r"INPUT\.INTERPOLATION must be one of .* but got cubic"):
        build_transform(make_cfg(INTERPOLATION="cubic"))
    with pytest.raises(ValueError, match="RANDAUGMENT_M"):
        build_transform(make_cfg("randaugment", RANDAUGMENT_M=40))


def test_interpolation_modes():
    assert package.INTERPOLATION_MODES["bicubic"] == T.InterpolationMode.BICUBIC
    assert package.transforms.INTERPOLATION_MODES["nearest"] == T.InterpolationMode.NEAREST
    with pytest.raises(AttributeError):
        package.NOTHING  # noqa: B018


def test_tensor_transforms():
    torch.manual_seed(0)
    x = torch.rand(3, 9, 9)
    normalized = InstanceNormalization()(x)
    assert torch.allclose(normalized.mean(dim=(1, 2)), torch.zeros(3), atol=1e-6)
    assert torch.allclose(normalized.flatten(1).std(dim=1), torch.ones(3))
    np.random.seed(0)
    holes = [(Cutout(1, 4)(torch.ones(3, 9, 9)) == 0).sum().item() for _ in range(50)]
    assert max(holes) == 3 * 16 and min(holes) >= 3 * 4
    random.seed(0)
    noise = GaussianNoise(mean=1.0, std=0.1)
    changed = [out for out in (noise(x) for _ in range(40)) if out is not x]
    assert 10 < len(changed) < 30
    assert torch.stack(changed).mean() - x.mean() == pytest.approx(1.0, abs=0.02)
    image = Image.new("RGB", (50, 40))
    random.seed(0)
    assert {Random2DTranslation(16, 12)(image).size for _ in range(20)} == {(12, 16)}


# Policies


@pytest.mark.parametrize("name", ["ImageNet", "CIFAR10", "SVHN"])
def test_policies_are_the_published_ones(name):
    """Against torchvision's tables (levels of operations without magnitude left out)."""
    policies = T.AutoAugment(getattr(T.AutoAugmentPolicy, name.upper())).policies
    plain = ("AutoContrast", "Equalize", "Invert")
    ours = getattr(autoaugment, f"{name}Policy")().policies
    got = [tuple((op, p, None if op in plain else level) for op, p, level in row) for row in ours]
    assert got == [tuple(row) for row in policies] and len(got) == 25


@pytest.mark.parametrize("name", autoaugment.OPERATIONS)
def test_autoaugment_operations(name, image):
    magnitudes, operation = autoaugment.OPERATIONS[name]
    assert len(magnitudes) == 10
    random.seed(0)
    for level in (0, 5, 9):
        out = operation(image, float(magnitudes[level]))
        assert out.size == image.size and out.mode == "RGB"
    if name not in ("AutoContrast", "Equalize"):
        assert np.any(np.asarray(out) != np.asarray(image)), "the greatest magnitude changes the image"


def test_autoaugment_stream(image):
    """Draws the sub-policy, then for each operation whether, then the sign."""
    policy = autoaugment.ImageNetPolicy()
    random.seed(2)
    got = [policy(image) for _ in range(30)]
    random.seed(2)
    for out in got:
        expected = image
        for name, probability, level in policy.policies[random.randint(0, 24)]:
            if random.random() < probability:
                magnitudes, operation = autoaugment.OPERATIONS[name]
                expected = operation(expected, float(magnitudes[level]))
        assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_randaugment_operations(name, image):
    """At each end of the ranges in both lists."""
    random.seed(0)
    np.random.seed(0)
    before = image.tobytes()
    for _, least, greatest in [
        row for row in randaugment.RANDAUGMENT + randaugment.FIXMATCH if row[0] == name
    ]:
        for value in (least, greatest):
            out = randaugment.OPERATIONS[name](image, value)
            assert out.size == image.size and out.mode == "RGB"
    assert image.tobytes() == before, "the input is left alone"


def test_randaugment_variants(image):
    random.seed(0)
    np.random.seed(0)
    for transform in (
        randaugment.RandAugment(3, 30),
        randaugment.RandAugment2(3),
        randaugment.RandAugmentFixMatch(3),
    ):
        outs = [transform(image) for _ in range(40)]
        assert {out.size for out in outs} == {(30, 40)}
        assert len({out.tobytes() for out in outs}) > 20
    assert randaugment.RandAugment2(5, p=-1.0)(image) is image
