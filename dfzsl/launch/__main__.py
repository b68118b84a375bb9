"""Whole protocols by one command: every method, every seed, both splits, then the table.

    python -m dfzsl.launch base2new --methods CoOp,DFZSL imagenet 1 2 3 OPTIM.MAX_EPOCH 10

Runs keep CoOp's folders, `OUTPUT/base2new/train_base/DATASET/shots_16/TRAINER/CONFIG/seed1`. A run that has
its results.json is finished and never done again; one that was interrupted goes on. Workers (local processes
or slurm jobs, both by submitit) take runs from the same list under a lock, so that several sweeps may share a
folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..imports import importing

with importing():
    from dassl.engine import TRAINER_REGISTRY

    from dfzsl.trainers.base import CLIPTrainer

    from .. import report, train
    from ..errors import UserError, one_line
    from ..results import RESULTS
    from .checkouts import Checkout
    from .checks import check, check_locks
    from .forecast import forecast
    from .runs import DEFAULT_SEEDS, FREE, METHODS, OWNER, PROTOCOLS, TARGETS, Data, Job, Method
    from .workers import gpu_shares, launch


def choose(given: str, image_prompts: bool = False) -> list[Method | Checkout]:
    """The methods that `--methods` names, the owner first: others wait for its teacher. "all" has those that
    learn inside the image encoder only with `image_prompts`."""
    found: list[Method | Checkout] = []
    for word in given.split(","):
        if word == "all":
            registered = map(Method, TRAINER_REGISTRY.registered_names())
            ours = [method for method in registered if issubclass(method.type, CLIPTrainer)]
            found += [method for method in ours if image_prompts or not method.type.image_prompts]
        elif checkout := Checkout.parse(word):
            found.append(checkout)
        else:
            method = Method.parse(word.removesuffix("+all"))
            variants = method.variants if word.endswith("+all") else [method.variant]
            found += [replace(method, variant=variant) for variant in variants]
    return sorted(dict.fromkeys(found), key=lambda method: method.trainer != OWNER)


def plan(args: argparse.Namespace) -> list[Job]:
    """The jobs a command line asks for. Raises UserError for what is unknown."""
    given, *rest = args.words or [PROTOCOLS[args.protocol].default]
    seeds = list(itertools.takewhile(str.isdecimal, rest))
    opts = rest[len(seeds) :]
    if len(opts) % 2 or not all(map(re.compile(r"[A-Z]\w*(\.\w+)*").fullmatch, opts[::2])):
        raise UserError(f"after DATASET and seeds (numbers) come KEY VALUE pairs, not {' '.join(opts)}")
    chosen = args.methods or ",".join([*FREE, "DFZSL"] if args.words else METHODS)
    methods = choose(chosen, args.image_prompts)
    names = ["imagenet", *TARGETS] if given == "all" else [given]
    protocol = PROTOCOLS[args.protocol]
    if protocol.targets:
        # A test's folder names the data set it tests on, and cannot tell two training sets apart.
        folders = Path(args.output, args.protocol).glob("train_*/*")
        trained = {*(path.name for path in folders), *(Data(name, args.root).name for name in names)}
        if len(trained) > 1:
            raise UserError(
                f"one --output holds {args.protocol} runs from one data set, not from "
                f"{', '.join(sorted(trained))}; choose another --output"
            )
    if (few := args.protocol == "fewshot") and args.teacher_shots:
        raise UserError("fewshot gives the owner as many images as all others: leave --teacher-shots out")
    asked = [
        Job(
            protocol=args.protocol,
            method=method,
            data=Data(name, args.root),
            seed=seed,
            shots=shots,
            teacher_shots=shots if few else args.teacher_shots or -1,
            output=Path(args.output),
            opts=tuple(opts),
        )
        for name in names
        for shots in args.shots or protocol.shots
        for seed in dict.fromkeys(map(int, seeds or DEFAULT_SEEDS))
        for method in methods
    ]
    # What sees no image is the same run whatever the number of images.
    jobs = list({job.parts()[0][0]: job for job in asked}.values())
    for job in jobs:
        job.check()
        first = (job.data, job.seed) == (jobs[0].data, jobs[0].seed)  # KEY VALUE are the same for all others
        if first and isinstance(job.method, Method):  # what a checkout knows only it can say
            train.setup_cfg(train.parser().parse_args(job.parts()[0][1]))
    return jobs


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


def show(folder: Path) -> None:
    """Print the tables of a protocol's folder, and write its page where matplotlib is there to draw it and
    some results are newer."""
    parts = report.sections(report.collect(folder))
    report.show(parts)
    if importlib.util.find_spec("matplotlib"):
        page = folder / "report.html"
        made = page.stat().st_mtime_ns if page.exists() else 0
        if any(path.stat().st_mtime_ns >= made for path in folder.rglob(RESULTS)):
            from ..report.page import write_page

            write_page(page, parts)
        print(f"The same with pictures: {page}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_intermixed_args(argv)
    jobs = plan(args)
    check(jobs)
    todo = [job for job in jobs if not job.finished]
    gpus = args.gpus_per_run
    workers = args.workers or len(gpu_shares(gpus)) or (1 if gpus > 1 else os.cpu_count() or 1)
    if workers > 1 and len(todo) > 1:
        check_locks(Path(args.output))
    print(f"{len(jobs)} runs ({len(jobs) - len(todo)} finished already) into {args.output}/{args.protocol}")
    if todo:
        print(forecast(todo, min(workers, len(todo))))
    if args.dry_run:
        for job in todo:
            for _, arguments in job.parts():
                there = (
                    f"cd {shlex.quote(str(job.method.folder))} && "
                    if isinstance(job.method, Checkout)
                    else ""
                )
                print(one_line(f"{there}python train.py {shlex.join(arguments)}"))
        return
    # Either signal ends the workers too; a sweep in the background of a script would ignore the first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if todo:
        launch(jobs, args.launcher, workers, gpus, Path(args.output))
    if any(job.finished for job in jobs):
        show(Path(args.output) / args.protocol)
    failed = [job for job in jobs if not job.finished]
    if failed:
        note = failed[0].failure
        first = note.read_text(encoding="utf-8").strip() if note.exists() else "interrupted"
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs failed; the first, {failed[0].method.name}: {first}"
        )


if __name__ == "__main__":
    train.cli(main)
    sys.exit(0)
