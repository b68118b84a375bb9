"""Miniature copies of every data set in its true layout: `make(name, root)` writes one.

Five classes (so that base has three and new has two), a few 24-pixel pictures each, names as odd as the real
ones. A new data set needs a function here: the tests run over the registry.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

COUNTS = {"train": 4, "val": 2, "test": 3}  # pictures a class
WORDNET = ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475")
NAMES = ("tench", "goldfish", "great white shark", "tiger shark", "hammerhead shark")
DIM = 16  # of the fake features

FAKES: dict[str, Callable[[Path], Path]] = {}


def make(name: str, root: Path) -> Path:
    """Write the fake copy of a data set under `root`; returns what DATASET.ROOT must be."""
    return FAKES[name](root)


def fake(name: str) -> Callable:
    def keep(write: Callable[[Path], Path | None]) -> Callable[[Path], Path]:
        FAKES[name] = lambda root: write(root) or root
        return write

    return keep


def picture(path: Path, label: int, seed: int) -> None:
    """A noisy picture whose color tells its class."""
    rng = np.random.default_rng((label, seed))
    color = np.random.default_rng(label).integers(40, 216, 3)
    pixels = np.clip(color + rng.normal(0, 30, (24, 28, 3)), 0, 255).astype("uint8")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="JPEG")


def split_file(
    folder: Path, split: str, images: str, classes: list[tuple[str, Callable[[int], str]]]
) -> None:
    """Pictures and a split_zhou file. `classes` are (name, number -> path under `images`) in label order."""
    content: dict[str, list] = {part: [] for part in COUNTS}
    for label, (name, path_of) in enumerate(classes):
        number = 0
        for part, count in COUNTS.items():
            for _ in range(count):
                number += 1
                path = path_of(number)
                picture(folder / images / path, label, number)
                content[part].append([path, label, name])
    for rows in content.values():
        # The real files are not sorted by label, and their order decides the few-shot draw.
        np.random.default_rng(len(rows)).shuffle(rows)
    (folder / split).write_text(json.dumps(content, indent=4))


@fake("Caltech101")
def _(root: Path) -> None:
    folder = root / "caltech-101"
    # Upper case sorts first; CoOp renames four categories.
    pairs = [("Faces", "face"), ("Leopards", "leopard"), ("Motorbikes", "motorbike")]
    pairs += [("accordion", "accordion"), ("yin_yang", "yin_yang")]
    classes = [(name, lambda n, c=category: f"{c}/image_{n:04}.jpg") for category, name in pairs]
    split_file(folder, "split_zhou_Caltech101.json", "101_ObjectCategories", classes)
    picture(folder / "101_ObjectCategories/BACKGROUND_Google/image_0001.jpg", 9, 0)


@fake("OxfordPets")
def _(root: Path) -> None:
    breeds = ["Abyssinian", "american_bulldog", "Bengal", "Egyptian_Mau", "yorkshire_terrier"]
    classes = [(breed.lower(), lambda n, b=breed: f"{b}_{n}.jpg") for breed in breeds]
    split_file(root / "oxford_pets", "split_zhou_OxfordPets.json", "images", classes)


@fake("StanfordCars")
def _(root: Path) -> None:
    names = [
        "2000 AM General Hummer SUV",
        "2012 Acura RL Sedan",
        "2012 BMW M3 Coupe",
        "2012 Ram C/V Cargo Van",
    ]
    names += ["1993 Volvo 240 Sedan"]
    classes = [
        (name, lambda n, k=k: f"cars_{'test' if n > 6 else 'train'}/{k:03}{n:02}.jpg")
        for k, name in enumerate(names)
    ]
    split_file(root / "stanford_cars", "split_zhou_StanfordCars.json", "", classes)


@fake("OxfordFlowers")
def _(root: Path) -> None:
    names = [
        "pink primrose",
        "hard-leaved pocket orchid",
        "colt's foot",
        "bishop of llandaff",
        "trumpet creeper",
    ]
    classes = [(name, lambda n, k=k: f"image_{k * 10 + n:05}.jpg") for k, name in enumerate(names)]
    split_file(root / "oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg", classes)


@fake("Food101")
def _(root: Path) -> None:
    dishes = ["apple_pie", "baby_back_ribs", "creme_brulee", "pho", "waffles"]
    classes = [(dish, lambda n, d=dish: f"{d}/{1005649 + n}.jpg") for dish in dishes]
    split_file(root / "food-101", "split_zhou_Food101.json", "images", classes)


@fake("SUN397")
def _(root: Path) -> None:
    scenes = {
        "abbey": "abbey",
        "apartment_building/outdoor": "outdoor apartment_building",
        "zen_garden": "zen_garden",
    }
    scenes |= {"badminton_court/indoor": "indoor badminton_court", "bakery/shop": "shop bakery"}
    ordered = sorted(scenes)
    classes = [(scenes[s], lambda n, s=s: f"{s[0]}/{s}/sun_a{n:015}.jpg") for s in ordered]
    split_file(root / "sun397", "split_zhou_SUN397.json", "SUN397", classes)


@fake("DescribableTextures")
def _(root: Path) -> None:
    names = ["banded", "blotchy", "braided", "polka-dotted", "zigzagged"]
    classes = [(name, lambda n, c=name: f"{c}/{c}_{n:04}.jpg") for name in names]
    split_file(root / "dtd", "split_zhou_DescribableTextures.json", "images", classes)


@fake("EuroSAT")
def _(root: Path) -> None:
    pairs = {"AnnualCrop": "Annual Crop Land", "Forest": "Forest", "Highway": "Highway or Road"}
    pairs |= {"River": "River", "SeaLake": "Sea or Lake"}
    classes = [(name, lambda n, c=category: f"{c}/{c}_{n}.jpg") for category, name in pairs.items()]
    split_file(root / "eurosat", "split_zhou_EuroSAT.json", "2750", classes)


@fake("UCF101")
def _(root: Path) -> None:
    actions = ["Apply_Eye_Makeup", "Baby_Crawling", "Basketball_Dunk", "Handstand_Pushups", "Yo_Yo"]
    classes = [(a, lambda n, a=a: f"{a}/v_{a.replace('_', '')}_g{n:02}_c01.jpg") for a in actions]
    split_file(root / "ucf101", "split_zhou_UCF101.json", "UCF-101-midframes", classes)


@fake("FGVCAircraft")
def _(root: Path) -> None:
    folder = root / "fgvc_aircraft"
    variants = ["707-320", "727-200", "A300B4", "Cessna 172", "F/A-18"]
    lines: dict[str, list[str]] = {part: [] for part in COUNTS}
    for label, variant in enumerate(variants):
        number = 0
        for part, count in COUNTS.items():
            for _ in range(count):
                number += 1
                image = f"{label:03}{number:04}"
                picture(folder / "images" / f"{image}.jpg", label, number)
                lines[part].append(f"{image} {variant}")
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    for part, rows in lines.items():
        (folder / f"images_variant_{part}.txt").write_text("\n".join(sorted(rows)) + "\n")


def class_names(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{wordnet_id} {name}" for wordnet_id, name in zip(WORDNET, NAMES, strict=True)]
    (folder / "classnames.txt").write_text("\n".join(lines) + "\n")


def class_folders(directory: Path, folders: tuple[str, ...], count: int, first: int = 0) -> None:
    for label, folder in enumerate(folders):
        for number in range(first, first + count):
            picture(directory / folder / f"{folder}_{number}.JPEG", label, number)


@fake("ImageNet")
def _(root: Path) -> None:
    class_names(root / "imagenet")
    class_folders(root / "imagenet/images/train", WORDNET, COUNTS["train"])
    class_folders(root / "imagenet/images/val", WORDNET, COUNTS["test"], first=50)


@fake("ImageNetV2")
def _(root: Path) -> None:
    class_names(root / "imagenetv2")
    directory = root / "imagenetv2/imagenetv2-matched-frequency-format-val"
    class_folders(directory, tuple(str(label) for label in range(len(WORDNET))), COUNTS["test"])


@fake("ImageNetSketch")
def _(root: Path) -> None:
    class_names(root / "imagenet-sketch")
    class_folders(root / "imagenet-sketch/images", WORDNET, COUNTS["test"])


@fake("ImageNetA")
def _(root: Path) -> None:
    class_names(root / "imagenet-adversarial")
    class_folders(root / "imagenet-adversarial/imagenet-a", WORDNET[1:], COUNTS["test"])
    (root / "imagenet-adversarial/imagenet-a/README.txt").write_text("not a class\n")


@fake("ImageNetR")
def _(root: Path) -> None:
    class_names(root / "imagenet-rendition")
    class_folders(root / "imagenet-rendition/imagenet-r", WORDNET[:4], COUNTS["test"])
    (root / "imagenet-rendition/imagenet-r/README.txt").write_text("not a class\n")


def column(values: list) -> np.ndarray:
    """A MATLAB cell column of text."""
    cells = np.empty((len(values), 1), dtype=object)
    cells[:, 0] = [np.array([value]) for value in values]
    return cells


def xlsa17(
    root: Path, name: str, classes: list[str], prefix: str, path_of: Callable[[str, int], str], **changes
) -> None:
    """Pictures, res101.mat, att_splits.mat, ViTB16.mat and clip_splits.mat. Classes 2 and 4 are unseen.

    `changes` replace arrays of the split files, or drop them where None.
    """
    folder = root / name
    files, labels = [], []
    for label, category in enumerate(classes):
        for number in range(sum(COUNTS.values())):
            files.append(path_of(category, number))
            labels.append(label)
            picture(folder / "images" / files[-1], label, number)
    order = np.random.default_rng(0).permutation(len(files))
    files, targets = [files[i] for i in order], np.array(labels)[order]
    unseen = np.isin(targets, (1, 3))
    seen_places = np.flatnonzero(~unseen)
    # The last two pictures of each seen class are test_seen.
    test_seen = np.sort(np.concatenate([seen_places[targets[seen_places] == c][-2:] for c in (0, 2, 4)]))
    trainval = np.setdiff1d(seen_places, test_seen)
    rng = np.random.default_rng(1)
    means = rng.normal(size=(len(classes), DIM))
    splits = {
        "allclasses_names": column(classes),
        "att": rng.normal(size=(7, len(classes))),
        "trainval_loc": trainval[:, None] + 1,
        "test_seen_loc": test_seen[:, None] + 1,
        "test_unseen_loc": np.flatnonzero(unseen)[:, None] + 1,
        **changes,
    }
    splits = {key: value for key, value in splits.items() if value is not None}
    named = {"image_files": column([prefix + file for file in files]), "labels": targets[:, None] + 1}
    savemat(folder / "res101.mat", {"features": rng.normal(size=(20, len(files))), **named})
    clip = means[targets].T + 0.3 * rng.normal(size=(DIM, len(files)))
    savemat(folder / "ViTB16.mat", {"features": clip, **named})
    savemat(folder / "att_splits.mat", splits)
    text = means.T + rng.normal(size=(DIM, len(classes)))
    savemat(folder / "clip_splits.mat", {**splits, "cls_features": text.astype("float32")})


@fake("AWA2")
def _(root: Path) -> None:
    animals = ["antelope", "grizzly+bear", "killer+whale", "beaver", "dalmatian"]
    prefix = "/somebody/data/Animals_with_Attributes2//JPEGImages/"
    xlsa17(root, "AWA2", animals, prefix, lambda c, n: f"{c}/{c}_{10001 + n}.jpg")


@fake("CUB")
def _(root: Path) -> None:
    birds = [
        "001.Black_footed_Albatross",
        "002.Laysan_Albatross",
        "003.Sooty_Albatross",
        "004.Groove_billed_Ani",
    ]
    prefix = "/somebody/data/CUB_200_2011/CUB_200_2011/images/"
    xlsa17(root, "CUB", [*birds, "192.Downy_Woodpecker"], prefix, lambda c, n: f"{c}/{c[4:]}_{n:04}_1.jpg")


@fake("SUN")
def _(root: Path) -> None:
    scenes = ["abbey", "airplane_cabin", "apse_indoor", "wheat_field", "zoo"]
    xlsa17(root, "SUN", scenes, "/somebody/data/SUN/images/", lambda c, n: f"{c[0]}/{c}/sun_{n:06}.jpg")


@fake("FLO")
def _(root: Path) -> None:
    flowers = [
        "pink primrose",
        "hard-leaved pocket orchid",
        "canterbury bells",
        "sweet pea",
        "english marigold",
    ]
    number = iter(range(1, 1000))
    xlsa17(
        root, "FLO", flowers, "/x/jpg/", lambda c, n: f"image_{next(number):05}.jpg", allclasses_names=None
    )
    (root / "FLO/classnames.txt").write_text("\n".join(flowers) + "\n")


@fake("APY")
def _(root: Path) -> None:
    things = ["aeroplane", "bicycle", "diningtable", "pottedplant", "jetski"]
    xlsa17(root, "APY", things, "/somebody/VOC2012/JPEGImages/", lambda c, n: f"2008_{c}_{n:06}.jpg")


@fake("Folder")
def _(root: Path) -> Path:
    for part, count in COUNTS.items():
        for label, name in enumerate(["Äpfel & Birnen", "it's a cat", "dog_(big)", "elk #2", "näher"]):
            for number in range(count):
                picture(root / "own" / part / name / f"{part} {number}.png", label, number)
    return root / "own"


@fake("Csv")
def _(root: Path) -> Path:
    lines = ["path,label,split"]
    for part, count in COUNTS.items():
        for label, name in enumerate(["Äpfel, reif", "cat", "dog", "elk", "fox"]):
            for number in range(count):
                picture(root / "pictures" / f"{part}-{label}-{number}.jpg", label, number)
                lines.append(f'pictures/{part}-{label}-{number}.jpg,"{name}",{part}')
    (root / "own.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root / "own.csv"


@fake("Features")
def _(root: Path) -> Path:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(len(NAMES), DIM))
    arrays: dict[str, np.ndarray] = {
        "classnames": np.array(NAMES),
        "text": means + rng.normal(size=means.shape),
    }
    for part, count in COUNTS.items():
        labels = np.repeat(np.arange(len(NAMES)), count)
        arrays[f"x_{part}"] = (means[labels] + 0.3 * rng.normal(size=(len(labels), DIM))).astype("float16")
        arrays[f"y_{part}"] = labels
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / "features.npz", **arrays)
    return root / "features.npz"


def pixels(image: Image.Image) -> torch.Tensor:
    array = np.asarray(image.resize((8, 8)), dtype="float32").transpose(2, 0, 1)
    return torch.from_numpy(array / 255)


class Backbone:
    """Mean colors and hashed names: what extraction needs of a backbone, in no time."""

    name, weights_id, precision, dim = "mean", "none", "fp32", 3
    transform = staticmethod(pixels)

    def __init__(self) -> None:
        self.seen = 0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=1)

    def class_features(self, classnames, templates) -> torch.Tensor:
        rows = [[len(name), len(templates[0]), sum(map(ord, name))] for name in classnames]
        return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)
