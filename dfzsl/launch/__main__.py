"""Whole protocols by one command: every method, every seed, both splits, then the table.

    python -m dfzsl.launch base2new --methods CoOp,DFZSL imagenet 1 2 3 OPTIM.MAX_EPOCH 10

Runs keep CoOp's folders, `OUTPUT/base2new/train_base/DATASET/shots_16/TRAINER/CONFIG/seed1`. A run that has
its results.json is finished and never done again; one that was interrupted goes on. Workers (local processes
or slurm jobs, both by submitit) take runs from the same list under a lock, so that several sweeps may share a
folder.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.util
import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from dassl.engine import TRAINER_REGISTRY
from filelock import FileLock, Timeout
from tabulate import tabulate
from tqdm import tqdm

import dfzsl.configs
from dfzsl.trainers.base import CLIPTrainer

from .. import train
from ..errors import UserError, unknown
from ..files import atomic
from ..results import RESULTS, read_results

CONFIGS = Path(dfzsl.configs.__file__).parent
OWNER = "TeacherZeroshot"
FREE = ("ZeroshotCLIP", OWNER, "TextTeacherMix")
METHODS = (*FREE, "CoOp", "CoCoOp", "DFZSL")
DEFAULT_SEEDS = ("1", "2", "3")
TARGETS = ["caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101"]
TARGETS += ["fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"]
XD_TARGETS = (*TARGETS, "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")


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
        model = (yaml.safe_load(self.config.read_text(encoding="utf-8")) or {}).get("MODEL", {})
        backbone = model.get("BACKBONE", {})
        return [word for key, value in backbone.items() for word in (f"MODEL.BACKBONE.{key}", value)]


@dataclass(frozen=True)
class Protocol:
    """What to train on and what to test on; no `tests`: on the other data sets, as `xd` does."""

    train: str
    tests: tuple[str, ...]
    default: str


PROTOCOLS = {
    "base2new": Protocol(train="base", tests=("new",), default="shapes"),
    "gzsl": Protocol(train="base", tests=("all",), default="shapes"),
    "xd": Protocol(train="all", tests=(), default="imagenet"),
}


@dataclass(frozen=True)
class Method:
    """A trainer, its source of features and its config: `TRAINER[@virtual][:CONFIG][+VARIANT]`.

    Variants are changes to the config, listed in configs/ablations.yaml.
    """

    trainer: str
    virtual: bool = False
    config: str = ""
    variant: str = ""

    @classmethod
    def parse(cls, given: str) -> Method:
        """Raises UserError for an unknown trainer or variant, listing the known ones."""
        name, _, variant = given.partition("+")
        name, _, config = name.partition(":")
        name, _, source = name.partition("@")
        known = {known.lower(): known for known in TRAINER_REGISTRY.registered_names()}
        if name.lower() not in known or source not in ("", "virtual"):
            raise unknown("method", given, [*known.values(), "CoOp@virtual"])
        method = cls(known[name.lower()], bool(source), config, variant)
        if variant and variant not in method.variants:
            raise unknown(f"variant of {method.trainer}", variant, method.variants)
        return method

    @property
    def variants(self) -> dict[str, list]:
        return yaml.safe_load((CONFIGS / "ablations.yaml").read_text(encoding="utf-8")).get(self.trainer, {})

    @property
    def name(self) -> str:
        """The folder name of its results."""
        return f"{self.trainer}@virtual" if self.virtual else self.trainer

    @property
    def type(self) -> type[CLIPTrainer]:
        return TRAINER_REGISTRY.get(self.trainer)

    @property
    def data_free(self) -> bool:
        return self.virtual or self.type.needs_teacher


@dataclass(frozen=True)
class Job:
    """One method on one data set with one seed: train and test, then test on the other classes."""

    protocol: str
    method: Method
    data: Data
    seed: int
    shots: int
    teacher_shots: int
    output: Path
    opts: tuple[str, ...] = ()

    @property
    def config_file(self) -> Path | None:
        """The method's config: the one it names, else the data set's own, else the trainer's recipe.

        A config that is a folder holds one file for each data set.
        """
        folder, kind = CONFIGS / "trainers" / self.method.trainer, self.data.given.partition(":")[0]
        named = self.method.config
        wanted = [f"{named}/{kind}", named] if named else [kind, self.method.type.recipe]
        for name in wanted:
            if (path := folder / f"{name}.yaml").is_file():
                return path
        if named:
            known = {p.relative_to(folder).parts[0].removesuffix(".yaml") for p in folder.rglob("*.yaml")}
            raise unknown(f"config of {self.method.trainer} for {kind}", named, known)
        return None

    def folder(self, part: str, data: Data | None = None) -> Path:
        """The output folder of one part (`train_base`, `test_new`), laid out as CoOp lays it out."""
        config = self.method.config or (self.config_file.stem if self.config_file else "default")
        if self.method.variant:
            config += f"+{self.method.variant}"
        name = (data or self.data).name
        return (
            self.output
            / self.protocol
            / part
            / name
            / f"shots_{'all' if self.shots_seen < 0 else self.shots_seen}"
            / self.method.name
            / config
            / f"seed{self.seed}"
        )

    @property
    def shots_seen(self) -> int:
        """Images a class behind this job: the teacher's where it learns from the teacher. -1: all."""
        if self.method.trainer == OWNER or self.method.data_free:
            return self.teacher_shots
        return self.shots if self.method.type.trains else 0

    @property
    def teacher(self) -> Job:
        """The owner's job that writes the teacher this one reads."""
        return replace(self, method=Method(OWNER))

    def arguments(self, part: str, classes: str, data: Data | None = None) -> list[str]:
        """The train.py command line of one part."""
        data = data or self.data
        words = ["--trainer", self.method.trainer, "--seed", str(self.seed), *data.arguments()]
        words += ["--output-dir", str(self.folder(part, data))]
        if self.config_file:
            words += ["--config-file", str(self.config_file)]
        trained = self.folder(f"train_{PROTOCOLS[self.protocol].train}")
        if part.startswith("test") or not self.method.type.trains:
            words += ["--eval-only"]
            if self.method.type.trains:
                words += ["--model-dir", str(trained)]
        words += [
            "DATASET.SUBSAMPLE_CLASSES",
            classes,
            "DATASET.NUM_SHOTS",
            str(self.shots_seen),
            *data.overrides(),
        ]
        if self.method.data_free:
            owner = self.teacher.folder(f"train_{PROTOCOLS[self.protocol].train}")
            words += ["TEACHER.FILE", str(owner / "teacher.safetensors")]
        words += map(str, self.method.variants.get(self.method.variant, []))
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

    def run(self, gpus: int = 1) -> None:
        """Run what is not finished, each part on `gpus` GPUs. A teacher that is missing is made first."""
        if self.method.data_free:
            with self.teacher.locked(wait=True):
                self.teacher.run(gpus)
        for folder, arguments in self.parts():
            if not (folder / RESULTS).exists():
                # Before the results: a folder that holds these must say what they were made with.
                with self._claimed():
                    if gpus > 1:
                        _torchrun(gpus, arguments)
                    else:
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
    def settings(self) -> Path:
        """The KEY VALUE pairs of what has been run here: no folder's name tells them."""
        return self.parts()[0][0] / "settings.txt"

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """Write `settings`, and take them back if nothing comes of them but an error."""
        was_there = self.settings.exists()
        with atomic(self.settings) as temporary:
            temporary.write_text(" ".join(self.opts), encoding="utf-8")
        try:
            yield
        except Exception:
            if not was_there:
                self.settings.unlink()
            raise

    def check(self) -> None:
        """Raises UserError for what is unknown, where the folder holds this job with other settings, and for
        results that cannot be read."""
        for folder, _ in self.parts():
            if (folder / RESULTS).exists():
                read_results(folder / RESULTS)
        if self.settings.exists():
            was, now = self.settings.read_text(encoding="utf-8"), " ".join(self.opts)
            if was != now:
                was, now = (f"with settings '{opts}'" if opts else "without settings" for opts in (was, now))
                raise UserError(f"{self.settings.parent} was run {was}, not {now}; choose another --output")

    @property
    def failure(self) -> Path:
        return self.parts()[0][0] / "failed.txt"


@contextlib.contextmanager
def _own_console() -> Iterator[None]:
    """Dassl's logger replaces sys.stdout; a run inside a worker gives it back, and talks to its log alone."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _torchrun(gpus: int, arguments: list[str]) -> None:
    """train.py on several GPUs of this machine. Raises UserError with the last that it said if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    process = subprocess.Popen(
        [*command, "-m", "dfzsl.train", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        _, said = process.communicate()
    except BaseException:
        process.terminate()  # and its ranks: it passes the signal on
        process.wait()
        raise
    if process.returncode:
        # The first rank's word, or the end of its traceback; behind it come the other ranks' and torchrun's.
        told = re.search(r"^(?:error: |\[rank\d+\]: (?=[\w.]+: ))(.+)", said, re.MULTILINE)
        raise UserError(
            told[1] if told else f"a process died without a word (torchrun: {process.returncode})"
        )


def work(jobs: Sequence[Job], threads: int, gpus: int = 1, visible: str | None = None) -> None:
    """One worker: take each job that nobody has taken, run it, note what failed and go on.

    A second round waits for those that others had taken, and takes over what they left unfinished. Each run
    takes `gpus` GPUs, of those `visible` (as CUDA_VISIBLE_DEVICES names them) unless the engine chose them.
    """
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    torch.set_num_threads(threads)
    for wait in (False, True):
        for job in jobs:
            with job.locked(wait) as free:
                if not free or job.finished or (wait and job.failure.exists()):
                    continue
                job.failure.unlink(missing_ok=True)
                try:
                    job.run(gpus)
                except Exception as error:
                    said = train.explain(error) or f"{type(error).__name__}: {error}"
                    job.failure.write_text(said + "\n", encoding="utf-8")


def gpu_shares(gpus: int) -> list[str]:
    """This machine's GPUs, `gpus` together, as CUDA_VISIBLE_DEVICES names them; [] without enough of them."""
    present = torch.cuda.device_count()
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(present)))).split(",")
    return [",".join(names[at : at + gpus]) for at in range(0, present - gpus + 1, gpus)]


@contextlib.contextmanager
def _errors_into(path: Path) -> Iterator[None]:
    """What starts here writes its errors to a file: submitit answers an interruption by a traceback."""
    console = os.dup(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(console, 2)
        os.close(console)


def launch(jobs: list[Job], launcher: str, workers: int, gpus: int, output: Path) -> None:
    """Run the jobs on `workers` processes and show their progress. Failures are in each job's failed.txt."""
    open_jobs = [job for job in jobs if not job.finished]
    # By all jobs, not by those still open: the number of threads can decide the last bit of a sum, and a
    # sweep that goes on has to end as one that was never interrupted.
    share = (os.cpu_count() or 1) // min(workers, len(jobs))
    threads = max(1, min(share, torch.get_num_threads()))
    workers = min(workers, len(open_jobs))
    if sys.platform == "win32":  # submitit needs Unix
        work(open_jobs, threads)
        return
    import submitit

    folder = output / ".workers" / str(os.getpid())
    executor = submitit.AutoExecutor(folder=folder, cluster=launcher)
    executor.update_parameters(timeout_min=7 * 24 * 60, cpus_per_task=threads)
    # submitit's own choice on one machine would be the first GPU for every worker.
    shares = gpu_shares(gpus) if launcher == "local" else []
    if gpus > 1 or torch.cuda.is_available():
        executor.update_parameters(gpus_per_node=gpus)
    visible = itertools.islice(itertools.cycle(shares or [None]), workers)
    with _errors_into(folder / "engine.log"):
        tasks = [executor.submit(work, open_jobs, threads, gpus, share) for share in visible]
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
    early = [task for task in tasks if task.exception()]
    for task in early:
        print(f"a worker ended early; its log: {task.paths.stderr}", file=sys.stderr)
    if not early:
        shutil.rmtree(folder, ignore_errors=True)


def plan(args: argparse.Namespace) -> list[Job]:
    """The jobs a command line asks for. Raises UserError for what is unknown."""
    given, *rest = args.words or [PROTOCOLS[args.protocol].default]
    seeds = list(itertools.takewhile(str.isdecimal, rest))
    opts = rest[len(seeds) :]
    if len(opts) % 2:
        raise UserError(f"after DATASET and seeds come KEY VALUE pairs, not {' '.join(opts)}")
    chosen = args.methods or ",".join([*FREE, "DFZSL"] if args.words else METHODS)
    if chosen == "all":
        registered = map(Method, TRAINER_REGISTRY.registered_names())
        methods = [method for method in registered if issubclass(method.type, CLIPTrainer)]
    else:
        methods = []
        for word in chosen.split(","):
            method = Method.parse(word.removesuffix("+all"))
            variants = method.variants if word.endswith("+all") else [method.variant]
            methods += [replace(method, variant=variant) for variant in variants]
    # The owner comes first: others wait for its teacher.
    methods = sorted(dict.fromkeys(methods), key=lambda method: method.trainer != OWNER)
    names = ["imagenet", *TARGETS] if given == "all" else [given]
    if not PROTOCOLS[args.protocol].tests:
        # A test's folder names the data set it tests on, and cannot tell two training sets apart.
        folders = Path(args.output, args.protocol).glob("train_*/*")
        trained = {*(path.name for path in folders), *(Data(name, args.root).name for name in names)}
        if len(trained) > 1:
            raise UserError(
                f"one --output holds {args.protocol} runs from one data set, not from "
                f"{', '.join(sorted(trained))}; choose another --output"
            )
    jobs = [
        Job(
            protocol=args.protocol,
            method=method,
            data=Data(name, args.root),
            seed=int(seed),
            shots=args.shots,
            teacher_shots=args.teacher_shots,
            output=Path(args.output),
            opts=tuple(opts),
        )
        for name in names
        for seed in seeds or DEFAULT_SEEDS
        for method in methods
    ]
    for job in jobs:
        job.check()
        if (job.data, job.seed) == (jobs[0].data, jobs[0].seed):  # KEY VALUE are the same for all others
            train.setup_cfg(train.parser().parse_args(job.parts()[0][1]))
    return jobs


def shots(word: str) -> int:
    """A number of images, or -1 for all. Raises ValueError for another."""
    if (number := int(word)) < 1 and number != -1:
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m dfzsl.launch", description=__doc__.splitlines()[0])
    flags.add_argument("protocol", choices=PROTOCOLS)
    flags.add_argument("--methods", default="", help="all, or TRAINER[@virtual][:CONFIG][+VARIANT],...")
    flags.add_argument("--root", default=os.environ.get("DATA", "data"), help="data folder (or env DATA)")
    flags.add_argument("--output", default="output", help="where all runs and tables go")
    flags.add_argument("--shots", type=shots, default=16, help="images a class for training; -1: all")
    flags.add_argument(
        "--teacher-shots", type=shots, default=-1, help="images a class for the owner; -1: all"
    )
    flags.add_argument("--launcher", choices=("local", "slurm"), default="local")
    flags.add_argument("--workers", type=int, default=0, help="runs at a time; 0: as GPUs or cores allow")
    flags.add_argument(
        "--gpus-per-run", type=int, default=1, metavar="N", help="GPUs a run uses, by torchrun if several"
    )
    flags.add_argument("--dry-run", action="store_true", help="list the runs and stop")
    flags.add_argument(
        "words",
        nargs="*",
        metavar="DATASET [SEED...] [KEY VALUE...]",
        help="name, folder:PATH, csv:PATH, features:PATH, or all; seeds default to 1 2 3",
    )
    return flags


def show(folder: Path) -> None:
    """Print the tables of a protocol's folder, and write its page where matplotlib is there to draw it."""
    from .. import report

    report.show(folder)
    if importlib.util.find_spec("matplotlib"):
        from ..report.page import write_page

        write_page(folder / "report.html", report.sections(report.collect(folder)))
        print(f"The same with pictures: {folder / 'report.html'}")


def forecast(todo: Sequence[Job], workers: int) -> str:
    """What will run and how long it may take, by finished runs of the same method on the same data."""

    @functools.cache
    def usual(runs: Path) -> float | None:
        """Median over the seeds in a folder; None where none is finished."""
        found = [read_results(path) for path in runs.glob(f"seed*/{RESULTS}")]
        elapsed = [results["elapsed"] for results in found if "elapsed" in results]
        return statistics.median(elapsed) if elapsed else None

    def seconds(job: Job) -> float | None:
        """Of the parts that are not finished; None where one of them is unknown."""
        each = [usual(folder.parent) for folder, _ in job.parts() if not (folder / RESULTS).exists()]
        return None if None in each else sum(filter(None, each))

    kinds: dict[tuple[str, str], list[Job]] = {}
    for job in todo:
        method, config = job.parts()[0][0].parts[-3:-1]
        kinds.setdefault((f"{method} ({config})", job.data.name), []).append(job)
    rows, known = [], []
    for kind, jobs in kinds.items():
        each = [value for value in map(seconds, jobs) if value is not None]
        known += each
        rows.append((*kind, len(jobs), _clock(statistics.median(each)) if each else "unknown"))
    headers = ["method", "data set", "runs", "each takes"]
    table = tabulate(rows, headers, colalign=("left", "left", "right", "right"))
    if not known:
        return f"{table}\nHow long: unknown until a run of each has finished."
    of = "" if len(known) == len(todo) else f" for {len(known)} of {len(todo)} runs, the others unknown"
    # No run is split, so the last ones leave workers idle.
    longest = max(sum(known) / workers, max(known))
    basis = "by the median of finished runs of the same method on the same data"
    return f"{table}\nAbout {_clock(longest)} on {workers} workers{of}; {basis}."


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def main() -> None:
    args = parser().parse_intermixed_args()
    jobs = plan(args)
    todo = [job for job in jobs if not job.finished]
    gpus = args.gpus_per_run
    workers = args.workers or len(gpu_shares(gpus)) or (1 if gpus > 1 else os.cpu_count() or 1)
    print(f"{len(jobs)} runs ({len(jobs) - len(todo)} finished already) into {args.output}/{args.protocol}")
    if todo:
        print(forecast(todo, min(workers, len(todo))))
    if args.dry_run:
        for job in todo:
            for _, arguments in job.parts():
                print("python train.py", " ".join(arguments))
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
