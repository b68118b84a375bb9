"""Provide the client's commands: build, add, predict, evaluate and export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dfzsl.utils.errors import UserError

from . import options
from .options import FILE, OUTPUT_FILE, SettingsCommand, resolve_device


@click.command(cls=SettingsCommand)
@click.option(
    "--teacher", required=True, metavar="FILE-or-URL", help="Teacher file, or its server's address."
)
@options.new
@click.option("--backbone", default="", help="open_clip's name of the model.  [default: the teacher's]")
@options.weights
@options.text
@click.option(
    "--geometry", default="", metavar="FILE", help="Feature statistics of the backbone (dfzsl geometry)."
)
@click.option("--access", default="", help="What a query returns: weights, logits, probabilities or labels.")
@options.seed
@click.option("--keep", type=FILE, metavar="FOLDER", help="Keep the results of the three stages here.")
@click.option("-o", "--output", type=OUTPUT_FILE, default=Path("classifier.safetensors"), show_default=True)
@click.argument("settings", nargs=-1, metavar="[KEY VALUE]...")
def build(
    teacher: str, new: str, keep: Path | None, output: Path, settings: tuple[str, ...], **named: Any
) -> None:
    """Build a classifier from a teacher and new class names.

    No data set and no image is needed. KEY VALUE pairs change the config (RECOVERY.THETA 2). The same
    command resumes an interrupted build.

    \b
    Example:
      dfzsl build --teacher teacher.safetensors --new names.txt
    """
    if len(settings) % 2:
        raise UserError(f"settings must be KEY VALUE pairs; '{settings[-1]}' has no value")
    from tabulate import tabulate

    from dfzsl.client.build import build as build_classifier
    from dfzsl.client.build import temporary_folder
    from dfzsl.io.class_names import read_classnames

    names = read_classnames(new)
    with temporary_folder(output, keep) as folder:
        classifier = build_classifier(
            teacher, names, folder=folder, settings=settings, quiet=not sys.stderr.isatty(), **named
        )
        classifier.save(output)
    if classifier.decision:
        click.echo(tabulate(classifier.decision.rows(), tablefmt="plain", maxcolwidths=[None, 90]))
    click.echo(repr(classifier))
    click.echo(f"Saved to {output}")


@click.command()
@click.argument("classifier", type=FILE)
@options.new
@options.text
@options.weights
@click.option("-o", "--output", type=OUTPUT_FILE, help="File to write.  [default: CLASSIFIER]")
def add(classifier: Path, new: str, text: str, weights: str, output: Path | None) -> None:
    """Add classes to a classifier by name.

    The weights of its other classes stay the same.

    \b
    Example:
      dfzsl add classifier.safetensors --new "red panda, okapi"
    """
    from dfzsl.client.encoder import load_encoder
    from dfzsl.io.class_names import read_classnames
    from dfzsl.trainers.clip.class_prompts import ClassPrompts
    from dfzsl.trainers.generation.classifier import Classifier

    names, base = read_classnames(new), Classifier.load(classifier)
    backbone = load_encoder(base, weights, source=classifier)
    extended = base.add(names, backbone, ClassPrompts.parse(text) if text else None)
    extended.save(output or classifier)
    click.echo(f"{output or classifier}: {extended!r}")


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@options.classifier
@click.option(
    "--top",
    type=click.IntRange(1),
    metavar="N",
    default=1,
    show_default=True,
    help="Number of classes per image.",
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "csv", "jsonl"]),
    default="table",
    show_default=True,
)
@options.weights
@options.batch_size
@options.workers
@options.device
def predict(
    images: tuple[str, ...],
    classifier: Path,
    top: int,
    output_format: str,
    weights: str,
    batch_size: int,
    workers: int,
    device: str,
) -> None:
    """Classify images.

    IMAGE is a file, a folder (with its subfolders) or a glob. Unreadable files are skipped with a warning,
    and the exit code is then 1.

    \b
    Example:
      dfzsl predict images/ --top 3 --format csv
    """
    from tqdm import tqdm

    from dfzsl.client.encoder import load_encoder
    from dfzsl.client.predict import FORMATS, find_images
    from dfzsl.client.predict import predict as predict_files
    from dfzsl.trainers.generation.classifier import Classifier

    device = resolve_device(device)
    model = Classifier.load(classifier)
    files = find_images(images)
    backbone = load_encoder(model, weights, device, classifier)
    writer = FORMATS[output_format](sys.stdout)
    unreadable = 0
    # A progress bar would disturb predictions that appear on the same terminal.
    hidden = not sys.stderr.isatty() or (output_format != "table" and sys.stdout.isatty())
    with tqdm(total=len(files), unit="img", disable=hidden) as progress:
        for predictions, errors in predict_files(model, backbone, files, top, batch_size, workers, device):
            for path, classes in predictions:
                writer.add(path, classes)
            for error in errors:
                progress.write(f"skipped: {UserError(error)}", file=sys.stderr)
            unreadable += len(errors)
            progress.update(len(predictions) + len(errors))
    writer.close()
    if unreadable:
        sys.stdout.flush()
        click.echo(f"{unreadable} of {len(files)} files could not be read", err=True)
        raise SystemExit(1)


@click.command()
@click.argument("data", type=FILE, metavar="DATA")
@options.classifier
@click.option(
    "--confusion",
    type=OUTPUT_FILE,
    metavar="FILE",
    callback=options.check_plot_file,
    help="Write an image of the confusion matrix.",
)
@options.weights
@options.batch_size
@options.workers
@options.device
def evaluate(
    data: Path,
    classifier: Path,
    confusion: Path | None,
    weights: str,
    batch_size: int,
    workers: int,
    device: str,
) -> None:
    """Measure a classifier on labeled images.

    Prints the accuracy among base, new and all classes, and H. DATA is a folder with one folder of images per
    class (a file classnames.txt of lines "folder name" may name the classes), or a feature file with x_test
    and y_test.

    \b
    Example:
      dfzsl evaluate labeled/ --confusion confusion.png
    """
    from dfzsl.client.encoder import load_encoder
    from dfzsl.client.evaluate import evaluate as evaluate_classifier
    from dfzsl.trainers.generation.classifier import Classifier

    device = resolve_device(device)
    model = Classifier.load(classifier)
    result = evaluate_classifier(
        model,
        data,
        load_encoder(model, weights, device, classifier) if data.is_dir() else None,
        batch_size=batch_size,
        num_workers=workers,
        device=device,
        quiet=not sys.stderr.isatty(),
    )
    click.echo(result.table())
    if confusion:
        from dfzsl.report.diagnostics import draw_confusion

        draw_confusion(result.confusion, result.classnames, model.is_new.tolist()).savefig(confusion, dpi=130)
        click.echo(f"Saved to {confusion}")
    for error in result.wrong:
        click.echo(f"skipped: {UserError(error)}", err=True)
    if result.wrong:
        raise SystemExit(1)


@click.command()
@click.argument("classifier", type=FILE)
@click.option("--with-encoder", is_flag=True, help="Include the image encoder: images in, logits out.")
@options.weights
@click.option("-o", "--output", type=OUTPUT_FILE, default=Path("classifier.onnx"), show_default=True)
def export(classifier: Path, with_encoder: bool, weights: str, output: Path) -> None:
    """Export a classifier to ONNX or to a weight matrix.

    An .onnx file is checked against onnxruntime. A .pt file is a zero-shot weight matrix of shape (d, C) for
    open_clip and CLIP_benchmark, with a .txt file of its class names.

    \b
    Example:
      dfzsl export classifier.safetensors --with-encoder -o classifier.onnx
    """
    if output.suffix not in (".onnx", ".pt") or (with_encoder and output.suffix == ".pt"):
        raise UserError(f"{output}: the output must end in .onnx, or in .pt without --with-encoder")
    from dfzsl.client.encoder import load_encoder
    from dfzsl.client.export import export_matrix, export_onnx
    from dfzsl.trainers.generation.classifier import Classifier

    model = Classifier.load(classifier)
    if output.suffix == ".pt":
        omitted = export_matrix(model, output)
        click.echo(f"Saved to {output}" + (f"; without {', '.join(omitted)}" if omitted else ""))
        return
    backbone = load_encoder(model, weights, source=classifier) if with_encoder else None
    difference = export_onnx(model, output, backbone)
    click.echo(f"Saved to {output}; onnxruntime differs by at most {difference:.1e} in a logit")
