"""Provide CoOp's eleven data sets and four variants of ImageNet, in the layout of CoOp's data folder.

Names, folders, splits and class names are those of CoOp's DATASETS.md. docs/DATASETS.md explains how to
obtain each data set.
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
    """Images in `folder/images` with a fixed split in `folder/split_zhou_NAME.json`.

    In a CoOp checkout, CoOp's own data set of this name creates a missing split, so that the split, the shots
    and the state of `random` are CoOp's. A data-free run does not, since that would read training images.
    """

    images = "images"

    def read(self) -> Split:
        split = os.path.join(self.dataset_dir, f"split_zhou_{type(self).__name__}.json")
        image_dir = os.path.join(self.dataset_dir, self.images)
        require_path(image_dir, self.repair_hint())
        if self.replaced and not self.data_free and not os.path.exists(split):
            try:
                self.replaced(self.cfg)
            except Exception as error:  # the checkout's code may raise anything
                message = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"{split}: no such file, and {self.replaced.__module__} cannot create it ({message}); "
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
    """FGVC-Aircraft with its own split: lines of "image variant" in images_variant_SPLIT.txt."""

    folder = "fgvc_aircraft"
    template = "a photo of a {}, a type of aircraft."

    def read(self) -> Split:
        names = read_lines(os.path.join(self.dataset_dir, "variants.txt"), self.repair_hint())
        labels = {name: label for label, name in enumerate(names)}

        def rows(part: str) -> list[Row]:
            path = os.path.join(self.dataset_dir, f"images_variant_{part}.txt")
            part_rows = []
            for line in read_lines(path, self.repair_hint()):
                image, _, name = line.partition(" ")
                if name not in labels:
                    raise UserError(f"{path}: '{name}' is not in variants.txt")
                if escapes_folder(image):
                    raise UserError(f"{path}: '{image}' is outside of {self.dataset_dir}")
                part_rows.append(
                    Row(os.path.join(self.dataset_dir, "images", f"{image}.jpg"), labels[name], name)
                )
            return part_rows

        if self.data_free:
            return Split(names, [], [], rows("test"))
        return Split(names, rows("train"), rows("val"), rows("test"))


@register(DATASET_REGISTRY, replace=True)
class ImageNet(ClassDataset):
    """ImageNet: class folders in images/train and images/val, and classnames.txt with lines "folder name".

    As in CoOp, the test set is val. CoOp also uses it as validation set; here there is none, so that nothing
    can be selected on test images. A few-shot draw equals CoOp's only if split_fewshot/ contains CoOp's file,
    since CoOp drew from an unsorted listing of folders.
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
            raise UserError(f"{train}: the class folders differ from those of {test}; {self.repair_hint()}")
        train_rows = rows_by_folder(train, folders, names, self.repair_hint())
        return Split([names[name] for name in folders], train_rows, [], rows)


class ImageNetVariant(ClassDataset):
    """A test set for (some of) ImageNet's classes: class folders and ImageNet's classnames.txt."""

    images = "images"

    def folders(self, image_dir: str, names: dict[str, str]) -> dict[str, str]:
        """Return the WordNet id, ImageNet's folder name, of each folder, in label order."""
        return {name: name for name in list_folders(image_dir, self.repair_hint())}

    def read(self) -> Split:
        names = read_imagenet_class_names(self.dataset_dir, self.repair_hint())
        image_dir = require_path(os.path.join(self.dataset_dir, self.images), self.repair_hint())
        folders = self.folders(image_dir, names)
        classnames = {folder: names.get(wordnet_id, "") for folder, wordnet_id in folders.items()}
        rows = rows_by_folder(image_dir, list(folders), classnames, self.repair_hint())
        return Split(list(classnames.values()), [], [], rows)


@register(DATASET_REGISTRY, replace=True)
class ImageNetV2(ImageNetVariant):
    """ImageNetV2, whose folders are the labels 0 to 999 in the order of classnames.txt."""

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
    """Read the non-empty lines of a text file, stripped."""
    lines = read_text(require_path(path, hint)).splitlines()
    return [line.strip() for line in lines if line.strip()]


def read_class_names(path: str, hint: str) -> dict[str, str]:
    """Read class names by folder, in the file's order, from lines "folder name"."""
    pairs = [line.partition(" ") for line in read_lines(path, hint)]
    if outside := [folder for folder, _, _ in pairs if escapes_folder(folder)]:
        raise UserError(f"{path}: '{outside[0]}' is outside of the data set")
    names: dict[str, str] = {}
    for folder, _, name in pairs:
        if names.setdefault(folder, name) != name:
            raise UserError(
                f"{path}: the folder '{folder}' has two class names, '{names[folder]}' and '{name}'"
            )
    return names


def read_imagenet_class_names(folder: str, hint: str) -> dict[str, str]:
    """Read class names by WordNet id from classnames.txt and make them unique.

    CoOp's file follows an early list of CLIP that had two classes missile and two classes sunglasses. CLIP's
    authors have since renamed one of each; here the same names are used.
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
    """Return the rows of all images, with labels in the order of `folders`."""
    rows = []
    for label, folder in enumerate(folders):
        if not names.get(folder):
            raise UserError(f"{directory}: the folder '{folder}' has no line in classnames.txt")
        images = list_images(require_path(os.path.join(directory, folder), hint))
        rows += [Row(path, label, names[folder]) for path in images]
    return rows
