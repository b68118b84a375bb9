"""Train the CLIP of Shapes: python scripts/shapes/train_clip.py"""

from pathlib import Path
from typing import Any

import click

from dfzsl.cli.main import run
from dfzsl.datasets.shapes.train_clip import FOLDER, train


@click.command()
@click.option("--steps", type=click.IntRange(1), default=1000, show_default=True, help="Number of batches.")
@click.option("--batch", "batch_size", type=click.IntRange(1), default=256, show_default=True)
@click.option("--lr", type=float, default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--weight-decay", type=float, default=0.05, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=FOLDER, help="Folder to write into.")
def main(**settings: Any) -> None:
    """Train the CLIP of Shapes.

    Writes datasets/shapes/clip.safetensors and clip_training.csv. It takes about 12 minutes on one idle core;
    set OMP_NUM_THREADS=1 on a shared machine.

    \b
    Example:
      python scripts/shapes/train_clip.py --steps 1000
    """
    train(**settings)


if __name__ == "__main__":
    run(main)
