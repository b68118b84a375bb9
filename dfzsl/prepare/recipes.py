"""Define the download of each data set, from its authors or a mirror, and its published counts."""

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
    """One step of a download.

    Attributes:
        gives: path in the data set's folder that exists after the step.
    """

    gives: str

    def missing(self, folder: Path, downloads: Path) -> bool:
        """Return whether the step has to run."""
        return not (folder / self.gives).exists()

    def fetch(self, folder: Path, downloads: Path) -> None:
        """Run the step. Raises UserError with what must be done by hand."""
        raise NotImplementedError


class ArchiveStep(Step):
    """Extracts an archive and moves a folder of it `into` the data set's folder. It can be interrupted."""

    into: str = ""

    def moving(self, folder: Path, downloads: Path) -> Path:
        """Return the temporary folder of files that are being moved."""
        return downloads / f"{folder.name}-{self.into or 'all'}.moving"

    def missing(self, folder: Path, downloads: Path) -> bool:
        return super().missing(folder, downloads) or self.moving(folder, downloads).exists()

    def fetch(self, folder: Path, downloads: Path) -> None:
        moving = self.moving(folder, downloads)
        if not moving.exists():
            opened = downloads / f"{folder.name}.open"
            self.open(opened, folder, downloads).rename(moving)
            shutil.rmtree(opened, ignore_errors=True)  # it may have been moved as a whole
        move_into(moving, folder / self.into)
        shutil.rmtree(moving)

    def open(self, opened: Path, folder: Path, downloads: Path) -> Path:
        """Extract the archive into `opened` and return the folder to move."""
        raise NotImplementedError


@dataclass(frozen=True)
class Archive(ArchiveStep):
    """An archive at a fixed address.

    Attributes:
        url: address of the archive.
        gives: as in `Step`.
        checksum: as in `fetch.download`.
        take: folder in the archive whose contents are moved.
        into: target of the contents in the data set's folder.
        inner: archive within the archive, under `take`.
    """

    url: str
    gives: str
    checksum: str = ""
    take: str = ""
    into: str = ""
    inner: str = ""

    def open(self, opened: Path, folder: Path, downloads: Path) -> Path:
        archive = download(self.url, downloads / Path(self.url).name, self.checksum)
        unpack(archive, opened)
        source = opened / self.take
        if self.inner:
            unpack(source / self.inner, opened / "inner")
            source = opened / "inner"
        if not source.is_dir():
            raise UserError(
                f"{archive}: no folder '{self.take}' in it; put its contents into {folder / self.into}"
            )
        return source


@dataclass(frozen=True)
class Mirrored(ArchiveStep):
    """The mirror's archive `name`, of which the folder that has `gives` is moved."""

    name: str
    gives: str

    def open(self, opened: Path, folder: Path, downloads: Path) -> Path:
        files = listing(MIRROR)
        if self.name not in files:
            raise UserError(f"the mirror {MIRROR} has no {self.name}; it has {', '.join(sorted(files))}")
        url, checksum = files[self.name]
        unpack(download(url, downloads / self.name, checksum), opened)
        path = next((path for path in sorted(opened.rglob(self.gives))), None)
        if path is None:
            raise UserError(f"{downloads / self.name}: no {self.gives} in it; look into {opened}")
        return path.parents[len(Path(self.gives).parts) - 1]


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
    """FLO's class names, which xlsa17 does not have; torchvision's Flowers102 has them in the same order."""

    gives: str = "classnames.txt"

    def fetch(self, folder: Path, downloads: Path) -> None:
        from dfzsl.utils.torchvision_import import import_torchvision

        import_torchvision()
        from torchvision.datasets import Flowers102

        with atomic(folder / self.gives) as temporary:
            temporary.write_text("\n".join(Flowers102.classes) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ByHand(Step):
    """Files that cannot be downloaded automatically."""

    gives: str
    instructions: str

    def fetch(self, folder: Path, downloads: Path) -> None:
        raise UserError(f"{folder / self.gives} must be placed there by hand: {self.instructions}")


@dataclass(frozen=True)
class Recipe:
    """The download of a data set and its published counts.

    Attributes:
        counts: number of classes, training, validation and test images.
        steps: the download from the authors.
        mirror: name of the mirror's archive.
        marker: path in the mirror's archive that identifies the folder of the data set.
    """

    counts: tuple[int, int, int, int]
    steps: tuple[Step, ...] = ()
    mirror: str = ""
    marker: str = ""


def split(name: str, drive: str) -> File:
    """Return the step that downloads a split of CoOp from Google Drive."""
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
    # The authors' pages of Stanford Cars (since 2023) and SUN397 (since 2025) are offline. The frames of
    # UCF101 were extracted by the authors of CoOp.
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
            ByHand("images", "the images that res101.mat names (VOC2008 and Yahoo), or set DATASET.FEATURES"),
        ),
    ),
}


def prepare(name: str, root: Path, source: str) -> Path:
    """Download one data set.

    Args:
        name: registry name of the data set.
        root: data folder.
        source: "official" or "mirror".

    Returns:
        The folder of the data set.

    Raises:
        UserError: a download failed, or files must be placed by hand.
    """
    recipe = RECIPES[name]
    folder, downloads = root / DATASET_REGISTRY.get(name).folder, root / ".downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with lock(downloads / ".lock") as acquired:
        if acquired is False:
            raise UserError(f"another process is preparing data sets in {root}; wait for it")
        for leftover in downloads.glob(".*.open.*") if acquired else ():  # of processes that were killed
            shutil.rmtree(leftover)
        mirror = Mirrored(recipe.mirror, recipe.marker)
        use_mirror = recipe.mirror and (source == "mirror" or not recipe.steps)
        if use_mirror and mirror.missing(folder, downloads):
            mirror.fetch(folder, downloads)
        folder.mkdir(parents=True, exist_ok=True)
        errors = []
        for step in recipe.steps:
            if step.missing(folder, downloads):
                try:
                    step.fetch(folder, downloads)
                except UserError as error:
                    errors.append(str(error))
    if errors:
        raise UserError("; ".join(errors))
    return folder
