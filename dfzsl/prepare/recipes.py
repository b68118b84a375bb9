"""How each data set is got, from its authors or a mirror, and what it must then hold."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dassl.data.datasets import DATASET_REGISTRY

from dfzsl.io.files import atomic, lock
from dfzsl.utils.errors import UserError

from .fetch import download, listing, move_into, unpack

MIRROR = "zhengli97/prompt_learning_dataset"
DRIVE = "https://drive.google.com/uc?export=download&id="
VGG = "https://www.robots.ox.ac.uk/~vgg/data"
HUB = "https://huggingface.co/datasets"
XLSA17 = "http://datasets.d2.mpi-inf.mpg.de/xian/xlsa17.zip"
CLASSNAMES = "1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF"  # CoOp's classnames.txt of ImageNet


class Step:
    """What brings `gives` into a data set's folder."""

    gives: str

    def missing(self, folder: Path, downloads: Path) -> bool:
        return not (folder / self.gives).exists()

    def fetch(self, folder: Path, downloads: Path) -> None:
        """Raises UserError with what is left to do by hand."""
        raise NotImplementedError


class Opened(Step):
    """A folder of an archive whose contents go `into` the data set's: all of it, interrupted or not."""

    into: str = ""

    def moving(self, folder: Path, downloads: Path) -> Path:
        """Holds what is still on its way."""
        return downloads / f"{folder.name}-{self.into or 'all'}.moving"

    def missing(self, folder: Path, downloads: Path) -> bool:
        return super().missing(folder, downloads) or self.moving(folder, downloads).exists()

    def fetch(self, folder: Path, downloads: Path) -> None:
        moving = self.moving(folder, downloads)
        if not moving.exists():
            opened = downloads / f"{folder.name}.open"
            self.open(opened, folder, downloads).rename(moving)
            shutil.rmtree(opened, ignore_errors=True)  # the whole of it may have been moved
        move_into(moving, folder / self.into)
        shutil.rmtree(moving)

    def open(self, opened: Path, folder: Path, downloads: Path) -> Path:
        """Unpack the archive into `opened`; returns the folder in it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Archive(Opened):
    """An archive whose folder `take` becomes `into` in the data set's folder; `gives` is there afterwards."""

    url: str
    gives: str
    checksum: str = ""
    take: str = ""
    into: str = ""
    inner: str = ""  # an archive within the archive, under `take`

    def open(self, opened: Path, folder: Path, downloads: Path) -> Path:
        archive = download(self.url, downloads / Path(self.url).name, self.checksum)
        unpack(archive, opened)
        source = opened / self.take
        if self.inner:
            unpack(source / self.inner, opened / "inner")
            source = opened / "inner"
        if not source.is_dir():
            raise UserError(
                f"{archive}: it has no folder '{self.take}'; put its contents into {folder / self.into}"
            )
        return source


@dataclass(frozen=True)
class Mirrored(Opened):
    """The mirror's archive `name`: the folder in it that holds `gives`, whatever is around it."""

    name: str
    gives: str

    def open(self, opened: Path, folder: Path, downloads: Path) -> Path:
        files = listing(MIRROR)
        if self.name not in files:
            raise UserError(f"the mirror {MIRROR} has no {self.name}; it has {', '.join(sorted(files))}")
        url, checksum = files[self.name]
        unpack(download(url, downloads / self.name, checksum), opened)
        found = next((path for path in sorted(opened.rglob(self.gives))), None)
        if found is None:
            raise UserError(f"{downloads / self.name}: it holds no {self.gives}; look into {opened}")
        return found.parents[len(Path(self.gives).parts) - 1]


@dataclass(frozen=True)
class File(Step):
    """A single small file."""

    url: str
    gives: str
    checksum: str = ""

    def fetch(self, folder: Path, downloads: Path) -> None:
        fetched = download(self.url, downloads / f"{folder.name}-{self.gives}", self.checksum)
        with atomic(folder / self.gives) as temporary:
            shutil.copyfile(fetched, temporary)


@dataclass(frozen=True)
class Names(Step):
    """FLO's class names, which xlsa17 leaves out: those of torchvision's Flowers102, in the same order."""

    gives: str = "classnames.txt"

    def fetch(self, folder: Path, downloads: Path) -> None:
        from dfzsl.utils.torchvision_import import import_torchvision

        import_torchvision()
        from torchvision.datasets import Flowers102

        with atomic(folder / self.gives) as temporary:
            temporary.write_text("\n".join(Flowers102.classes) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ByHand(Step):
    """What nobody may or can download by itself."""

    gives: str
    say: str

    def fetch(self, folder: Path, downloads: Path) -> None:
        raise UserError(f"{folder / self.gives} is to be put there by hand: {self.say}")


@dataclass(frozen=True)
class Recipe:
    """How to get a data set, from its authors' addresses or by one file of the mirror; and what it holds."""

    counts: tuple[int, int, int, int]  # classes, training, validation and test images
    steps: tuple[Step, ...] = ()
    mirror: str = ""
    marker: str = ""  # a path that tells the data set's folder in the mirror's archive


def split(name: str, drive: str) -> File:
    return File(DRIVE + drive, f"split_zhou_{name}.json")


RECIPES: dict[str, Recipe] = {
    "ImageNet": Recipe(
        (1000, 1281167, 0, 50000),
        (
            ByHand(
                "images/train", "the ILSVRC2012 training images, 1000 folders n*, from https://image-net.org"
            ),
            ByHand("images/val", "the ILSVRC2012 validation images, sorted into the same 1000 folders"),
            File(DRIVE + CLASSNAMES, "classnames.txt"),
        ),
    ),
    "Caltech101": Recipe(
        (100, 4128, 1649, 2465),
        (
            Archive(
                "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
                "101_ObjectCategories",
                "md5:3138e1922a9193bfa496528edbbc45d0",
                take="caltech-101",
                inner="101_ObjectCategories.tar.gz",
            ),
            split("Caltech101", "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN"),
        ),
        "caltech-101.zip",
        "split_zhou_Caltech101.json",
    ),
    "OxfordPets": Recipe(
        (37, 2944, 736, 3669),
        (
            Archive(f"{VGG}/pets/data/images.tar.gz", "images", "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c"),
            split("OxfordPets", "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs"),
        ),
        "oxford_pets.zip",
        "split_zhou_OxfordPets.json",
    ),
    # The authors' pages of Stanford Cars (since 2023) and SUN397 (since 2025) do not answer; the frames of
    # UCF101 exist only as CoOp's own cut of the videos.
    "StanfordCars": Recipe((196, 6509, 1635, 8041), (), "stanford_cars.zip", "split_zhou_StanfordCars.json"),
    "SUN397": Recipe((397, 15880, 3970, 19850), (), "sun397.zip", "split_zhou_SUN397.json"),
    "UCF101": Recipe((101, 7639, 1898, 3783), (), "ucf101.zip", "split_zhou_UCF101.json"),
    "OxfordFlowers": Recipe(
        (102, 4093, 1633, 2463),
        (
            Archive(f"{VGG}/flowers/102/102flowers.tgz", "jpg", "md5:52808999861908f626f3c1f4e79d11fa"),
            split("OxfordFlowers", "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"),
        ),
        "oxford_flowers.zip",
        "split_zhou_OxfordFlowers.json",
    ),
    "Food101": Recipe(
        (101, 50500, 20200, 30300),
        (
            Archive(
                "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                "images",
                "md5:85eeb15f3717b99a5da872d97d918f87",
                take="food-101",
            ),
            split("Food101", "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl"),
        ),
        "food101.zip",
        "split_zhou_Food101.json",
    ),
    "FGVCAircraft": Recipe(
        (100, 3334, 3333, 3333),
        (
            Archive(
                f"{VGG}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
                "images_variant_test.txt",
                take="fgvc-aircraft-2013b/data",
            ),
        ),
        "fgvc_aircraft.zip",
        "images_variant_test.txt",
    ),
    "DescribableTextures": Recipe(
        (47, 2820, 1128, 1692),
        (
            Archive(
                f"{VGG}/dtd/download/dtd-r1.0.1.tar.gz",
                "images",
                "md5:fff73e5086ae6bdbea199a49dfb8a4c1",
                take="dtd",
            ),
            split("DescribableTextures", "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x"),
        ),
        "dtd.zip",
        "split_zhou_DescribableTextures.json",
    ),
    "EuroSAT": Recipe(
        (10, 13500, 5400, 8100),
        (
            Archive(
                f"{HUB}/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
                "2750",
                "md5:c8fa014336c82ac7804f0398fcb19387",
            ),
            split("EuroSAT", "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o"),
        ),
        "eurosat.zip",
        "split_zhou_EuroSAT.json",
    ),
    "ImageNetV2": Recipe(
        (1000, 0, 0, 10000),
        (
            Archive(
                f"{HUB}/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
                "imagenetv2-matched-frequency-format-val",
            ),
            File(DRIVE + CLASSNAMES, "classnames.txt"),
        ),
        "imagenetv2.zip",
        "imagenetv2-matched-frequency-format-val",
    ),
    "ImageNetSketch": Recipe((1000, 0, 0, 50889), (), "imagenet-sketch.zip", "images/n01440764"),
    "ImageNetA": Recipe(
        (200, 0, 0, 7500),
        (
            Archive("https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar", "imagenet-a"),
            File(DRIVE + CLASSNAMES, "classnames.txt"),
        ),
        "imagenet-adversarial.zip",
        "imagenet-a",
    ),
    "ImageNetR": Recipe(
        (200, 0, 0, 30000),
        (
            Archive("https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar", "imagenet-r"),
            File(DRIVE + CLASSNAMES, "classnames.txt"),
        ),
        "imagenet-rendition.zip",
        "imagenet-r",
    ),
    "AWA2": Recipe(
        (50, 23527, 0, 13795),
        (
            Archive(XLSA17, "res101.mat", take="xlsa17/data/AWA2"),
            Archive(
                "https://cvml.ista.ac.at/AwA2/AwA2-data.zip",
                "images",
                take="Animals_with_Attributes2/JPEGImages",
                into="images",
            ),
        ),
    ),
    "CUB": Recipe(
        (200, 7057, 0, 4731),
        (
            Archive(XLSA17, "res101.mat", take="xlsa17/data/CUB"),
            Archive(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "images",
                "md5:97eceeb196236b17998738112f37df78",
                take="CUB_200_2011/images",
                into="images",
            ),
        ),
    ),
    "SUN": Recipe(
        (717, 10320, 0, 4020),
        (
            Archive(XLSA17, "res101.mat", take="xlsa17/data/SUN"),
            ByHand(
                "images",
                "the folder images/ of SUNAttributeDB_Images.tar.gz, from the SUN Attribute Database",
            ),
        ),
    ),
    "FLO": Recipe(
        (102, 5631, 0, 2558),
        (
            ByHand(
                "res101.mat",
                "FLO/res101.mat and FLO/att_splits.mat, from "
                "https://drive.google.com/drive/folders/16Xk1eFSWjQTtuQivTogMmvL3P6F_084u",
            ),
            Archive(
                f"{VGG}/flowers/102/102flowers.tgz",
                "images",
                "md5:52808999861908f626f3c1f4e79d11fa",
                take="jpg",
                into="images",
            ),
            Names(),
        ),
    ),
    "APY": Recipe(
        (32, 5932, 0, 9407),
        (
            Archive(XLSA17, "res101.mat", take="xlsa17/data/APY"),
            ByHand(
                "images", "the pictures that res101.mat names (VOC2008 and Yahoo), or set DATASET.FEATURES"
            ),
        ),
    ),
}


# ---------------------------------------------------------------- getting


def prepare(name: str, root: Path, source: str) -> Path:
    """Bring one data set into `root`; return its folder.

    Raises:
        UserError: what is left to do by hand.
    """
    recipe = RECIPES[name]
    folder, downloads = root / DATASET_REGISTRY.get(name).folder, root / ".downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with lock(downloads / ".lock") as held:
        if held is False:
            raise UserError(f"another process is preparing data sets in {root}; wait for it")
        for half in downloads.glob(".*.open.*") if held else ():  # of processes that were killed
            shutil.rmtree(half)
        mirror = Mirrored(recipe.mirror, recipe.marker)
        mirrored = recipe.mirror and (source == "mirror" or not recipe.steps)
        if mirrored and mirror.missing(folder, downloads):
            mirror.fetch(folder, downloads)
        folder.mkdir(parents=True, exist_ok=True)
        left = []
        for step in recipe.steps:
            if step.missing(folder, downloads):
                try:
                    step.fetch(folder, downloads)
                except UserError as error:
                    left.append(str(error))
    if left:
        raise UserError("; ".join(left))
    return folder
