"""Measure the feature statistics of the built-in CLIP: python scripts/shapes/measure.py"""

from __future__ import annotations

import click
import numpy as np
import torch
from PIL import Image
from tqdm import trange

from dfzsl.cli.main import run
from dfzsl.datasets.shapes.captions import training_compositions
from dfzsl.datasets.shapes.world import STYLES, render
from dfzsl.trainers.clip.loading import BUILT_IN, BUILT_IN_FOLDER, load_backbone
from dfzsl.trainers.recovery.feature_statistics import measure_feature_statistics

NUM_COMPOSITIONS, SEED = 1_000, 1


@click.command()
def main() -> None:
    """Measure the feature statistics of the built-in CLIP.

    Writes datasets/shapes/geometry.safetensors, from two images of each of 1,000 compositions that this CLIP
    was trained on. None of the classes of Shapes is among them.

    \b
    Example:
      python scripts/shapes/measure.py
    """
    rng = np.random.default_rng(SEED)
    backbone = load_backbone(BUILT_IN)
    pool, styles = training_compositions(), list(STYLES.values())
    features, labels = [], []
    for label in trange(NUM_COMPOSITIONS, desc="measuring", unit="class"):
        composition = pool[int(rng.integers(len(pool)))]
        for _ in range(2):
            pixels = render(composition, rng, styles[int(rng.integers(len(styles)))])
            image = backbone.transform(Image.fromarray(pixels))[None]
            with torch.no_grad():
                features.append(backbone.encode_image(image)[0])
            labels.append(label)
    statistics = measure_feature_statistics(
        torch.stack(features),
        torch.tensor(labels),
        backbone=backbone.identity,
        source="training pictures of the built-in world's CLIP (datasets/shapes/captions.py)",
    )
    statistics.save(BUILT_IN_FOLDER / "geometry.safetensors")
    click.echo(statistics)


if __name__ == "__main__":
    run(main)
