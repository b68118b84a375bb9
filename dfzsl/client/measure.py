"""Measure how an encoder's image features scatter, once, on any pictures: see docs/method.md.

    python -m dfzsl.client.measure PICTURES... --backbone ViT-B/16 -o geometry.safetensors

PICTURES are folders of pictures or feature files (.npz or .safetensors with x, and y if labelled). Each
folder inside a folder is a class; a folder without any is unlabelled, which does nearly as well. A few
hundred pictures of anything will do: they need not be, and for an honest comparison must not be, those of
the task.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dfzsl.datasets.base import IMAGES, folders_in, images_in
from dfzsl.datasets.encoding import encode_files
from dfzsl.datasets.features import labels_of, open_features, unit_rows
from dfzsl.train import cli
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.recovery.feature_statistics import Geometry, measure_geometry
from dfzsl.utils.errors import UserError


def geometry_of(
    sources: Iterable[str | os.PathLike[str]], backbone: str = "", weights: str = "openai"
) -> Geometry:
    """The geometry measured on all `sources` together; the classes of each are classes of its own.

    Raises UserError for a source without pictures, sources of which some are labelled and some not, and
    pictures without a backbone.
    """
    paths = [Path(source) for source in sources]
    encoder = load_backbone(backbone, weights) if backbone else None
    features: list[Tensor] = []
    labels: list[Tensor | None] = []
    seen = 0
    for path in paths:
        if path.suffix in (".npz", ".safetensors"):
            arrays, _ = open_features(str(path))
            if "x" not in arrays:
                raise UserError(f"{path}: a feature file to measure has an array x (n, d), and y if labelled")
            x = unit_rows(arrays["x"](), f"{path}: x")
            y = labels_of(arrays["y"](), len(x), None, f"{path}: y") if "y" in arrays else None
        elif encoder is None:
            raise UserError(f"{path}: pictures need an encoder; give --backbone")
        else:
            x, y = _encode(encoder, path)
        features.append(x)
        labels.append(None if y is None else y + seen)
        seen += 0 if y is None or not len(y) else int(y.max()) + 1
    if not paths:
        raise UserError("no pictures to measure a geometry on")
    found = [y for y in labels if y is not None]
    if found and len(found) < len(labels):
        raise UserError("some of the pictures are labelled and some are not; measure on one kind")
    if len({x.shape[1] for x in features}) > 1:
        raise UserError("the feature files have different dimensions; measure one encoder at a time")
    return measure_geometry(
        torch.cat(features),
        torch.cat(found) if found else None,
        backbone=encoder.identity if encoder else "",
        source=", ".join(path.name for path in paths),
    )


@torch.no_grad()
def _encode(encoder, folder: Path) -> tuple[Tensor, Tensor | None]:
    """Unit features of the pictures in a folder, and their labels where it has folders inside."""
    if not folder.is_dir():
        raise UserError(f"{folder}: neither a folder of pictures nor a feature file (.npz, .safetensors)")
    classes = folders_in(os.fspath(folder), "name a folder of pictures")
    place = {
        path: label
        for label, inside in enumerate(classes or [""])
        for path in images_in(os.path.join(folder, inside))
    }
    if not place:
        raise UserError(f"{folder}: it holds no pictures ({', '.join(IMAGES)})")
    features: list[Tensor] = []
    with tqdm(total=len(place), desc=f"measuring {folder.name}", unit="img", leave=False) as bar:
        for read, rows, wrong in encode_files(encoder, list(place), device=encoder.device):
            if wrong:
                raise UserError(wrong[0])
            features.append(rows.float().cpu())
            bar.update(len(read))
    return torch.cat(features), torch.tensor(list(place.values())) if classes else None


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURES")
    parser.add_argument("--backbone", default="", help="open_clip's name; not for feature files")
    parser.add_argument("--weights", default="openai", help="a tag of open_clip's, or a file")
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    geometry = geometry_of(args.pictures, args.backbone, args.weights)
    geometry.save(args.output)
    print(f"{args.output}: {geometry}")


if __name__ == "__main__":
    cli(main)
