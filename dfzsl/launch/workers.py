"""Workers, local processes or slurm jobs, that take runs from one list: each run once, by one of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from .. import train
from ..errors import UserError, explain, one_line
from ..files import atomic
from ..results import RESULTS
from .checkouts import Checkout
from .runs import Job


def run(job: Job, gpus: int = 1) -> None:
    """Run what is not finished, each part on `gpus` GPUs. A teacher that is missing is made first."""
    if job.waits_for_owner:
        with locked(job.teacher, wait=True):
            run(job.teacher, gpus)
    for folder, arguments in job.parts():
        if not (folder / RESULTS).exists():
            # Before the results: a folder that holds these must say what they were made with.
            with _claimed(job):
                if isinstance(job.method, Checkout):
                    job.run_checkout(folder, arguments)
                elif gpus > 1:
                    _torchrun(gpus, arguments)
                else:
                    with _own_console():
                        train.main(arguments)


@contextlib.contextmanager
def locked(job: Job, wait: bool = False) -> Iterator[bool]:
    """Hold a job against other workers and sweeps; yields whether it was free."""
    folder = job.parts()[0][0]
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


@contextlib.contextmanager
def _claimed(job: Job) -> Iterator[None]:
    """Write the job's `identity`, and take it back if nothing comes of it but an error."""
    was_there = job.settings.exists()
    with atomic(job.settings) as temporary:
        temporary.write_text(job.identity, encoding="utf-8")
    try:
        yield
    except Exception:
        if not was_there:
            job.settings.unlink()
        raise


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
            with locked(job, wait) as free:
                if not free or job.finished or (wait and job.failure.exists()):
                    continue
                job.failure.unlink(missing_ok=True)
                try:
                    run(job, gpus)
                except Exception as error:
                    said = explain(error) or one_line(f"{type(error).__name__}: {error}")
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


def _workers_in(folder: Path) -> set[str]:
    """submitit calls a local worker's files by its process."""
    return {path.name.partition("_")[0] for path in folder.iterdir()}


def _alive(process: str) -> bool:
    """Whether there is such a process on this machine; a word that is none is of nobody."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # of another user
        pass
    return True


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Somebody who presses Ctrl-C twice must not leave workers behind."""
    was = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in was.items():
            signal.signal(number, handler)


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

    here = f"{launcher}-{socket.gethostname()}-"
    folder = output / ".workers" / f"{here}{os.getpid()}"
    if launcher == "local":
        for left in folder.parent.glob(f"{here}*"):  # by sweeps that were killed
            if not any(map(_alive, [left.name.removeprefix(here), *_workers_in(left)])):
                shutil.rmtree(left, ignore_errors=True)
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
        with _uninterrupted():
            for task in tasks:
                task.cancel()
        raise
    early = [task for task in tasks if task.exception()]
    for task in early:
        print(f"a worker ended early; its log: {task.paths.stderr}", file=sys.stderr)
    if not early:
        shutil.rmtree(folder, ignore_errors=True)
