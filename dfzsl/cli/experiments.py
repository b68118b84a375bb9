"""Provide the commands of experiments: the sweeps of each protocol, report, plot, prepare and extract."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dfzsl.utils.errors import UserError

from . import options
from .options import FILE, HELP, OUTPUT_FILE, OrderedGroup, SettingsCommand, check_plot_file, resolve_device

if TYPE_CHECKING:
    from dfzsl.launch.sweep import SweepOptions
    from dfzsl.report import Section

PROTOCOL_SUMMARIES = {
    "base2new": "Compare methods on base and new classes.",
    "gzsl": "Compare methods on base and new classes at once (GZSL).",
    "xd": "Compare methods across data sets.",
    "dg": "Compare methods on domain shifts of the same classes.",
    "fewshot": "Compare methods by the number of training images.",
}
SWEEP_HELP = """{summary}

DATASET is a name, folder:PATH, csv:PATH, features:PATH, or all. SEED defaults to 1 2 3. KEY VALUE pairs
change the config of every run. Finished runs are skipped, interrupted ones resume, and the tables come last.

\b
Example:
  dfzsl {protocol} --methods CoOp,DFZSL {dataset} 1 2 3 OPTIM.MAX_EPOCH 10
"""


class Shots(click.ParamType):
    """Number of images per class: 1 or more, or -1 for all."""

    name = "shots"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1 and number != -1:
            self.fail(f"'{value}' is not a number of images; give 1 or more, or -1 for all", param, ctx)
        return number


class ShotsList(Shots):
    """Numbers of images per class, separated by commas."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        numbers = [super(ShotsList, self).convert(word, param, ctx) for word in str(value).split(",")]
        return tuple(dict.fromkeys(numbers))


def sweep_options(
    protocol: str, words: Sequence[str], shots: Sequence[int] | None, **named: Any
) -> SweepOptions:
    """Convert the parameters of a sweep's command; `words` are [DATASET [SEED]... [KEY VALUE]...]."""
    from dfzsl.launch.sweep import SweepOptions

    dataset, *rest = words or [""]
    seeds = list(itertools.takewhile(str.isdecimal, rest))
    return SweepOptions(
        protocol,
        dataset,
        seeds=tuple(map(int, seeds)),
        settings=tuple(rest[len(seeds) :]),
        shots=tuple(shots or ()),
        **named,
    )


def run_sweep(protocol: str, dry_run: bool, **named: Any) -> None:
    """Check a sweep, run what is not finished and print the tables.

    Raises:
        UserError: the options, the data or the output folder are wrong, or runs failed.
    """
    from dfzsl.launch.sweep import Sweep

    sweep = Sweep.checked(sweep_options(protocol, **named))
    click.echo(sweep.summary())
    if dry_run:
        for line in sweep.command_lines():
            click.echo(line)
        return
    # Both signals must end the workers too, also in a background process, which would ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sweep.run()
    if sweep.has_results():
        sections = sweep.sections()
        echo_tables(sections)
        click.echo(f"Tables and plots: {sweep.write_page(sections)}")
    sweep.raise_failures()


def sweep_command(protocol: str, summary: str) -> click.Command:
    """Return the command that runs the sweeps of a protocol."""
    dataset = "imagenet" if protocol in ("xd", "dg") else "shapes"

    @click.command(
        protocol,
        cls=SettingsCommand,
        help=SWEEP_HELP.format(summary=summary, protocol=protocol, dataset=dataset),
        short_help=summary,
    )
    @click.option(
        "--methods",
        default="",
        metavar="METHOD,...",
        help="all, or TRAINER[@virtual or @CHECKOUT][:CONFIG][+VARIANT],...",
    )
    @click.option(
        "--image-prompts",
        is_flag=True,
        help="Include MaPLe and PromptSRC in all; they need a backward pass of the image encoder.",
    )
    @click.option(
        "--root", default="data", show_default=True, envvar="DATA", show_envvar=True, help="Data folder."
    )
    @click.option("--output", type=FILE, default=Path("output"), show_default=True, help="Folder of results.")
    @click.option(
        "--shots",
        type=ShotsList(),
        metavar="N[,N...]",
        help="Training images per class; -1: all.  [default: 16; fewshot: 1,2,4,8,16]",
    )
    @click.option(
        "--teacher-shots",
        type=Shots(),
        metavar="N",
        help="The owner's images per class.  [default: -1, all; fewshot: as --shots]",
    )
    @click.option("--launcher", type=click.Choice(["local", "slurm"]), default="local", show_default=True)
    @click.option(
        "--workers",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Runs at a time; 0: as GPUs or cores allow.",
    )
    @click.option(
        "--gpus-per-run",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        metavar="N",
        help="GPUs of a run, by torchrun.",
    )
    @click.option("--dry-run", is_flag=True, help="Check data, weights and output, list the runs and stop.")
    @click.argument("words", nargs=-1, metavar="[DATASET [SEED]... [KEY VALUE]...]")
    def command(**named: Any) -> None:
        run_sweep(protocol, **named)

    return command


@click.group(cls=OrderedGroup, context_settings=HELP)
def launch() -> None:
    """Run the methods and seeds of an experiment, and print its tables."""


for _protocol, _summary in PROTOCOL_SUMMARIES.items():
    launch.add_command(sweep_command(_protocol, _summary))


def echo_tables(sections: Sequence[Section]) -> None:
    """Print tables, narrowed to the width of a terminal."""
    from dfzsl.report.formats import terminal

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    click.echo(terminal(sections, width), nl=False)


@click.command()
@click.argument("output", type=FILE, required=False)
@click.option(
    "--format",
    "table_format",
    type=click.Choice(["terminal", "markdown", "latex", "csv"]),
    default="terminal",
    show_default=True,
    help="Format of the tables.",
)
@click.option(
    "--html", type=OUTPUT_FILE, metavar="FILE", help="Also write an HTML page with tables and plots."
)
@click.option("--published", is_flag=True, help="Show published results next to the measured ones.")
@click.option("--logs", type=FILE, metavar="FOLDER", help="Also read CoOp's logs in FOLDER (train_base/...).")
@click.option("--glossary", is_flag=True, help="Print the meaning of methods and columns, and stop.")
def report(
    output: Path | None,
    table_format: str,
    html: Path | None,
    published: bool,
    logs: Path | None,
    glossary: bool,
) -> None:
    """Print tables of finished runs.

    OUTPUT is an output folder or that of one protocol (output, output/base2new).

    \b
    Example:
      dfzsl report output --html report.html
    """
    from dfzsl.report import FORMATS, collect, collect_logs, method_names, sections

    if glossary:
        click.echo(method_names.glossary_markdown(), nl=False)
        return
    if not output and not logs:
        raise click.UsageError("give an output folder, --logs FOLDER, or both")
    outcomes = collect(output) if output else []
    outcomes += collect_logs(logs) if logs else []
    parts = sections(outcomes, published=published)
    if html:
        from dfzsl.report.page import write_page

        write_page(html, parts)
    if table_format == "terminal":
        echo_tables(parts)
    else:
        click.echo(FORMATS[table_format](parts), nl=False)
    if html:
        click.echo(f"Saved to {html}", err=True)
    if published and not any(row.source for part in parts for row in part.summaries):
        click.echo("there are no published results for these data sets", err=True)


@click.command()
@click.argument("run", type=FILE)
@click.argument("features", type=FILE)
@click.option(
    "--classes",
    type=click.IntRange(2, 20),
    default=6,
    show_default=True,
    metavar="N",
    help="Classes to plot.",
)
@click.option(
    "--output",
    type=OUTPUT_FILE,
    metavar="FILE",
    callback=check_plot_file,
    help="Image to write.  [default: RUN/virtual.png]",
)
def plot(run: Path, features: Path, classes: int, output: Path | None) -> None:
    """Plot real and virtual features.

    RUN is the folder of a finished run, with virtual.safetensors. FEATURES is a feature file with test
    features of the same classes (dfzsl extract).

    \b
    Example:
      dfzsl plot output/.../seed1 dtd.safetensors --output dtd.png
    """
    from dfzsl.report.diagnostics import plot_run

    output = output or run / "virtual.png"
    plot_run(run, features, classes).savefig(output, dpi=130)
    click.echo(f"Saved to {output}")


@click.command()
@click.argument("datasets", nargs=-1, required=True, metavar="DATASET...")
@click.option("--root", type=FILE, default=Path("data"), show_default=True, help="Data folder.")
@click.option("--check", is_flag=True, help="Verify existing files; download nothing.")
@click.option(
    "--from", "source", type=click.Choice(["official", "mirror"]), default="official", show_default=True
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    default=os.cpu_count(),
    show_default="all cores",
    help="Processes that decode images.",
)
def prepare(datasets: tuple[str, ...], root: Path, check: bool, source: str, workers: int) -> None:
    """Download data sets into CoOp's layout, or check them.

    DATASET is a name (dtd, OxfordPets, awa2, ...), or all. The same command resumes an interrupted download,
    and lists files that must be placed by hand. docs/DATASETS.md has addresses, sizes, licenses and layouts.

    \b
    Example:
      dfzsl prepare oxford_pets dtd --root data
    """
    from dfzsl.prepare import recipes, verify
    from dfzsl.prepare.names import dataset_names

    names = dataset_names(datasets)
    if check:
        reports = {name: verify.check(name, root, workers) for name in names}
        click.echo(verify.table(reports))
        if failed := [name for name, result in reports.items() if not result.ok]:
            raise UserError(f"different from the published data sets: {', '.join(failed)}")
        return
    errors = {}
    for name in names:
        try:
            click.echo(f"{name}: in {recipes.prepare(name, root, source)}")
        except UserError as error:
            errors[name] = str(error)
    click.echo(f"Archives are kept in {root / '.downloads'}; delete them after --check has passed")
    if errors:
        raise UserError("\n".join(f"{name}: {error}" for name, error in errors.items()))


@click.command()
@click.argument("data")
@click.option("--root", default="", help="Data folder, for a data set that DATA names by its config.")
@click.option(
    "--output", type=OUTPUT_FILE, required=True, metavar="FILE", help="The .safetensors file to write."
)
@click.option("--backbone", default="ViT-B-16", show_default=True, help="open_clip's name of the model.")
@click.option("--weights", default="openai", show_default=True, help="Pretrained tag or weights file.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="fp32; on a GPU fp16, amp or bf16; bf16 also on CPUs that support it.",
)
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True, metavar="N")
@click.option(
    "--workers",
    type=click.IntRange(0),
    metavar="N",
    default=os.cpu_count(),
    show_default="all cores",
    help="Processes per rank that decode images.",
)
@options.device
@click.option(
    "--cache", type=FILE, metavar="FOLDER", help="Feature cache.  [default: $DFZSL_CACHE or ~/.cache/dfzsl]"
)
def extract(
    data: str,
    root: str,
    output: Path,
    backbone: str,
    weights: str,
    precision: str,
    batch_size: int,
    workers: int,
    device: str,
    cache: Path | None,
) -> None:
    """Extract a data set's features into a file.

    DATA is a data set's config (dtd, awa2, ...), folder:PATH or csv:PATH; `features:FILE` then replaces it.
    The feature cache keeps finished parts, so the same command resumes. The ranks of torchrun share the
    images (torchrun ... -m dfzsl extract).

    \b
    Example:
      dfzsl extract dtd --root data --backbone ViT-B-16 --output dtd.safetensors
    """
    from dfzsl.datasets.extract import extract as extract_features
    from dfzsl.datasets.extract import open_dataset
    from dfzsl.trainers.clip.loading import load_backbone
    from dfzsl.utils import distributed

    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: the name of a feature file must end in .safetensors")
    dataset = open_dataset(data, root)
    with distributed.process_group():  # only rank 0 prints
        device = resolve_device(device)
        encoder = load_backbone(backbone, weights, device, precision)
        extract_features(dataset, encoder, output, batch_size, workers, device, cache)
        click.echo(f"{output}: {len(dataset.test)} test images, {len(dataset.all_classnames)} classes")
