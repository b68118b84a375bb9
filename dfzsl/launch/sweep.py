"""Plan a sweep, check it before the first run, and run it.

Runs keep CoOp's folders, `OUTPUT/base2new/train_base/DATASET/shots_16/TRAINER/CONFIG/seed1`. A run with
results.json is finished and never repeated; an interrupted one resumes. Workers (local processes or slurm
jobs, both by submitit) take runs from one list under a lock, so that several sweeps may share a folder.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dassl.engine import TRAINER_REGISTRY

from dfzsl import report, train
from dfzsl.io.results import RESULTS
from dfzsl.trainers.base import CLIPTrainer
from dfzsl.utils.errors import UserError, one_line

from .checkouts import Checkout
from .forecast import forecast
from .preflight import check, check_locks
from .runs import (
    BASELINE_TRAINERS,
    DEFAULT_METHODS,
    DEFAULT_SEEDS,
    OWNER_TRAINER,
    PROTOCOLS,
    TRANSFER_DATASETS,
    Data,
    Job,
    Method,
)
from .workers import gpu_shares, launch

KEY = re.compile(r"[A-Z]\w*(\.\w+)*")  # key of a config, e.g. RECOVERY.THETA


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep.

    Attributes:
        protocol: name in `PROTOCOLS`.
        dataset: name, folder:PATH, csv:PATH, features:PATH, or all; "": the protocol's default.
        seeds: one run per seed; by default 1, 2 and 3.
        settings: KEY, VALUE, ... for the config of every run.
        methods: comma-separated `TRAINER[@virtual or @CHECKOUT][:CONFIG][+VARIANT]`, or all; "": DFZSL and
            the baselines without prompt training; without a data set also CoOp and CoCoOp.
        image_prompts: whether all includes the methods that learn inside the image encoder.
        root: data folder.
        output: folder of all results and tables.
        shots: training images per class, -1 for all; by default those of the protocol.
        teacher_shots: the owner's images per class, -1 for all; by default all, and for fewshot as many as
            `shots`.
        launcher: local or slurm.
        workers: number of runs at a time; 0: as GPUs or cores allow.
        gpus_per_run: GPUs of a run, by torchrun if several.
    """

    protocol: str
    dataset: str = ""
    seeds: tuple[int, ...] = ()
    settings: tuple[str, ...] = ()
    methods: str = ""
    image_prompts: bool = False
    root: str = "data"
    output: Path = Path("output")
    shots: tuple[int, ...] = ()
    teacher_shots: int | None = None
    launcher: str = "local"
    workers: int = 0
    gpus_per_run: int = 1


def choose(text: str, image_prompts: bool = False) -> list[Method | Checkout]:
    """Parse `--methods`. The owner comes first, because data-free methods need its teacher.

    Args:
        text: `SweepOptions.methods`.
        image_prompts: whether all includes the methods that learn inside the image encoder.

    Raises:
        UserError: a method or variant is unknown.
    """
    methods: list[Method | Checkout] = []
    for word in text.split(","):
        if word == "all":
            registered = map(Method, TRAINER_REGISTRY.registered_names())
            supported = [method for method in registered if issubclass(method.type, CLIPTrainer)]
            methods += [method for method in supported if image_prompts or not method.type.image_prompts]
        elif checkout := Checkout.parse(word):
            methods.append(checkout)
        else:
            method = Method.parse(word.removesuffix("+all"))
            variants = method.variants if word.endswith("+all") else [method.variant]
            methods += [replace(method, variant=variant) for variant in variants]
    return sorted(dict.fromkeys(methods), key=lambda method: method.trainer != OWNER_TRAINER)


def plan(options: SweepOptions) -> list[Job]:
    """Return the jobs of a sweep.

    Raises:
        UserError: a method, data set or setting is unknown, or the output folder holds other runs.
    """
    settings, protocol = options.settings, PROTOCOLS[options.protocol]
    if len(settings) % 2 or not all(map(KEY.fullmatch, settings[::2])):
        raise UserError(f"after DATASET and seeds, give KEY VALUE pairs, not {' '.join(settings)}")
    chosen = options.methods or ",".join(
        [*BASELINE_TRAINERS, "DFZSL"] if options.dataset else DEFAULT_METHODS
    )
    methods = choose(chosen, options.image_prompts)
    dataset = options.dataset or protocol.default
    names = ["imagenet", *TRANSFER_DATASETS] if dataset == "all" else [dataset]
    if protocol.targets:
        # The folder of a test contains the name of its target, not that of the training data set.
        folders = Path(options.output, options.protocol).glob("train_*/*")
        sources = {*(path.name for path in folders), *(Data(name, options.root).name for name in names)}
        if len(sources) > 1:
            raise UserError(
                f"one --output holds {options.protocol} runs from one data set, not from "
                f"{', '.join(sorted(sources))}; choose another --output"
            )
    is_fewshot = options.protocol == "fewshot"
    if is_fewshot and options.teacher_shots:
        raise UserError(
            "fewshot trains the teacher on the same number of images as other methods: remove --teacher-shots"
        )
    requested = [
        Job(
            protocol=options.protocol,
            method=method,
            data=Data(name, options.root),
            seed=seed,
            shots=shots,
            teacher_shots=shots if is_fewshot else options.teacher_shots or -1,
            output=options.output,
            opts=settings,
        )
        for name in names
        for shots in options.shots or protocol.shots
        for seed in dict.fromkeys(options.seeds or map(int, DEFAULT_SEEDS))
        for method in methods
    ]
    # A method without images has the same folder, and so one run, for every number of shots.
    jobs = list({job.parts()[0][0]: job for job in requested}.values())
    for job in jobs:
        job.check()
        first = (job.data, job.seed) == (
            jobs[0].data,
            jobs[0].seed,
        )  # the settings of the others are the same
        if first and isinstance(job.method, Method):  # only a checkout itself knows its keys
            train.setup_cfg(train.parser().parse_args(job.parts()[0][1]))
    return jobs


@dataclass(frozen=True)
class Sweep:
    """Jobs that passed the checks before the first run.

    Attributes:
        options: options of the sweep.
        jobs: all jobs, finished or not.
    """

    options: SweepOptions
    jobs: list[Job]

    @classmethod
    def checked(cls, options: SweepOptions) -> Sweep:
        """Plan a sweep and check its data, weights and output folder.

        Raises:
            UserError: something would end a run, or the output folder holds runs on other data.
        """
        sweep = cls(options, plan(options))
        check(sweep.jobs)
        if sweep.workers > 1 and len(sweep.unfinished) > 1:
            check_locks(options.output)
        return sweep

    @property
    def folder(self) -> Path:
        return self.options.output / self.options.protocol

    @property
    def unfinished(self) -> list[Job]:
        return [job for job in self.jobs if not job.finished]

    @property
    def workers(self) -> int:
        """Number of runs at a time."""
        gpus = self.options.gpus_per_run
        return self.options.workers or len(gpu_shares(gpus)) or (1 if gpus > 1 else os.cpu_count() or 1)

    def summary(self) -> str:
        """Return the number of runs, and for those that are not finished a forecast of their time."""
        total, todo = len(self.jobs), self.unfinished
        lines = [f"{total} runs ({total - len(todo)} finished already) into {self.folder}"]
        if todo:
            lines.append(forecast(todo, min(self.workers, len(todo))))
        return "\n".join(lines)

    def command_lines(self) -> Iterator[str]:
        """Yield the command line of every part of the runs that are not finished."""
        for job in self.unfinished:
            folder = (
                f"cd {shlex.quote(str(job.method.folder))} && " if isinstance(job.method, Checkout) else ""
            )
            for _, arguments in job.parts():
                yield one_line(f"{folder}python train.py {shlex.join(arguments)}")

    def run(self) -> None:
        """Run the jobs that are not finished; `raise_failures` reports failures."""
        if self.unfinished:
            options = self.options
            launch(self.jobs, options.launcher, self.workers, options.gpus_per_run, options.output)

    def has_results(self) -> bool:
        return any(job.finished for job in self.jobs)

    def sections(self) -> list[report.Section]:
        """Return the tables of all results in the protocol's folder."""
        return report.sections(report.collect(self.folder))

    def write_page(self, sections: Sequence[report.Section]) -> Path:
        """Write the tables as an HTML page, unless the page is newer than all results; return its path."""
        page = self.folder / "report.html"
        written = page.stat().st_mtime_ns if page.exists() else 0
        if any(path.stat().st_mtime_ns >= written for path in self.folder.rglob(RESULTS)):
            # matplotlib takes long to import.
            from dfzsl.report.page import write_page

            write_page(page, sections)
        return page

    def raise_failures(self) -> None:
        """Raise UserError if a run is not finished, with the message of the first."""
        if failed := self.unfinished:
            note = failed[0].failure
            message = note.read_text(encoding="utf-8").strip() if note.exists() else "interrupted"
            raise UserError(
                f"{len(failed)} of {len(self.jobs)} runs failed; "
                f"the first, {failed[0].method.name}: {message}"
            )
