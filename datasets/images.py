"""CoOp's eleven data sets and four variants of ImageNet, in the very layout of CoOp's data folder.

Names, folders, splits and class names are CoOp's (its DATASETS.md); docs/DATASETS.md says how to get each.
"""

from __future__ import annotations

import os

from dassl.data.datasets import DATASET_REGISTRY

from dfzsl.io.files import read_text
from dfzsl.utils.dassl_plugin import register
from dfzsl.utils.errors import UserError

from .base import (
    ClassDataset,
    Row,
    Split,
    escapes_folder,
    list_folders,
    list_images,
    read_split,
    require_path,
)


class SplitDataset(ClassDataset):
    """Images under `folder/images` and a fixed split in `folder/split_zhou_NAME.json`.

    In a CoOp checkout, whose own data set of this name makes and keeps a split where there is none, that one
    is left to do so: the split, the shots and what was drawn from `random` are CoOp's. A data-free run does
    not, since it would look at training images.
    """

    images = "images"

    def read(self) -> Split:
        split = os.path.join(self.dataset_dir, f"split_zhou_{type(self).__name__}.json")
        image_dir = os.path.join(self.dataset_dir, self.images)
        require_path(image_dir, self.repair_hint())
        if self.replaced and not self.data_free and not os.path.exists(split):
            try:
                self.replaced(self.cfg)
            except Exception as error:  # it is anybody's code
                said = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"{split}: there is none, and {self.replaced.__module__} cannot make it ({said}); "
                    f"{self.repair_hint()}"
                ) from error
        return read_split(split, image_dir, self.repair_hint())


@register(DATASET_REGISTRY, replace=True)
class Caltech101(SplitDataset):
    folder, images = "caltech-101", "101_ObjectCategories"


@register(DATASET_REGISTRY, replace=True)
class OxfordPets(SplitDataset):
    folder = "oxford_pets"
    template = "a photo of a {}, a type of pet."


@register(DATASET_REGISTRY, replace=True)
class StanfordCars(SplitDataset):
    folder, images = "stanford_cars", ""


@register(DATASET_REGISTRY, replace=True)
class OxfordFlowers(SplitDataset):
    folder, images = "oxford_flowers", "jpg"
    template = "a photo of a {}, a type of flower."


@register(DATASET_REGISTRY, replace=True)
class Food101(SplitDataset):
    folder = "food-101"
    template = "a photo of {}, a type of food."


@register(DATASET_REGISTRY, replace=True)
class SUN397(SplitDataset):
    folder, images = "sun397", "SUN397"


@register(DATASET_REGISTRY, replace=True)
class DescribableTextures(SplitDataset):
    folder = "dtd"
    template = "{} texture."


@register(DATASET_REGISTRY, replace=True)
class EuroSAT(SplitDataset):
    folder, images = "eurosat", "2750"
    template = "a centered satellite photo of {}."


@register(DATASET_REGISTRY, replace=True)
class UCF101(SplitDataset):
    folder, images = "ucf101", "UCF-101-midframes"
    template = "a photo of a person doing {}."


@register(DATASET_REGISTRY, replace=True)
class FGVCAircraft(ClassDataset):
    """The split of the data set's own text files: lines of "image variant" in images_variant_PART.txt."""

    folder = "fgvc_aircraft"
    template = "a photo of a {}, a type of aircraft."

    def read(self) -> Split:
        names = read_lines(os.path.join(self.dataset_dir, "variants.txt"), self.repair_hint())
        labels = {name: label for label, name in enumerate(names)}

        def rows(part: str) -> list[Row]:
            path = os.path.join(self.dataset_dir, f"images_variant_{part}.txt")
            found = []
            for line in read_lines(path, self.repair_hint()):
                image, _, name = line.partition(" ")
                if name not in labels:
                    raise UserError(f"{path}: '{name}' is not in variants.txt")
                if escapes_folder(image):
                    raise UserError(f"{path}: '{image}' leads out of {self.dataset_dir}")
                found.append(
                    Row(os.path.join(self.dataset_dir, "images", f"{image}.jpg"), labels[name], name)
                )
            return found

        if self.data_free:
            return Split(names, [], [], rows("test"))
        return Split(names, rows("train"), rows("val"), rows("test"))


@register(DATASET_REGISTRY, replace=True)
class ImageNet(ClassDataset):
    """images/train, images/val with a folder a class; classnames.txt has lines of "folder name".

    As in CoOp the test set is val. CoOp also calls it the validation set; here there is none, so that
    nothing can be chosen on it. A few-shot draw is CoOp's own where split_fewshot/ holds CoOp's file; CoOp
    drew from an unsorted listing of the folders, so no other draw can be made again.
    """

    folder = "imagenet"

    def read(self) -> Split:
        names = read_imagenet_class_names(self.dataset_dir, self.repair_hint())
        test = os.path.join(self.dataset_dir, "images", "val")
        folders = list_folders(test, self.repair_hint())
        rows = rows_by_folder(test, folders, names, self.repair_hint())
        if self.data_free:
            return Split([names[name] for name in folders], [], [], rows)
        train = os.path.join(self.dataset_dir, "images", "train")
        if list_folders(train, self.repair_hint()) != folders:
            raise UserError(f"{train}: its folders are not those of {test}; {self.repair_hint()}")
        train_rows = rows_by_folder(train, folders, names, self.repair_hint())
        return Split([names[name] for name in folders], train_rows, [], rows)


class ImageNetVariant(ClassDataset):
    """A test set for ImageNet's classes, or some of them: a folder a class, and ImageNet's classnames.txt."""

    images = "images"

    def folders(self, image_dir: str, names: dict[str, str]) -> dict[str, str]:
        """Folder to ImageNet's folder name (WordNet id), in label order."""
        return {name: name for name in list_folders(image_dir, self.repair_hint())}

    def read(self) -> Split:
        names = read_imagenet_class_names(self.dataset_dir, self.repair_hint())
        image_dir = require_path(os.path.join(self.dataset_dir, self.images), self.repair_hint())
        folders = self.folders(image_dir, names)
        called = {folder: names.get(wordnet_id, "") for folder, wordnet_id in folders.items()}
        rows = rows_by_folder(image_dir, list(folders), called, self.repair_hint())
        return Split(list(called.values()), [], [], rows)


@register(DATASET_REGISTRY, replace=True)
class ImageNetV2(ImageNetVariant):
    """Its folders are the labels 0 to 999, in the order of classnames.txt."""

    folder, images = "imagenetv2", "imagenetv2-matched-frequency-format-val"

    def folders(self, image_dir: str, names: dict[str, str]) -> dict[str, str]:
        return {str(label): wordnet_id for label, wordnet_id in enumerate(names)}


@register(DATASET_REGISTRY, replace=True)
class ImageNetSketch(ImageNetVariant):
    folder = "imagenet-sketch"


@register(DATASET_REGISTRY, replace=True)
class ImageNetA(ImageNetVariant):
    folder, images = "imagenet-adversarial", "imagenet-a"


@register(DATASET_REGISTRY, replace=True)
class ImageNetR(ImageNetVariant):
    folder, images = "imagenet-rendition", "imagenet-r"


def read_lines(path: str, hint: str) -> list[str]:
    """The non-empty lines of a text file, stripped."""
    lines = read_text(require_path(path, hint)).splitlines()
    return [line.strip() for line in lines if line.strip()]


def read_class_names(path: str, hint: str) -> dict[str, str]:
    """Folder to class name, in the file's order, from lines of "folder name"."""
    pairs = [line.partition(" ") for line in read_lines(path, hint)]
    if wrong := [folder for folder, _, _ in pairs if escapes_folder(folder)]:
        raise UserError(f"{path}: '{wrong[0]}' leads out of the data set")
    names: dict[str, str] = {}
    for folder, _, name in pairs:
        if names.setdefault(folder, name) != name:
            raise UserError(f"{path}: the folder '{folder}' is called both '{names[folder]}' and '{name}'")
    return names


def read_imagenet_class_names(folder: str, hint: str) -> dict[str, str]:
    """WordNet id to class name from classnames.txt, two classes called alike being told apart.

    CoOp's file follows a list of CLIP's that had two missiles and two sunglasses; CLIP's authors have since
    renamed one of each, and so do we where the file has not.
    """
    names = read_class_names(os.path.join(folder, "classnames.txt"), hint)
    for renamed, twin, name in (
        ("n04008634", "n03773504", "projectile"),
        ("n04355933", "n04356056", "sunglass"),
    ):
        if renamed in names and names[renamed] == names.get(twin):
            names[renamed] = name
    return names


def rows_by_folder(directory: str, folders: list[str], names: dict[str, str], hint: str) -> list[Row]:
    """Rows of all images, labels counted in the order of `folders`."""
    rows = []
    for label, folder in enumerate(folders):
        if not names.get(folder):
            raise UserError(f"{directory}: the folder '{folder}' has no line in classnames.txt")
        images = list_images(require_path(os.path.join(directory, folder), hint))
        rows += [Row(path, label, names[folder]) for path in images]
    return rows
