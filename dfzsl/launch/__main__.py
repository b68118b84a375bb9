"""Whole protocols by one command: every method, every seed, both splits, then the table.

    python -m dfzsl.launch base2new --methods CoOp,DFZSL imagenet 1 2 3 OPTIM.MAX_EPOCH 10

Runs keep CoOp's folders, `OUTPUT/base2new/train_base/DATASET/shots_16/TRAINER/CONFIG/seed1`. A run that has
its results.json is finished and never done again; one that was interrupted goes on. Workers (local processes
or slurm jobs, both by submitit) take runs from the same list under a lock, so that several sweeps may share a
folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dfzsl.report.read_runs import PROTOCOLS
from dfzsl.utils.errors import cli

from .tables import show_ended


def shots(word: str) -> int:
    """A number of images, or -1 for all. Raises ValueError for another."""
    if (number := int(word)) < 1 and number != -1:
        raise ValueError
    return number


def numbers_of_shots(words: str) -> list[int]:
    return list(dict.fromkeys(map(shots, words.split(","))))


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m dfzsl.launch", description=__doc__.splitlines()[0])
    flags.add_argument("protocol", choices=PROTOCOLS)
    flags.add_argument(
        "--methods", default="", help="all, or TRAINER[@virtual or @CHECKOUT][:CONFIG][+VARIANT],..."
    )
    flags.add_argument(
        "--image-prompts",
        action="store_true",
        help="all means MaPLe and PromptSRC too, which cost a backward pass of the image encoder",
    )
    flags.add_argument("--root", default=os.environ.get("DATA", "data"), help="data folder (or env DATA)")
    flags.add_argument("--output", default="output", help="where all runs and tables go")
    flags.add_argument(
        "--shots",
        type=numbers_of_shots,
        metavar="N[,N...]",
        help="images a class for training; -1: all; unless given 16, for fewshot 1,2,4,8,16",
    )
    flags.add_argument(
        "--teacher-shots",
        type=shots,
        metavar="N",
        help="images a class for the owner; unless given all (-1), for fewshot as many as for the others",
    )
    flags.add_argument("--launcher", choices=("local", "slurm"), default="local")
    flags.add_argument("--workers", type=int, default=0, help="runs at a time; 0: as GPUs or cores allow")
    flags.add_argument(
        "--gpus-per-run", type=int, default=1, metavar="N", help="GPUs a run uses, by torchrun if several"
    )
    flags.add_argument(
        "--dry-run", action="store_true", help="check data, weights and output, list the runs and stop"
    )
    flags.add_argument(
        "words",
        nargs="*",
        metavar="DATASET [SEED...] [KEY VALUE...]",
        help="name, folder:PATH, csv:PATH, features:PATH, or all; seeds default to 1 2 3",
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_intermixed_args(argv)
    shown = show_ended(args)
    from .sweep import sweep

    sweep(args, shown)


if __name__ == "__main__":
    cli(main)
    sys.exit(0)
