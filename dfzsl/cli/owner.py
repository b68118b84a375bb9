"""Provide the owner's commands: teacher fit, import, serve and token."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from dfzsl.utils.errors import UserError

from . import options
from .options import FILE, OUTPUT_FILE, OrderedGroup, resolve_device

output = click.option(
    "-o", "--output", type=OUTPUT_FILE, default=Path("teacher.safetensors"), show_default=True
)
ledger = click.option(
    "--ledger",
    default="",
    metavar="FILE",
    help="SQLite file of tokens and budgets.  [default: the teacher's, as .ledger]",
)


@click.group(cls=OrderedGroup)
def teacher() -> None:
    """Create a teacher and serve it to clients."""


@teacher.command()
@click.argument("data", type=FILE, metavar="DATA")
@output
@click.option(
    "--classes",
    default="",
    metavar="NAMES",
    help="Use only these classes: a file, or names separated by commas.",
)
@click.option("--backbone", default="ViT-B-16", show_default=True, help="open_clip's name of the model.")
@options.weights
@options.text
@click.option("--shots", type=click.IntRange(0), metavar="N", default=0, help="Images per class; 0: all.")
@click.option("--linear", is_flag=True, help="Serve scores x.w instead of cosines.")
@options.seed
@options.batch_size
@options.workers
@options.device
def fit(
    data: Path, output: Path, classes: str, linear: bool, workers: int, device: str, **named: Any
) -> None:
    """Fit a teacher on labeled images.

    DATA is a folder with one folder of images per class, or a feature file with a training part. The
    teacher's model card has the mixing weight of teacher and --text (by default the text features of the
    feature file).

    \b
    Example:
      dfzsl teacher fit images/ --backbone ViT-B-16
    """
    from dfzsl.io.class_names import read_classnames
    from dfzsl.owner.fit import fit_teacher_on

    fitted = fit_teacher_on(
        data,
        classnames=read_classnames(classes) if classes else None,
        normalized=not linear,
        num_workers=workers,
        device=resolve_device(device),
        quiet=not sys.stderr.isatty(),
        **named,
    )
    fitted.save(output)
    no_card = "; no model card: the feature file has no text features (add them as text, or give --text)"
    click.echo(f"{output}: {fitted!r}{'' if fitted.card else no_card}")


@teacher.command("import")
@click.argument("file", type=FILE)
@click.option(
    "--classes",
    default="",
    metavar="NAMES",
    help="Class names in the order of the weights: a file, or names separated by commas.",
)
@click.option("--backbone", default="", help="open_clip's name of the model whose features it reads.")
@options.weights
@click.option("--cosine", is_flag=True, help="Serve cosines and intercepts instead of x.w + b.")
@click.option(
    "--weight",
    default="",
    metavar="KEY",
    help="Name of the weight matrix in the file.  [default: as in common heads]",
)
@click.option("--bias", default="", metavar="KEY", help="Name of the intercepts in the file.")
@output
def import_(
    file: Path,
    classes: str,
    backbone: str,
    weights: str,
    cosine: bool,
    weight: str,
    bias: str,
    output: Path,
) -> None:
    """Import a linear classifier of another library as a teacher.

    FILE is a state dict of torch (no code in it is executed), .safetensors, or a scikit-learn classifier as
    .npz (coef_, intercept_) or .skops. A file of --classes may be text, JSON or CSV.

    \b
    Example:
      dfzsl teacher import probe.pt --classes names.txt --backbone ViT-B-16
    """
    from dfzsl.owner.import_head import import_teacher
    from dfzsl.trainers.clip.loading import identity

    names = [name.strip() for name in classes.split(",") if name.strip()]
    imported = import_teacher(
        file,
        classnames=classes if os.path.exists(classes) else names,
        backbone=identity(backbone, weights or "openai", fetch=False) if backbone else "",
        normalized=cosine,
        weight=weight,
        bias=bias,
    )
    imported.save(output)
    click.echo(f"{output}: {imported!r}")


@teacher.command()
@click.argument("file", type=FILE)
@click.option("--access", default="labels", show_default=True, help="Highest access level of a query.")
@click.option("--decimals", type=int, metavar="N", help="Round scores to this many decimals.")
@click.option("--top", type=int, metavar="N", default=0, help="Return this many top probabilities; 0: all.")
@click.option(
    "--noise",
    type=float,
    default=0.0,
    help="Standard deviation of noise on the logits; equal queries get equal noise.",
)
@click.option(
    "--budget", type=int, metavar="N", default=0, help="Queries of all clients together; 0: unlimited."
)
@click.option("--token-budget", type=int, metavar="N", default=0, help="Queries per token; 0: unlimited.")
@click.option("--rate", type=float, default=0.0, help="Queries per second and token; 0: unlimited.")
@ledger
@click.option("--log", "log_file", default="", metavar="FILE", help="Access log.  [default: stderr]")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), metavar="N", default=8000, show_default=True)
def serve(file: Path, **settings: Any) -> None:
    """Serve a teacher over HTTP.

    docs/black_box.md and the server's page /docs describe the protocol. Without tokens (dfzsl teacher token)
    all clients count as one.

    \b
    Example:
      dfzsl teacher serve teacher.safetensors --access labels --budget 20000
    """
    from dfzsl.owner.server import serve as serve_teacher

    serve_teacher(file, **settings)


@teacher.command()
@click.argument("file", type=FILE)
@click.argument("name")
@click.option(
    "--budget", type=click.IntRange(0), metavar="N", help="Queries of this token.  [default: --token-budget]"
)
@click.option("--revoke", is_flag=True, help="Revoke the client's token.")
@ledger
def token(file: Path, name: str, budget: int | None, revoke: bool, ledger: str) -> None:
    """Issue or revoke a client's token.

    FILE is the teacher that is served. The token is printed once, and only its hash is stored. The client
    sets it as DFZSL_TEACHER_TOKEN.

    \b
    Example:
      dfzsl teacher token teacher.safetensors ada --budget 5000
    """
    from dfzsl.owner.server import Ledger, default_ledger

    if not ledger and not file.is_file():
        raise UserError(f"{file}: no such teacher file")
    tokens = Ledger(ledger or default_ledger(file))
    if revoke:
        tokens.revoke(name)
        click.echo(f"{name}: revoked")
    else:
        click.echo(tokens.issue(name, budget))
