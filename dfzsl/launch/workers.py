"""Run the jobs of a sweep on several workers (local processes or slurm jobs), each job on one of them."""

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

KILLED_MESSAGE = (
    "its process was killed, probably because memory ran out (see dmesg); "
    f"use fewer --workers, {MEMORY_ADVICE}"
)


def run(job: Job, gpus: int = 1, progress_file: Path | None = None) -> None:
    """Run the unfinished parts of a job. If its teacher is missing, run the owner's job first.

    Args:
        job: job to run.
        gpus: number of GPUs of each part.
        progress_file: file for the last line of the console output; by default the job's own.
    """
    progress_file = progress_file or job.progress_file
    if job.needs_owner_teacher:
        with locked(job.teacher, wait=True):
            run(job.teacher, gpus, progress_file)
    for folder, arguments in job.parts():
        if not (folder / RESULTS).exists():
            # The settings are written first, so that no folder has results without settings.
            with _recorded_identity(job):
                if isinstance(job.method, Checkout):
                    job.run_checkout(folder, arguments)
                elif gpus > 1:
                    _torchrun(gpus, arguments)
                else:
                    with _captured_console(progress_file):
                        train.main(arguments)


@contextlib.contextmanager
def locked(job: Job, wait: bool = False) -> Iterator[bool]:
    """Lock a job against other workers and sweeps, and yield whether the lock was free.

    On a disk without file locks every job is free; `check_locks` has limited such sweeps to one worker.
    """
    folder = job.parts()[0][0]
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", wait) as held:
        yield held is not False


@contextlib.contextmanager
def _recorded_identity(job: Job) -> Iterator[None]:
    """Write the job's `identity`, and remove it again if the job fails."""
    existed = job.settings.exists()
    with atomic(job.settings) as temporary:
        temporary.write_text(job.identity, encoding="utf-8")
    try:
        yield
    except Exception:
        if not existed:
            job.settings.unlink()
        raise


@contextlib.contextmanager
def _captured_console(progress_file: Path) -> Iterator[None]:
    """Redirect console output, progress bars included, to a file with its last line; restore it at the end.

    Dassl's logger replaces sys.stdout and does not restore it.
    """
    console: Any = _LastLine(progress_file)
    try:
        with contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
            yield
    finally:
        progress_file.unlink(missing_ok=True)


class _LastLine:
    """Stream that writes its last line into a file, at most twice a second."""

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
def _progress_bars(workers: int) -> Iterator[list[tqdm]]:
    """Yield one progress line per worker on a terminal, none elsewhere."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(tqdm(bar_format="{desc}", position=worker, leave=False))
            for worker in range(1, workers + 1)
            if sys.stderr.isatty()
        ]


def progress_lines(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield the last line of the console output of each running job."""
    for job in jobs:
        with contextlib.suppress(OSError):
            line = job.progress_file.read_text(encoding="utf-8", errors="replace")
            yield one_line(f"{job.method.name}, {job.data.name}, seed {job.seed}: {line}")


def _torchrun(gpus: int, arguments: list[str]) -> None:
    """Run train.py on several GPUs of this machine. Raises UserError with its error message if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    process = subprocess.Popen(
        [*command, "-m", "dfzsl.train", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        _, errors = process.communicate()
    except BaseException:
        process.terminate()  # torchrun passes the signal to its ranks
        process.wait()
        raise
    if process.returncode:
        # The first message, or the end of the first traceback; those of other ranks and of torchrun follow.
        message = re.search(r"^(?:error: |\[rank\d+\]: (?=[\w.]+: ))(.+)", errors, re.MULTILINE)
        killed = re.search(r"SIGKILL|exitcode *: *-9\b", errors)
        reason = (
            KILLED_MESSAGE
            if killed
            else f"a process ended without a message (torchrun: {process.returncode})"
        )
        raise UserError(message[1] if message else reason)


def work(
    jobs: Sequence[Job], threads: int, gpus: int = 1, visible: str | None = None, note: Path | None = None
) -> None:
    """Run the jobs that no other worker runs; record failures and continue.

    A second round waits for jobs of other workers, and runs those that they left unfinished.

    Args:
        jobs: jobs of the sweep.
        threads: number of torch threads.
        gpus: number of GPUs of each run.
        visible: value of CUDA_VISIBLE_DEVICES; None leaves it unchanged, as slurm sets it.
        note: file for the failure path of the current job, by which `mark_crashed` identifies it.
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
                    message = describe_user_error(error) or one_line(f"{type(error).__name__}: {error}")
                    job.failure.write_text(message + "\n", encoding="utf-8")


def gpu_shares(gpus: int) -> list[str]:
    """Divide the GPUs of this machine into groups of `gpus`, each a value of CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    return [",".join(names[start : start + gpus]) for start in range(0, count - gpus + 1, gpus)]


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Redirect stderr of child processes to a file, because submitit prints a traceback when interrupted."""
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
def _signals_ignored() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM, so that a second Ctrl-C does not leave workers running."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def launch(jobs: list[Job], launcher: str, workers: int, gpus: int, output: Path) -> None:
    """Run the jobs on several workers and show their progress; each failure is written to failed.txt.

    Args:
        jobs: jobs of the sweep, finished or not.
        launcher: local or slurm.
        workers: maximum number of workers.
        gpus: number of GPUs of each run.
        output: folder of all results.
    """
    pending_jobs = [job for job in jobs if not job.finished]
    for job in pending_jobs:
        if job.failure.exists():
            with locked(job) as free:
                if free:
                    job.failure.unlink(missing_ok=True)
    # All jobs count here, not only pending ones: the number of threads can change the last bit of a sum, and
    # a resumed sweep must give the results of an uninterrupted one.
    cores = (os.cpu_count() or 1) // min(workers, len(jobs))
    threads = max(1, min(cores, torch.get_num_threads()))
    workers = min(workers, len(pending_jobs))
    if sys.platform == "win32":  # submitit needs Unix
        work(pending_jobs, threads)
        return
    import submitit

    prefix = f"{launcher}-{socket.gethostname()}-"
    folder = output / ".workers" / f"{prefix}{secrets.token_hex(4)}"  # process ids are reused
    if launcher == "local":
        for old_folder in folder.parent.glob(f"{prefix}*"):  # of killed sweeps
            with lock(old_folder / LOCK_FILE) as held:
                if held:
                    shutil.rmtree(old_folder, ignore_errors=True)
    folder.mkdir(parents=True)
    executor = submitit.AutoExecutor(folder=folder, cluster=launcher)
    executor.update_parameters(timeout_min=7 * 24 * 60, cpus_per_task=threads)
    # On one machine, submitit would give the first GPU to every worker.
    shares = gpu_shares(gpus) if launcher == "local" else []
    if gpus > 1 or torch.cuda.is_available():
        executor.update_parameters(gpus_per_node=gpus)
    numbers, failed_tasks = itertools.count(), []
    running: dict[Path, tuple[Any, str | None]] = {}

    def start(share: str | None) -> None:
        note = folder / f"{next(numbers)}.run"
        remaining = list(filter(_is_pending, pending_jobs))
        with _stderr_to(folder / "engine.log"):
            running[note] = executor.submit(work, remaining, threads, gpus, share, note), share

    with lock(folder / LOCK_FILE):
        try:
            for first in itertools.islice(itertools.cycle(shares or [None]), workers):
                start(first)
            with (
                tqdm(total=len(pending_jobs), desc="runs", unit="run") as bar,
                _progress_bars(workers) as lines,
            ):
                while running:
                    time.sleep(0.5)
                    for note, (task, share) in [item for item in running.items() if item[1][0].done()]:
                        del running[note]
                        # A killed worker fails its current run only; others continue with the remaining runs.
                        error = task.exception()
                        killed = isinstance(error, submitit.core.utils.UncompletedJobError)
                        if error and not (killed and mark_crashed(note, pending_jobs)):
                            failed_tasks.append(task)
                        elif error and not running and any(map(_is_pending, pending_jobs)):
                            start(share)
                    bar.update(sum(not _is_pending(job) for job in pending_jobs) - bar.n)
                    texts = itertools.chain(
                        progress_lines(pending_jobs if lines else []), itertools.repeat("")
                    )
                    for line, text in zip(lines, texts, strict=False):
                        line.set_description_str(text)
        except BaseException:
            with _signals_ignored():
                for task, _ in running.values():
                    task.cancel()
            raise
    for task in failed_tasks:
        logger.warning("a worker failed; its log: %s", task.paths.stderr)
    if not failed_tasks:
        shutil.rmtree(folder, ignore_errors=True)


def _is_pending(job: Job) -> bool:
    """Return whether a job neither finished nor failed."""
    return not (job.finished or job.failure.exists())


def mark_crashed(note: Path, jobs: Sequence[Job]) -> bool:
    """Mark the current run of a killed worker as failed, unless another worker runs it by now.

    Returns:
        Whether the worker had a current run.
    """
    current = note.read_text(encoding="utf-8") if note.exists() else ""
    for job in jobs:
        if str(job.failure) == current:
            with locked(job) as free:
                if free and _is_pending(job):
                    job.failure.write_text(f"{KILLED_MESSAGE}\n", encoding="utf-8")
            return True
    return False
