"""The command `dfzsl`: each sub-command calls the functions of the API.

Nothing heavy is imported before a command runs, so that its help and the completion of a shell come at once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dfzsl.utils.errors import UserError, cli

FILE = click.Path(path_type=Path)
RAW = {"ignore_unknown_options": True, "help_option_names": []}  # for programs with a parser of their own


class Ordered(click.Group):
    """A group that lists its commands in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def options(*wanted: str) -> Callable[[Callable], Callable]:
    """The options of these names, which several commands have."""
    known = {
        "weights": click.option(
            "--weights", default="", help="The backbone's pretrained tag or weights file."
        ),
        "device": click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ..."),
        "batch_size": click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True),
        "workers": click.option(
            "--workers",
            type=click.IntRange(0),
            default=os.cpu_count(),
            help="Processes that decode pictures.",
        ),
        "text": click.option(
            "--text",
            default="",
            metavar="TEXT",
            help="What is said of a class: a template with {}, 'ensemble' (CLIP's 80), or a .json file of "
            'sentences, {"class name": ["...", ...]}.',
        ),
        "new": click.option(
            "--new",
            required=True,
            metavar="NAMES",
            help="New classes: a file, one a line, or 'one, another'.",
        ),
    }

    def decorate(command: Callable) -> Callable:
        for name in reversed(wanted):
            command = known[name](command)
        return command

    return decorate


@click.group(
    cls=Ordered,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""Completion of these commands: eval "$(_DFZSL_COMPLETE=bash_source dfzsl)" in ~/.bashrc (or
    zsh_source, fish_source). Configured runs and sweeps: python train.py, python -m dfzsl.launch.""",
)
@click.version_option(package_name="dfzsl")
@click.pass_context
def main(context: click.Context) -> None:
    """Names and a teacher in, a classifier out: data-free generalized zero-shot learning.

    A data owner has pictures, and fits a teacher on them. A client has the teacher, or only its answers,
    CLIP, and the names of new classes: it builds one classifier for base and new classes together, without a
    picture.
    """
    from dfzsl.utils.progress import hidden

    context.with_resource(hidden(not sys.stderr.isatty()))


@main.command()
@click.option("--teacher", required=True, metavar="FILE-or-URL", help="The owner's teacher, or its server.")
@options("new")
@click.option("--backbone", default="", help="open_clip's name of the model; by default the teacher's own.")
@options("weights", "text")
@click.option("--geometry", default="", metavar="FILE", help="The backbone's geometry, by dfzsl geometry.")
@click.option("--access", default="", help="What a query returns: weights, logits, probabilities or labels.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--keep", type=FILE, help="Folder where the results of the three stages stay.")
@click.option("-o", "--output", type=FILE, default=Path("classifier.safetensors"), show_default=True)
@click.argument("settings", nargs=-1, metavar="[KEY VALUE]...")
def build(
    teacher: str, new: str, keep: Path | None, output: Path, settings: tuple[str, ...], **named: Any
) -> None:
    """Build a classifier: a teacher's and new classes.

    Needs no data set and no picture. KEY VALUE pairs are those of a config, such as RECOVERY.THETA 2. A build
    that was interrupted goes on where it stopped.
    """
    from tabulate import tabulate

    from dfzsl.client.build import built, kept_until_done, read_classnames

    names = read_classnames(new)
    if len(settings) % 2:
        raise UserError(f"settings come in pairs KEY VALUE; '{settings[-1]}' stands alone")
    with kept_until_done(output, keep) as folder:
        classifier, summary = built(
            teacher, names, folder=folder, settings=settings, quiet=not sys.stderr.isatty(), **named
        )
        classifier.save(output)
    click.echo(tabulate(summary.items(), tablefmt="plain", maxcolwidths=[None, 90]))
    click.echo(f"Saved to {output}")


@main.command()
@click.argument("classifier", type=FILE)
@options("new", "text", "weights")
@click.option("-o", "--output", type=FILE, help="Where to write; by default over the old file.")
def add(classifier: Path, new: str, text: str, weights: str, output: Path | None) -> None:
    """Add classes to a classifier by name.

    The rows of the old ones stay as they are.
    """
    from dfzsl.client.build import backbone_of, read_classnames
    from dfzsl.trainers.clip.texts import ClassTexts
    from dfzsl.trainers.generation.classifier import Classifier

    names, old = read_classnames(new), Classifier.load(classifier)
    backbone = backbone_of(old, weights, where=classifier)
    more = old.add(names, backbone, ClassTexts.parse(text) if text else None)
    more.save(output or classifier)
    click.echo(f"{output or classifier}: {more!r}")


@main.command()
@click.argument("pictures", nargs=-1, required=True, metavar="PICTURE...")
@click.option("-c", "--classifier", type=FILE, default=Path("classifier.safetensors"), show_default=True)
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Classes for each picture.")
@click.option(
    "--format", "shape", type=click.Choice(["table", "csv", "jsonl"]), default="table", show_default=True
)
@options("weights", "batch_size", "workers", "device")
def predict(
    pictures: tuple[str, ...],
    classifier: Path,
    top: int,
    shape: str,
    weights: str,
    batch_size: int,
    workers: int,
    device: str,
) -> None:
    """Tell the classes of pictures.

    PICTURE is a file, a folder (with all below it) or a glob. A file that is no picture is named and left
    out; the exit code is then 1.
    """
    from tqdm import tqdm

    from dfzsl.client.build import backbone_of
    from dfzsl.client.predict import FORMATS, find_pictures
    from dfzsl.client.predict import predict as predicted
    from dfzsl.trainers.generation.classifier import Classifier

    known = Classifier.load(classifier)
    files = find_pictures(pictures)
    backbone = backbone_of(known, weights, _device(device), classifier)
    report, bad = FORMATS[shape](sys.stdout), 0
    # With the answers on the same terminal a bar would be in their way.
    hidden = not sys.stderr.isatty() or (shape != "table" and sys.stdout.isatty())
    with tqdm(total=len(files), unit="img", disable=hidden) as bar:
        for found, wrong in predicted(known, backbone, files, top, batch_size, workers, _device(device)):
            for path, best in found:
                report.add(path, best)
            for said in wrong:
                bar.write(f"skipped: {UserError(said)}", file=sys.stderr)
            bad += len(wrong)
            bar.update(len(found) + len(wrong))
    report.close()
    if bad:
        sys.stdout.flush()
        click.echo(f"{bad} of {len(files)} files could not be read", err=True)
        raise SystemExit(1)


@main.command()
@click.argument("data", type=FILE, metavar="FOLDER-or-FEATURES")
@click.option("-c", "--classifier", type=FILE, default=Path("classifier.safetensors"), show_default=True)
@click.option("--confusion", type=FILE, help="Picture to write: true by predicted class, among all classes.")
@options("weights", "batch_size", "workers", "device")
def evaluate(
    data: Path,
    classifier: Path,
    confusion: Path | None,
    weights: str,
    batch_size: int,
    workers: int,
    device: str,
) -> None:
    """Measure a classifier on labelled pictures.

    Prints the accuracy among base, new and all classes, and H. DATA is a folder that holds a folder of
    pictures for each class (classnames.txt of lines "folder name" says how they are called), or a feature
    file with x_test and y_test.
    """
    from dfzsl.client.build import backbone_of
    from dfzsl.client.evaluate import evaluate as evaluated
    from dfzsl.trainers.generation.classifier import Classifier

    known = Classifier.load(classifier)
    backbone = backbone_of(known, weights, _device(device), classifier) if data.is_dir() else None
    result = evaluated(
        known,
        data,
        backbone,
        batch_size=batch_size,
        num_workers=workers,
        device=_device(device),
        quiet=not sys.stderr.isatty(),
    )
    click.echo(result.table())
    if confusion:
        from dfzsl.report.diagnostics import draw_confusion

        draw_confusion(result.confusion, result.classnames, known.is_new.tolist()).savefig(confusion, dpi=130)
        click.echo(f"Saved to {confusion}")
    for said in result.wrong:
        click.echo(f"skipped: {UserError(said)}", err=True)
    if result.wrong:
        raise SystemExit(1)


@main.command()
@click.argument("classifier", type=FILE)
@click.option("--with-encoder", is_flag=True, help="The image encoder too: pictures in, logits out.")
@options("weights")
@click.option("-o", "--output", type=FILE, default=Path("classifier.onnx"), show_default=True)
def export(classifier: Path, with_encoder: bool, weights: str, output: Path) -> None:
    """Write a classifier for other programs.

    As ONNX (.onnx), checked against onnxruntime; or as a zero-shot weight matrix (.pt) of shape (d, C), which
    open_clip and CLIP_benchmark take, with its class names beside it (.txt).
    """
    if output.suffix not in (".onnx", ".pt") or (with_encoder and output.suffix == ".pt"):
        raise UserError(f"{output}: give a file that ends in .onnx, or without --with-encoder in .pt")
    from dfzsl.client.build import backbone_of
    from dfzsl.client.export import export_matrix, export_onnx
    from dfzsl.trainers.generation.classifier import Classifier

    known = Classifier.load(classifier)
    if output.suffix == ".pt":
        left = export_matrix(known, output)
        click.echo(f"Saved to {output}" + (f"; left out: {', '.join(left)}" if left else ""))
        return
    backbone = backbone_of(known, weights, where=classifier) if with_encoder else None
    off = export_onnx(known, output, backbone)
    click.echo(f"Saved to {output}; onnxruntime differs by at most {off:.1e} in a logit")


@main.command()
@click.argument("file", type=FILE)
def show(file: Path) -> None:
    """Tell what a file is.

    A teacher, a classifier, virtual classes, a geometry or features.
    """
    from dfzsl.io.file_summary import card

    click.echo(card(file))


@main.group(cls=Ordered)
def teacher() -> None:
    """The owner's side: fit, import, serve."""


@teacher.command()
@click.argument("data", type=FILE, metavar="FOLDER-or-FEATURES")
@click.option("-o", "--output", type=FILE, default=Path("teacher.safetensors"), show_default=True)
@click.option(
    "--classes", default="", metavar="NAMES", help="Only these: a file, one a line, or 'one, another'."
)
@click.option("--backbone", default="ViT-B-16", show_default=True, help="open_clip's name of the model.")
@options("weights", "text")
@click.option("--shots", type=click.IntRange(0), default=0, help="Pictures of each class; 0: all.")
@click.option("--linear", is_flag=True, help="Serve scores x.w instead of cosines.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@options("batch_size", "workers", "device")
def fit(
    data: Path,
    output: Path,
    classes: str,
    backbone: str,
    weights: str,
    text: str,
    shots: int,
    linear: bool,
    seed: int,
    batch_size: int,
    workers: int,
    device: str,
) -> None:
    """Fit a teacher on labelled pictures.

    DATA is a folder that holds a folder of pictures for each class, or a feature file's training part. The
    teacher's card says how much it is worth beside --text, or the text features of the file.
    """
    import torch

    from dfzsl.client.build import named, read_classnames
    from dfzsl.datasets.labeled_images import read_labelled
    from dfzsl.trainers.clip.loading import load_backbone
    from dfzsl.trainers.clip.texts import ClassTexts
    from dfzsl.trainers.recovery.teacher import fit_teacher

    opened = functools.cache(lambda: load_backbone(backbone, weights or "openai", _device(device)))
    known = read_labelled(
        data,
        opened,
        ("train", "val"),
        batch_size=batch_size,
        num_workers=workers,
        device=_device(device),
        quiet=not sys.stderr.isatty(),
    )
    if known.wrong:
        raise UserError(known.wrong[0])
    if classes:
        known = known.only(read_classnames(classes))
    rows, said = known.text, ClassTexts((known.template,)).about if known.template else ""
    if text or data.is_dir():
        texts = ClassTexts.parse(text)
        encoder = opened() if data.is_dir() else load_backbone(*named(known.backbone), _device(device))
        rows, said = texts.features(encoder, known.classnames).cpu(), texts.about
    made = fit_teacher(
        known.features,
        known.labels,
        known.classnames,
        known.backbone,
        text=rows,
        said=said,
        normalized=not linear,
        shots=shots,
        generator=torch.Generator().manual_seed(seed),
    )
    made.save(output)
    card = "" if made.card else "; no card: the feature file has no text features (text, or give --text)"
    click.echo(f"{output}: {made!r}{card}")


@teacher.command("import")
@click.argument("file", type=FILE)
@click.option(
    "--classes", default="", metavar="NAMES", help="In the order of the rows: a file, or 'one, another'."
)
@click.option("--backbone", default="", help="open_clip's name of the model whose features it reads.")
@options("weights")
@click.option("--cosine", is_flag=True, help="Serve cosines and intercepts instead of x.w + b.")
@click.option("--weight", default="", help="Name of the matrix in the file; by default that of common heads.")
@click.option("--bias", default="", help="Name of the intercepts in the file.")
@click.option("-o", "--output", type=FILE, default=Path("teacher.safetensors"), show_default=True)
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
    """Take over a classifier of another toolbox.

    FILE is a state dict of torch (nothing in it runs), .safetensors, or a scikit-learn classifier as .npz
    (coef_, intercept_) or .skops; --classes may be text, JSON or CSV.
    """
    from dfzsl.client.build import identity_of
    from dfzsl.owner.import_head import import_teacher

    made = import_teacher(
        file,
        classnames=classes
        if os.path.exists(classes)
        else [n.strip() for n in classes.split(",") if n.strip()],
        backbone=identity_of(backbone, weights) if backbone else "",
        normalized=cosine,
        weight=weight,
        bias=bias,
    )
    made.save(output)
    click.echo(f"{output}: {made!r}")


@teacher.command()
@click.argument("file", type=FILE)
@click.option(
    "--access",
    default="labels",
    show_default=True,
    help="The most that is told.",
)
@click.option("--decimals", type=int, help="Round scores to so many places.")
@click.option("--top", type=int, default=0, help="Tell the probabilities of so many classes; 0: of all.")
@click.option(
    "--noise",
    type=float,
    default=0.0,
    help="Standard deviation added to the logits; the same for equal questions.",
)
@click.option("--budget", type=int, default=0, help="Queries of all clients together; 0: any number.")
@click.option("--token-budget", type=int, default=0, help="Queries of each token; 0: any number.")
@click.option("--rate", type=float, default=0.0, help="Queries a second of each token; 0: any number.")
@click.option("--ledger", default="", help="SQLite file of tokens and budgets; by default beside FILE.")
@click.option("--log", "log_file", default="", help="Where the access log goes; by default to stderr.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
def serve(file: Path, **terms: Any) -> None:
    """Answer questions about a teacher over HTTP.

    The protocol stands in docs/black_box.md and on the server's own page, /docs. As long as no token was
    issued (dfzsl teacher token), everybody is one client.
    """
    from dfzsl.owner.server.app import serve as run

    run(file, **terms)


@teacher.command()
@click.argument("file", type=FILE)
@click.argument("name")
@click.option("--budget", type=click.IntRange(0), help="Queries of this token, in place of --token-budget.")
@click.option("--revoke", is_flag=True, help="Refuse the client's token from now on.")
@click.option("--ledger", default="", help="SQLite file of tokens and budgets; by default beside FILE.")
def token(file: Path, name: str, budget: int | None, revoke: bool, ledger: str) -> None:
    """Issue a client's token, or revoke it.

    FILE is the teacher that is served. The token is shown this once; only its hash is kept. The client sets
    it as DFZSL_TEACHER_TOKEN.
    """
    from dfzsl.owner.server.app import Ledger, default_ledger

    if not ledger and not file.is_file():
        raise UserError(f"{file}: no such teacher file")
    kept = Ledger(ledger or default_ledger(file))
    if revoke:
        kept.revoke(name)
        click.echo(f"{name}: revoked")
    else:
        click.echo(kept.issue(name, budget))


@main.command(context_settings=RAW, add_help_option=False)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def geometry(words: tuple[str, ...]) -> None:
    """Measure how an encoder's features scatter.

    The program python -m dfzsl.client.measure.
    """
    from dfzsl.client.measure import main as run

    run(list(words))


@main.command(context_settings=RAW, add_help_option=False)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def report(words: tuple[str, ...]) -> None:
    """Make tables of finished runs.

    The program python -m dfzsl.report.
    """
    from dfzsl.report.__main__ import main as run

    run(list(words))


def _protocol(name: str, what: str) -> None:
    @main.command(
        name,
        context_settings=RAW,
        add_help_option=False,
        help=f"{what}.\n\nThe launcher: python -m dfzsl.launch.",
    )
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def protocol(words: tuple[str, ...]) -> None:
        from dfzsl.launch.__main__ import main as run

        run([name, *words])


_protocol("base2new", "Compare methods on base and new classes")
_protocol("gzsl", "Compare them on all classes at once")
_protocol("xd", "Compare them across data sets")
_protocol("dg", "Compare them on other pictures of the same classes")
_protocol("fewshot", "Compare them by the number of training images")


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: there is no such device here") from None
    return name


def _run() -> None:
    try:
        # Else click prints several lines for a mistake, and hides a defect of the program.
        code = main(standalone_mode=False)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        code = 2
    except click.ClickException as error:
        of = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "dfzsl"
        raise UserError(f"{error.format_message()} ({of} --help)") from None
    raise SystemExit(code if isinstance(code, int) else 0)


def entry() -> None:
    """The console's entry point."""
    cli(_run)


if __name__ == "__main__":
    entry()
