"""Workers, local processes or slurm jobs, that take runs from one list: each run once, by one of them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dfzsl import train
from dfzsl.io.files import atomic, lock
from dfzsl.io.results import RESULTS
from dfzsl.io.run_directory import LOCK_FILE
from dfzsl.utils.errors import MEMORY_ADVICE, UserError, describe_user_error, one_line

from .checkouts import Checkout
from .forecast import longest_first
from .runs import Job

logger = logging.getLogger(__name__)

KILLED = (
    "its process was killed, as the system does when memory runs out (dmesg tells); use fewer --workers, "
    f"{MEMORY_ADVICE}"
)


def run(job: Job, gpus: int = 1, said: Path | None = None) -> None:
    """Run what is not finished, each part on `gpus` GPUs. A teacher that is missing is made first.

    The file `said`, by default the job's own, tells meanwhile how far it is."""
    said = said or job.said
    if job.waits_for_owner:
        with locked(job.teacher, wait=True):
            run(job.teacher, gpus, said)
    for folder, arguments in job.parts():
        if not (folder / RESULTS).exists():
            # Before the results: a folder that holds these must say what they were made with.
            with _claimed(job):
                if isinstance(job.method, Checkout):
                    job.run_checkout(folder, arguments)
                elif gpus > 1:
                    _torchrun(gpus, arguments)
                else:
                    with _own_console(said):
                        train.main(arguments)


@contextlib.contextmanager
def locked(job: Job, wait: bool = False) -> Iterator[bool]:
    """Hold a job against other workers and sweeps; yields whether it was free. On a disk without locks any
    is: `check` has seen to it that there is one worker."""
    folder = job.parts()[0][0]
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", wait) as held:
        yield held is not False


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
def _own_console(said: Path) -> Iterator[None]:
    """Dassl's logger replaces sys.stdout; a run inside a worker gives it back. What it shows on its console,
    bars among it, goes to its log and line by line into a file that is gone when it ends."""
    console: Any = _LastLine(said)
    try:
        with contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
            yield
    finally:
        said.unlink(missing_ok=True)


class _LastLine:
    """A console of one line, kept in a file and written twice a second at most."""

    encoding = "utf-8"

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, 0.0

    def write(self, text: str) -> int:
        lines = [line for line in map(str.strip, re.split(r"[\r\n]|\x1b\[[\d;]*\w", text)) if line]
        if lines and time.monotonic() - self.written > 0.5:
            self.written = time.monotonic()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(lines[-1], encoding="utf-8", errors="replace")
        return len(text)

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def _lines(workers: int) -> Iterator[list[tqdm]]:
    """A line for each worker below the first on a terminal: the last that its run said, or its bar."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(tqdm(bar_format="{desc}", position=worker, leave=False))
            for worker in range(1, workers + 1)
            if sys.stderr.isatty()
        ]


def _how_far(jobs: Sequence[Job]) -> Iterator[str]:
    """A line on each job that is running."""
    for job in jobs:
        with contextlib.suppress(OSError):
            said = job.said.read_text(encoding="utf-8", errors="replace")
            yield one_line(f"{job.method.name}, {job.data.name}, seed {job.seed}: {said}")


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
        killed = re.search(r"SIGKILL|exitcode *: *-9\b", said)
        died = KILLED if killed else f"a process died without a word (torchrun: {process.returncode})"
        raise UserError(told[1] if told else died)


def work(
    jobs: Sequence[Job], threads: int, gpus: int = 1, visible: str | None = None, note: Path | None = None
) -> None:
    """One worker: take each job that nobody has taken, run it, note what failed and go on.

    A second round waits for those that others had taken, and takes over what they left unfinished. Each run
    takes `gpus` GPUs, of those `visible` (as CUDA_VISIBLE_DEVICES names them) unless the engine chose them.
    The file `note` says which run this is at, for whoever finds the worker killed.
    """
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    torch.set_num_threads(threads)
    for wait in (False, True):
        for job in longest_first(jobs):
            with locked(job, wait) as free:
                if not free or job.finished or (wait and job.failure.exists()):
                    continue
                job.failure.unlink(missing_ok=True)
                if note:
                    note.write_text(str(job.failure), encoding="utf-8")
                try:
                    run(job, gpus)
                except Exception as error:
                    said = describe_user_error(error) or one_line(f"{type(error).__name__}: {error}")
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
    for job in open_jobs:
        if job.failure.exists():
            with locked(job) as free:
                if free:
                    job.failure.unlink(missing_ok=True)
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
    folder = output / ".workers" / f"{here}{secrets.token_hex(4)}"  # process numbers come again
    if launcher == "local":
        for left in folder.parent.glob(f"{here}*"):  # by sweeps that were killed
            with lock(left / LOCK_FILE) as held:
                if held:
                    shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True)
    executor = submitit.AutoExecutor(folder=folder, cluster=launcher)
    executor.update_parameters(timeout_min=7 * 24 * 60, cpus_per_task=threads)
    # submitit's own choice on one machine would be the first GPU for every worker.
    shares = gpu_shares(gpus) if launcher == "local" else []
    if gpus > 1 or torch.cuda.is_available():
        executor.update_parameters(gpus_per_node=gpus)
    numbers, early = itertools.count(), []
    running: dict[Path, tuple[Any, str | None]] = {}

    def start(share: str | None) -> None:
        note = folder / f"{next(numbers)}.run"
        todo = list(filter(_is_open, open_jobs))
        with _errors_into(folder / "engine.log"):
            running[note] = executor.submit(work, todo, threads, gpus, share, note), share

    with lock(folder / LOCK_FILE):
        try:
            for first in itertools.islice(itertools.cycle(shares or [None]), workers):
                start(first)
            with tqdm(total=len(open_jobs), desc="runs", unit="run") as bar, _lines(workers) as lines:
                while running:
                    time.sleep(0.5)
                    for note, (task, own) in [item for item in running.items() if item[1][0].done()]:
                        del running[note]
                        # One without a word was killed: its run has failed, and the others go on.
                        word = task.exception()
                        killed = isinstance(word, submitit.core.utils.UncompletedJobError)
                        if word and not (killed and _blame(note, open_jobs)):
                            early.append(task)
                        elif word and not running and any(map(_is_open, open_jobs)):
                            start(own)
                    bar.update(sum(not _is_open(job) for job in open_jobs) - bar.n)
                    told = itertools.chain(_how_far(open_jobs if lines else []), itertools.repeat(""))
                    for line, text in zip(lines, told, strict=False):
                        line.set_description_str(text)
        except BaseException:
            with _uninterrupted():
                for task, _ in running.values():
                    task.cancel()
            raise
    for task in early:
        logger.warning("a worker ended early; its log: %s", task.paths.stderr)
    if not early:
        shutil.rmtree(folder, ignore_errors=True)


def _is_open(job: Job) -> bool:
    return not (job.finished or job.failure.exists())


def _blame(note: Path, jobs: Sequence[Job]) -> bool:
    """Note as failed the run that a killed worker was at, unless another has taken it over; whether there was
    one."""
    at = note.read_text(encoding="utf-8") if note.exists() else ""
    for job in jobs:
        if str(job.failure) == at:
            with locked(job) as free:
                if free and _is_open(job):
                    job.failure.write_text(f"{KILLED}\n", encoding="utf-8")
            return True
    return False
