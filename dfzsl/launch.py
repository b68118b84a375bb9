"""Whole protocols by one command: every method, every seed, both splits, then the table.

    python -m dfzsl.launch base2new --methods CoOp DFZSL -- imagenet 1 2 3

Runs keep CoOp's folders, `OUTPUT/base2new/train_base/DATASET/shots_16/TRAINER/CONFIG/seed1`. A run that has
its results.json is finished and never done again; one that was interrupted goes on. Workers (local processes
or slurm jobs, both by submitit) take runs from the same list under a lock, so that several sweeps may share a
folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from dassl.engine import TRAINER_REGISTRY
from filelock import FileLock, Timeout
from tqdm import tqdm

import dfzsl.configs
import dfzsl.trainers

from . import train
from .errors import UserError, unknown
from .results import RESULTS

CONFIGS = Path(dfzsl.configs.__file__).parent
FREE = ("ZeroshotCLIP", "TeacherZeroshot", "TextTeacherMix")
METHODS = (*FREE, "CoOp", "CoCoOp", "DFZSL")
XD_TARGETS = [
    "caltech101",
    "oxford_pets",
    "stanford_cars",
    "oxford_flowers",
    "food101",
    "fgvc_aircraft",
    "sun397",
    "dtd",
    "eurosat",
    "ucf101",
    "imagenetv2",
    "imagenet_sketch",
    "imagenet_a",
    "imagenet_r",
]


@dataclass(frozen=True)
class Data:
    """A data set as the command line names it: a config's name, or KIND:PATH for your own."""

    given: str
    root: str

    @property
    def name(self) -> str:
        """The folder name of its results."""
        kind, _, path = self.given.partition(":")
        return Path(path).stem if path else kind

    @property
    def config(self) -> Path:
        kind = self.given.partition(":")[0]
        path = CONFIGS / "datasets" / f"{kind}.yaml"
        if not path.exists():
            raise unknown("data set", kind, (p.stem for p in path.parent.glob("*.yaml")))
        return path

    def arguments(self) -> list[str]:
        path = self.given.partition(":")[2]
        if path and not Path(path).exists():
            raise UserError(f"{self.given}: {path} does not exist")
        return ["--dataset-config-file", str(self.config), "--root", path or self.root]

    def overrides(self) -> list[str]:
        """The backbone of a data set that brings its own stands above the trainer's."""
        model = (yaml.safe_load(self.config.read_text()) or {}).get("MODEL", {})
        backbone = model.get("BACKBONE", {})
        return [word for key, value in backbone.items() for word in (f"MODEL.BACKBONE.{key}", value)]


@dataclass(frozen=True)
class Protocol:
    """What to train on and what to test on; `tests` of None means the other data sets, for `xd`."""

    train: str
    tests: tuple[str, ...]
    default: str


PROTOCOLS = {
    "base2new": Protocol(train="base", tests=("new",), default="shapes"),
    "gzsl": Protocol(train="base", tests=("all",), default="shapes"),
    "xd": Protocol(train="all", tests=(), default="imagenet"),
}


@dataclass(frozen=True)
class Job:
    """One method on one data set with one seed: train and test, then test on the other classes."""

    protocol: str
    method: str
    data: Data
    seed: int
    shots: int
    teacher_shots: int
    output: Path
    config: str = ""
    opts: tuple[str, ...] = ()

    @property
    def trainer(self) -> type:
        return TRAINER_REGISTRY.get(self.trainer_name)

    @property
    def trainer_name(self) -> str:
        return self.method.partition("@")[0]

    @property
    def data_free(self) -> bool:
        """DFZSL and the text/teacher mix by nature, others (CoOp@virtual) by the method's suffix."""
        return self.trainer.needs_teacher or self.method.endswith("@virtual")

    @property
    def config_file(self) -> Path | None:
        folder = CONFIGS / "trainers" / self.trainer_name
        for name in (self.config, self.data.given.partition(":")[0], self.trainer.recipe):
            if name and (folder / f"{name}.yaml").exists():
                return folder / f"{name}.yaml"
            if name and name == self.config:
                raise unknown(f"config of {self.trainer_name}", name, (p.stem for p in folder.glob("*.yaml")))
        return None

    def folder(self, part: str, data: Data | None = None) -> Path:
        """The output folder of one part (`train_base`, `test_new`), laid out as CoOp lays it out."""
        shots = self.teacher_shots if self.data_free or self.method == "TeacherZeroshot" else self.shots
        config = self.config_file.stem if self.config_file else "default"
        name = (data or self.data).name
        return (
            self.output
            / self.protocol
            / part
            / name
            / f"shots_{shots if shots > 0 else 'all'}"
            / self.method
            / config
            / f"seed{self.seed}"
        )

    @property
    def teacher(self) -> Job:
        """The owner's job that writes the teacher this one reads."""
        return replace(self, method="TeacherZeroshot", config="", opts=())

    def arguments(self, part: str, classes: str, data: Data | None = None) -> list[str]:
        """The train.py command line of one part."""
        data = data or self.data
        shots = self.teacher_shots if self.method == "TeacherZeroshot" else self.shots
        words = ["--trainer", self.trainer_name, "--seed", str(self.seed), *data.arguments()]
        words += ["--output-dir", str(self.folder(part, data))]
        if self.config_file:
            words += ["--config-file", str(self.config_file)]
        trained = self.folder(f"train_{PROTOCOLS[self.protocol].train}")
        if part.startswith("test") or not self.trainer.trains:
            words += ["--eval-only"]
            if self.trainer.trains:
                words += ["--model-dir", str(trained)]
        words += ["DATASET.SUBSAMPLE_CLASSES", classes, "DATASET.NUM_SHOTS", str(shots), *data.overrides()]
        if self.data_free:
            owner = self.teacher.folder(f"train_{PROTOCOLS[self.protocol].train}")
            words += ["TEACHER.FILE", str(owner / "teacher.safetensors")]
        return words + list(self.opts)

    def parts(self) -> list[tuple[Path, list[str]]]:
        """(output folder, train.py arguments) of every part, in order."""
        protocol = PROTOCOLS[self.protocol]
        wanted = [(f"train_{protocol.train}", protocol.train, self.data)]
        wanted += [(f"test_{classes}", classes, self.data) for classes in protocol.tests]
        if not protocol.tests:
            wanted += [("test_all", "all", Data(name, self.data.root)) for name in XD_TARGETS]
        return [
            (self.folder(part, data), self.arguments(part, classes, data)) for part, classes, data in wanted
        ]

    @property
    def finished(self) -> bool:
        return all((folder / RESULTS).exists() for folder, _ in self.parts())

    def run(self) -> None:
        """Run what is not finished. A teacher that is missing is made first."""
        if self.data_free:
            with self.teacher.locked(wait=True):
                self.teacher.run()
        for folder, arguments in self.parts():
            if not (folder / RESULTS).exists():
                with _own_console():
                    train.main(arguments)

    @contextlib.contextmanager
    def locked(self, wait: bool = False) -> Iterator[bool]:
        """Hold this job against other workers and sweeps; yields whether it was free."""
        folder = self.parts()[0][0]
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @property
    def failure(self) -> Path:
        return self.parts()[0][0] / "failed.txt"


@contextlib.contextmanager
def _own_console() -> Iterator[None]:
    """Dassl's logger replaces sys.stdout; a run inside a worker gives it back, and talks to its log alone."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def work(jobs: Sequence[Job], threads: int) -> None:
    """One worker: take each job that nobody has taken, run it, note what failed and go on.

    A second round waits for those that others had taken, and takes over what they left unfinished.
    """
    torch.set_num_threads(threads)
    for wait in (False, True):
        for job in jobs:
            with job.locked(wait) as free:
                if not free or job.finished or (wait and job.failure.exists()):
                    continue
                job.failure.unlink(missing_ok=True)
                try:
                    job.run()
                except Exception as error:
                    said = train.explain(error) or f"{type(error).__name__}: {error}"
                    job.failure.write_text(said + "\n", encoding="utf-8")


def launch(jobs: list[Job], launcher: str, workers: int, output: Path) -> None:
    """Run the jobs on `workers` processes and show their progress. Failures are in each job's failed.txt."""
    import submitit

    open_jobs = [job for job in jobs if not job.finished]
    if not open_jobs:
        return
    workers = min(workers, len(open_jobs))
    executor = submitit.AutoExecutor(folder=output / ".workers", cluster=launcher)
    threads = max(1, (os.cpu_count() or 1) // workers)
    executor.update_parameters(timeout_min=7 * 24 * 60, cpus_per_task=threads)
    if torch.cuda.is_available():
        executor.update_parameters(gpus_per_node=1)
    tasks = [executor.submit(work, open_jobs, threads) for _ in range(workers)]
    try:
        with tqdm(total=len(open_jobs), desc="runs", unit="run") as bar:
            while not all(task.done() for task in tasks):
                time.sleep(0.5)
                bar.update(sum(job.finished or job.failure.exists() for job in open_jobs) - bar.n)
            bar.update(sum(job.finished or job.failure.exists() for job in open_jobs) - bar.n)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
    for task in tasks:
        task.result()


def plan(args: argparse.Namespace) -> list[Job]:
    """The jobs a command line asks for. Raises UserError for what is unknown."""
    protocol = PROTOCOLS[args.protocol]
    names = list(TRAINER_REGISTRY.registered_names())
    lowered = {name.lower(): name for name in names}
    methods = []
    for method in args.methods:
        name, at, suffix = method.partition("@")
        if name == "all":
            methods += [n for n in names if TRAINER_REGISTRY.get(n).__module__.startswith("dfzsl.trainers")]
            continue
        if name.lower() not in lowered or suffix not in ("", "virtual"):
            raise unknown("method", method, [*names, *(f"{n}@virtual" for n in ("CoOp", "FLPT"))])
        methods.append(lowered[name.lower()] + at + suffix)
    words = args.dataset or [protocol.default]
    given, seeds = words[0], words[1:] or ["1", "2", "3"]
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"seeds are whole numbers, not {' '.join(seeds)}; usage: DATASET [SEED...]")
    sets = [Data(name, args.root) for name in ([given] if given != "all" else [*XD_TARGETS[:10], "imagenet"])]
    jobs = [
        Job(
            args.protocol,
            method,
            data,
            int(seed),
            args.shots,
            args.teacher_shots,
            Path(args.output),
            args.config,
            tuple(args.opts),
        )
        for data in sets
        for seed in seeds
        for method in dict.fromkeys(methods)
    ]
    for job in jobs:
        job.parts()
    return jobs


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m dfzsl.launch", description=__doc__.splitlines()[0])
    flags.add_argument("protocol", choices=PROTOCOLS)
    flags.add_argument(
        "--methods", nargs="+", default=[*FREE, "DFZSL"], help="trainers, TRAINER@virtual, or all"
    )
    flags.add_argument("--root", default=os.environ.get("DATA", "data"), help="data folder (or env DATA)")
    flags.add_argument("--output", default="output", help="where all runs and tables go")
    flags.add_argument(
        "--shots", type=int, default=16, help="images a class for methods that train on images"
    )
    flags.add_argument("--teacher-shots", type=int, default=-1, help="images a class for the owner; -1: all")
    flags.add_argument("--config", default="", help="config in configs/trainers/TRAINER/, without .yaml")
    flags.add_argument("--launcher", choices=("local", "slurm"), default="local")
    flags.add_argument(
        "--workers", type=int, default=0, help="processes at once; 0: one a GPU, else one a core"
    )
    flags.add_argument("--dry-run", action="store_true", help="list the runs and stop")
    flags.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="config overrides for all runs"
    )
    flags.add_argument(
        "dataset",
        nargs="*",
        metavar="DATASET [SEED...]",
        help="name, folder:PATH, csv:PATH, features:PATH, or all; seeds default to 1 2 3",
    )
    return flags


def main() -> None:
    args = parser().parse_args()
    if not args.dataset and args.protocol == "base2new":
        args.methods = list(METHODS)
    jobs = plan(args)
    todo = [job for job in jobs if not job.finished]
    print(f"{len(jobs)} runs ({len(jobs) - len(todo)} finished already) into {args.output}/{args.protocol}")
    if args.dry_run:
        for job in todo:
            for _, arguments in job.parts():
                print("python train.py", " ".join(arguments))
        return
    workers = args.workers or torch.cuda.device_count() or os.cpu_count() or 1
    launch(jobs, args.launcher, workers, Path(args.output))
    from . import report

    report.show(Path(args.output) / args.protocol)
    failed = [job for job in jobs if not job.finished]
    if failed:
        first = failed[0].failure.read_text().strip() if failed[0].failure.exists() else "interrupted"
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed; the first, {failed[0].method}: {first}")


if __name__ == "__main__":
    train.cli(main)
    sys.exit(0)
