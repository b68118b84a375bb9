"""A sweep: the runs that a command line asks for, what is looked at before the first, and all of them."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import signal
from dataclasses import replace
from pathlib import Path

from dassl.engine import TRAINER_REGISTRY

from dfzsl import train
from dfzsl.trainers.base import CLIPTrainer
from dfzsl.utils.errors import UserError, one_line

from . import tables
from .checkouts import Checkout
from .forecast import forecast
from .preflight import check, check_locks
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


def sweep(args: argparse.Namespace, shown: bool) -> None:
    """Do the runs that are not finished and show the tables, unless they have been `shown` and all are."""
    output, gpus = Path(args.output), args.gpus_per_run
    jobs = plan(args)
    check(jobs)
    todo = [job for job in jobs if not job.finished]
    if shown:
        print("others" if todo else "the same")
        if not todo:
            return
    workers = args.workers or len(gpu_shares(gpus)) or (1 if gpus > 1 else os.cpu_count() or 1)
    if workers > 1 and len(todo) > 1:
        check_locks(output)
    print(tables.count(len(jobs), len(jobs) - len(todo), output / args.protocol))
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
        launch(jobs, args.launcher, workers, gpus, output)
    if any(job.finished for job in jobs):
        tables.show(output / args.protocol)
    failed = [job for job in jobs if not job.finished]
    if failed:
        note = failed[0].failure
        first = note.read_text(encoding="utf-8").strip() if note.exists() else "interrupted"
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs failed; the first, {failed[0].method.name}: {first}"
        )
    tables.note_ended(args, [[folder for folder, _ in job.parts()] for job in jobs])
