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
        "+ gaussian blur (kernel=3)",
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
    with pytest.raises(ValueError, match=r"'random_flop'.*random_flip"):
        build_transform(make_cfg("random_flop"))
    with pytest.raises(ValueError, match=r"INPUT\.INTERPOLATION.*cubic"):
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
    """At each end of the ranges in all lists."""
    random.seed(0)
    np.random.seed(0)
    before = image.tobytes()
    lists = randaugment.RANDAUGMENT + randaugment.RANDAUGMENT2 + randaugment.FIXMATCH
    for _, least, greatest in [row for row in lists if row[0] == name]:
        for value in (least, greatest):
            out = randaugment.OPERATIONS[name](image, value)
            assert out.size == image.size and out.mode == "RGB"
    assert image.tobytes() == before, "the input is left alone"


# The original's lists as they are documented: each operation and the ends of its range.
LISTS = {
    "randaugment": "AutoContrast 0 1, Equalize 0 1, Invert 0 1, Rotate 0 30, Posterize 4 8, Solarize 0 256, "
    "SolarizeAdd 0 110, Color .1 1.9, Contrast .1 1.9, Brightness .1 1.9, Sharpness .1 1.9, ShearX 0 .3, "
    "ShearY 0 .3, CutoutAbs 0 40, TranslateXabs 0 100, TranslateYabs 0 100",
    "randaugment2": "AutoContrast 0 1, Brightness .1 1.9, Color .1 1.9, Contrast .1 1.9, Equalize 0 1, "
    "Identity 0 1, Invert 0 1, Posterize 4 8, Rotate -30 30, Sharpness .1 1.9, ShearX -.3 .3, ShearY -.3 .3, "
    "Solarize 0 256, TranslateX -.3 .3, TranslateY -.3 .3",
    "randaugment_fixmatch": "AutoContrast 0 1, Brightness .05 .95, Color .05 .95, Contrast .05 .95, "
    "Equalize 0 1, Identity 0 1, Posterize 4 8, Rotate -30 30, Sharpness .05 .95, ShearX -.3 .3, "
    "ShearY -.3 .3, Solarize 0 256, TranslateX -.3 .3, TranslateY -.3 .3",
}


def turned(value):
    return -value if random.random() > 0.5 else value


def moved(image, corner):
    """The image seen through a plane: output (x, y) shows input (x + a y + c, d x + y + f)."""
    a, c, d, f = corner
    return image.transform(image.size, Image.Transform.AFFINE, (1, a, c, d, 1, f))


def augmented(image, name, value):
    """One operation by torchvision's functions and plain numpy."""
    F = T.functional
    if name.startswith(("Shear", "Translate")):
        value *= {"TranslateX": image.width, "TranslateY": image.height}.get(name, 1)
        value = turned(value)
        place = {"ShearX": 0, "TranslateX": 1, "TranslateXabs": 1, "ShearY": 2}.get(name, 3)
        return moved(image, [value if n == place else 0 for n in range(4)])
    if name == "Rotate":
        return F.rotate(image, turned(value))
    if name == "Color":
        return F.adjust_saturation(image, value)
    if name in ("Contrast", "Brightness", "Sharpness"):
        return getattr(F, f"adjust_{name.lower()}")(image, value)
    pixels = np.asarray(image).astype(float)
    if name in ("Solarize", "SolarizeAdd"):
        if name == "SolarizeAdd":
            pixels, value = np.floor(np.clip(pixels + value, 0, 255)), 128
        return Image.fromarray(np.where(pixels < value, pixels, 255 - pixels).astype(np.uint8))
    if name == "Posterize":
        step = 2 ** (8 - int(value))
        return Image.fromarray((pixels // step * step).astype(np.uint8))
    if name == "Invert":
        return Image.fromarray((255 - pixels).astype(np.uint8))
    if name == "CutoutAbs":
        x, y = (int(max(0, np.random.uniform(side) - value / 2)) for side in image.size)
        pixels = np.array(image)
        right, below = (min(side, start + value) for side, start in zip(image.size, (x, y), strict=True))
        pixels[y : int(below) + 1, x : int(right) + 1] = (125, 123, 114)
        return Image.fromarray(pixels)
    return getattr(F, name.lower())(image) if name != "Identity" else image


def augmented_by(name, image, n, m, p):
    rows = [row.split() for row in LISTS[name].split(", ")]
    for operation, least, greatest in random.choices(rows, k=n):
        least, greatest = float(least), float(greatest)
        if name == "randaugment2" and random.random() > p:
            continue
        share = m / 30 if name == "randaugment" else random.random()
        image = augmented(image, operation, share * (greatest - least) + least)
    return image


@pytest.mark.parametrize("name", LISTS)
def test_randaugment_is_the_originals(name, image, capsys):
    """300 seeds each, against another implementation of the documented lists and draws."""
    for seed in range(300):
        m = seed % 31
        cfg = make_cfg(name, RANDAUGMENT_N=1 + seed % 3, RANDAUGMENT_M=m)
        (step,) = (s for s in build_transform(cfg).transforms if "RandAugment" in type(s).__name__)
        random.seed(seed)
        np.random.seed(seed)
        got = step(image)
        ours = random.random(), np.random.rand()
        random.seed(seed)
        np.random.seed(seed)
        expected = augmented_by(name, image, 1 + seed % 3, m, 0.6)
        assert got.tobytes() == expected.tobytes(), seed
        assert ours == (random.random(), np.random.rand()), "as much is drawn"


def enhanced(image, name, level):
    """One operation of AutoAugment (Cubuk et al., 2019, table 6) at a level of 0 to 9."""
    F, share = T.functional, (level or 0) / 9
    if name.startswith(("Shear", "Translate")):
        value = share * (0.3 if name.startswith("Shear") else 150 / 331) * random.choice([-1, 1])
        value *= {"TranslateX": image.width, "TranslateY": image.height}.get(name, 1)
        place = ["ShearX", "TranslateX", "ShearY", "TranslateY"].index(name)
        plane = [value if n == place else 0 for n in range(4)]
        how = Image.Resampling.BICUBIC if name.startswith("Shear") else Image.Resampling.NEAREST
        data = (1, *plane[:3], 1, plane[3])
        return image.transform(image.size, Image.Transform.AFFINE, data, how, fillcolor=(128, 128, 128))
    if name == "Rotate":
        turned = image.convert("RGBA").rotate(30 * share)
        gray = Image.new("RGBA", image.size, (128,) * 4)
        return Image.composite(turned, gray, turned).convert("RGB")
    if name == "Color":
        return F.adjust_saturation(image, 1 + 0.9 * share * random.choice([-1, 1]))
    if name in ("Contrast", "Brightness", "Sharpness"):
        return getattr(F, f"adjust_{name.lower()}")(image, 1 + 0.9 * share * random.choice([-1, 1]))
    return augmented(
        image, name, {"Solarize": 256 - 256 * share, "Posterize": round(8 - 4 * share)}.get(name, 0)
    )


def by_policy(name):
    def apply(image):
        for operation, probability, level in rows[random.randint(0, 24)]:
            if random.random() < probability:
                image = enhanced(image, operation, level)
        return image

    rows = T.AutoAugment(getattr(T.AutoAugmentPolicy, name)).policies
    return apply


def translated(image):
    if random.uniform(0, 1) > 0.5:
        return image.resize((12, 16), Image.Resampling.BILINEAR)
    image = image.resize((14, 18), Image.Resampling.BILINEAR)  # 1.125 times, rounded
    left, top = round(random.uniform(0, 2)), round(random.uniform(0, 2))
    return image.crop((left, top, left + 12, top + 16))


def with_hole(x):
    row, column = np.random.randint(16), np.random.randint(12)
    inside = (torch.arange(16)[:, None] - row).float() + 0.5, (torch.arange(12)[None] - column).float() + 0.5
    return x * ~((inside[0].abs() < 8) & (inside[1].abs() < 8))


def noisy(x):
    return x if random.uniform(0, 1) > 0.5 else x + torch.randn(3, 16, 12) * 0.15


REFERENCES = {
    "random_flip": T.RandomHorizontalFlip(),
    "random_resized_crop": T.RandomResizedCrop((16, 12), scale=(0.08, 1.0)),
    "random_crop": T.RandomCrop((16, 12), padding=4),
    "random_translation": translated,
    "colorjitter": T.ColorJitter(0.4, 0.4, 0.4, 0.1),
    "randomgrayscale": T.RandomGrayscale(0.2),
    "gaussian_blur": T.RandomApply([T.GaussianBlur(21)], 0.5),
    "normalize": T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "instance_norm": lambda x: (x - x.mean((1, 2), keepdim=True)) / (x.std((1, 2), keepdim=True) + 1e-8),
    "cutout": with_hole,
    "gaussian_noise": noisy,
    **{f"{name.lower()}_policy": by_policy(name) for name in ("IMAGENET", "CIFAR10", "SVHN")},
}
ON_TENSORS = ("normalize", "instance_norm", "cutout", "gaussian_noise")


@pytest.mark.parametrize("name", REFERENCES)
def test_transforms_are_the_originals(name, image):
    """300 seeds each, the random numbers that are drawn included. All but crops find the size right."""
    transform, reference = build_transform(make_cfg(name)), REFERENCES[name]
    if name not in ("random_crop", "random_resized_crop"):
        image = image.resize((12, 16))

    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    for seed in range(300):
        got, drawn = [], []
        for number in range(2):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            if number == 0:
                got.append(transform(image))
            elif name in ON_TENSORS:
                got.append(reference(T.functional.to_tensor(image)))
            else:
                got.append(T.functional.to_tensor(reference(image)))
            drawn.append(draws())
        assert drawn[0] == drawn[1], seed
        assert torch.allclose(got[0], got[1], atol=1e-6 if name in ON_TENSORS else 0), seed


def test_every_transform_has_a_reference():
    assert {*REFERENCES, *LISTS, "center_crop"} == set(AVAI_CHOICES)


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
