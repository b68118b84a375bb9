"""Measure the feature statistics of an image encoder (docs/method.md), the command `dfzsl geometry`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dfzsl.datasets.base import IMAGE_SUFFIXES, list_folders, list_images
from dfzsl.datasets.encoding import encode_files
from dfzsl.datasets.features import check_labels, open_features, unit_rows
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.recovery.feature_statistics import FeatureStatistics, measure_feature_statistics
from dfzsl.utils.errors import UserError


def measure_encoder(
    sources: Iterable[str | os.PathLike[str]], backbone: str = "", weights: str = "openai"
) -> FeatureStatistics:
    """Measure feature statistics on images and feature files.

    Args:
        sources: folders of images, or feature files (.npz or .safetensors with x (n, d), and y (n,) if
            labeled). Each folder inside a folder is a class; a folder without any is unlabeled. Classes of
            different sources are different classes.
        backbone: open_clip's name of the model that encodes the images.
        weights: pretrained tag or weights file.

    Returns:
        Mean and within-class covariance of the features.

    Raises:
        UserError: a source has no image, images lack a backbone, or only some sources are labeled.
    """
    paths = [Path(source) for source in sources]
    encoder = load_backbone(backbone, weights) if backbone else None
    features: list[Tensor] = []
    labels: list[Tensor | None] = []
    num_classes = 0
    for path in paths:
        if path.suffix in (".npz", ".safetensors"):
            arrays, _ = open_features(str(path))
            if "x" not in arrays:
                raise UserError(f"{path}: a feature file to measure has an array x (n, d), and y if labeled")
            x = unit_rows(arrays["x"](), f"{path}: x")
            y = check_labels(arrays["y"](), len(x), None, f"{path}: y") if "y" in arrays else None
        elif encoder is None:
            raise UserError(f"{path}: images need an encoder; give --backbone")
        else:
            x, y = _encode(encoder, path)
        features.append(x)
        labels.append(None if y is None else y + num_classes)
        num_classes += 0 if y is None or not len(y) else int(y.max()) + 1
    if not paths:
        raise UserError("no images to measure feature statistics on")
    given_labels = [y for y in labels if y is not None]
    if given_labels and len(given_labels) < len(labels):
        raise UserError("some of the images are labeled and some are not; measure on one kind")
    if len({x.shape[1] for x in features}) > 1:
        raise UserError("the feature files have different dimensions; measure one encoder at a time")
    return measure_feature_statistics(
        torch.cat(features),
        torch.cat(given_labels) if given_labels else None,
        backbone=encoder.identity if encoder else "",
        source=", ".join(path.name for path in paths),
    )


@torch.no_grad()
def _encode(encoder, folder: Path) -> tuple[Tensor, Tensor | None]:
    """Return unit features (n, d) of a folder's images, and labels (n,) if it has class folders."""
    if not folder.is_dir():
        raise UserError(f"{folder}: neither a folder of images nor a feature file (.npz, .safetensors)")
    classes = list_folders(os.fspath(folder), "name a folder of images")
    label_of = {
        path: label
        for label, subfolder in enumerate(classes or [""])
        for path in list_images(os.path.join(folder, subfolder))
    }
    if not label_of:
        raise UserError(f"{folder}: no images found ({', '.join(IMAGE_SUFFIXES)})")
    features: list[Tensor] = []
    with tqdm(total=len(label_of), desc=f"measuring {folder.name}", unit="img", leave=False) as bar:
        for read, rows, wrong in encode_files(encoder, list(label_of), device=encoder.device):
            if wrong:
                raise UserError(wrong[0])
            features.append(rows.float().cpu())
            bar.update(len(read))
    return torch.cat(features), torch.tensor(list(label_of.values())) if classes else None
