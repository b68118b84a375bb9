"""Provide the commands about files: show and geometry."""

from __future__ import annotations

from pathlib import Path

import click

from .options import FILE, OUTPUT_FILE


@click.command()
@click.argument("file", type=FILE)
def show(file: Path) -> None:
    """Describe a file.

    FILE is a teacher, a classifier, virtual classes, feature statistics or features.

    \b
    Example:
      dfzsl show teacher.safetensors
    """
    from dfzsl.io.file_summary import summarize_file

    click.echo(summarize_file(file))


@click.command()
@click.argument("images", nargs=-1, required=True, type=FILE, metavar="IMAGES...")
@click.option("--backbone", default="", help="open_clip's name of the model; not for feature files.")
@click.option("--weights", default="openai", show_default=True, help="Pretrained tag or weights file.")
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, metavar="FILE")
def geometry(images: tuple[Path, ...], backbone: str, weights: str, output: Path) -> None:
    """Measure the feature statistics of an encoder.

    IMAGES are folders of images, or feature files (.npz or .safetensors with x, and y if labeled). Each
    folder inside a folder is a class; without any, the images are unlabeled, which works nearly as well. A
    few hundred images of any kind are enough. For a fair comparison they must not be images of the task.

    \b
    Example:
      dfzsl geometry images/ --backbone ViT-B/16 -o geometry.safetensors
    """
    from dfzsl.client.measure import measure_encoder

    statistics = measure_encoder(images, backbone, weights)
    statistics.save(output)
    click.echo(f"{output}: {statistics}")
