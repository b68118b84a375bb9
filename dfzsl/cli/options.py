"""Provide the options, parameter types and command classes that several commands share."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from dfzsl.utils.errors import UserError

FILE = click.Path(path_type=Path)
OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
PLOT_SUFFIXES = (".png", ".pdf", ".svg", ".jpg")
KEY = re.compile(r"[A-Z]\w*(\.\w+)*")  # a config key, e.g. RECOVERY.THETA
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

new = click.option(
    "--new",
    required=True,
    metavar="NAMES",
    help="New classes: a file (one name per line, or a JSON list), or names separated by commas.",
)
text = click.option(
    "--text",
    default="",
    metavar="TEXT",
    help="Prompt of a class: a template with {}, 'ensemble' (CLIP's 80 templates), or a .json file of "
    'sentences, {"class name": ["...", ...]}.',
)
weights = click.option("--weights", default="", help="Pretrained tag or weights file of the backbone.")
classifier = click.option(
    "-c", "--classifier", type=FILE, default=Path("classifier.safetensors"), show_default=True
)
batch_size = click.option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="N",
    default=64,
    show_default=True,
    help="Images per batch.",
)
workers = click.option(
    "--workers",
    type=click.IntRange(0),
    metavar="N",
    default=os.cpu_count(),
    show_default="all cores",
    help="Processes that decode images.",
)
device = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
seed = click.option("--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", default=1, show_default=True)


def resolve_device(name: str) -> str:
    """Return the torch device of this name; "auto" is a GPU if there is one.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: this machine has no such device") from None
    return name


def check_plot_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Check that matplotlib writes files of this suffix."""
    if value is not None and value.suffix not in PLOT_SUFFIXES:
        raise click.BadParameter(f"{value}: give a file that ends in {', '.join(PLOT_SUFFIXES)}", ctx, param)
    return value


class OrderedGroup(click.Group):
    """Group that lists its commands in the order of their definition."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class SettingsCommand(click.Command):
    """Command whose arguments end with KEY VALUE pairs of a config.

    A VALUE may begin with a dash (`DATASET.NUM_SHOTS -1`). Options may come before, between and after
    the pairs, and a mistyped option is an error.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        flags = {name for p in options for name in (*p.opts, *p.secondary_opts)}
        with_value = {name for p in options if not (p.is_flag or p.count) for name in p.opts}
        other_words: list[str] = []
        pairs: list[str] = []
        words = list(args)
        while words:
            word = words.pop(0)
            if word == "--":
                break
            if word in with_value:
                other_words += [word, *words[:1]]
                del words[:1]
            elif KEY.fullmatch(word) and words and words[0] not in flags:
                pairs += [word, words.pop(0)]
            else:
                other_words.append(word)
        # After "--" click parses no options.
        return super().parse_args(ctx, [*other_words, "--", *pairs, *words])
