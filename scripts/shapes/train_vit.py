"""Train the vision transformer of Shapes: python scripts/shapes/train_vit.py"""

from pathlib import Path
from typing import Any

import click

from dfzsl.cli.main import run
from dfzsl.datasets.shapes.train_vit import FOLDER, train
from dfzsl.trainers.clip.loading import BUILT_IN, load_backbone


@click.command()
@click.option("--steps", type=click.IntRange(1), default=500, show_default=True, help="Number of batches.")
@click.option("--batch", "batch_size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak learning rate.")
@click.option("--weight-decay", type=float, default=0.05, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=FOLDER, help="Folder to write into.")
def main(**settings: Any) -> None:
    """Distill the image tower of the built-in CLIP into a vision transformer.

    Writes datasets/shapes/vit.safetensors and vit_training.csv. It takes a quarter of an hour on one idle
    core.

    \b
    Example:
      python scripts/shapes/train_vit.py --steps 500
    """
    train(load_backbone(BUILT_IN).encode_image, **settings)


if __name__ == "__main__":
    run(main)
