"""Runs that are killed: at a file operation, in the middle of a write, or at any moment.

A fork server imports this module once, so an attempt costs a fork and not the seconds of importing torch. It
must hold no thread and no random state that matters: it imports, and forks.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import fake_data
from dassl.utils import load_checkpoint
from scipy import optimize  # noqa: F401 (imported here once, and not by every attempt)
from scipy.sparse import linalg  # noqa: F401
from sweeps import planned_jobs

from dfzsl import train
from dfzsl.datasets import encoding, extract
from dfzsl.launch import workers
from dfzsl.trainers import base, teacher_zeroshot
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.dfzsl import CLASSIFIER_FILE, DFZSL

SERVER = multiprocessing.get_context("forkserver")
STARTING = threading.Lock()  # tests start attempts from several threads
SERVER.set_forkserver_preload(["killing"])
load_backbone("shapes")  # whatever it imports and reads
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.chmod", "os.truncate", "shutil.copyfile"}


def _kill_at(operation: int, folder: str) -> None:
    """Die before the given file operation (from 1) within `folder` that could change something there."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event == "open":
            path, mode, flags = args
            if not ((flags or 0) & WRITES or set(mode or "") & set("wax+")):
                return
        elif event in OPERATIONS:
            path = args[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(folder):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _attempt(target: Callable[..., None], args: tuple, folder: str, fault: str, at: int) -> None:
    os.setpgid(0, 0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if fault == "operation":
        _kill_at(at, folder)
    elif fault == "byte":
        # The kernel ends a process that writes past this size: some file is cut off there.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    target(*args)


@functools.cache
def _start_server() -> None:
    """It finds the modules of this folder by the path it is started with."""
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if paths is not None:
            os.environ["PYTHONPATH"] = paths


def attempt(
    target: Callable[..., None],
    *args: object,
    folder: Path,
    fault: str = "none",
    at: int = 0,
    after: float | None = None,
) -> bool:
    """Run target(*args) in a process of its own; True if it came to its end, False if it was killed.

    `fault` "operation" or "byte" kills it at the `at`-th file operation in `folder` or byte of a file. After
    `after` seconds it is killed whatever it does. An error in it fails the test.
    """
    with STARTING:
        _start_server()
    process = SERVER.Process(target=_attempt, args=(target, args, str(folder), fault, at))
    process.start()
    process.join(after)
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it has not made its group yet, or has just ended
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGXFSZ), f"it ended with {process.exitcode}"
    return process.exitcode == 0


def faults(seconds: float, sizes: tuple[int, int], seed: int = 0) -> Iterator[dict]:
    """Endless faults for `attempt`: each file operation in turn, bytes of a write, moments of a run.

    A walk through the operations cannot stop at what it has passed: a run that goes on does less and less.
    """
    draw = random.Random(seed)
    operation = 0
    while True:
        for _ in range(3):
            operation += 1
            yield {"fault": "operation", "at": operation}
        yield {"fault": "byte", "at": draw.randint(*sizes)}
        yield {"after": draw.uniform(0, seconds)}


# ---------------------------------------------------------------- what is run


def noted(log: Path, what: str, done: Callable[..., bool], function: Callable) -> Callable:
    """`function`, whose calls leave a line in `log`: what was called, and whether it was `done` before."""

    def call(*args, **kwargs):
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps([what, done(*args)]) + "\n")
        return function(*args, **kwargs)

    return call


def calls(log: Path) -> list[tuple[str, bool]]:
    return [tuple(json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines()]


def run(words: list[str], output: str, log: Path) -> None:
    """train.py with these arguments, its stages noted."""
    folder = Path(output)

    def epoch_done(trainer: base.CLIPTrainer) -> bool:
        kept = folder / "prompt_learner"
        if not (kept / "checkpoint").exists():
            return False
        last = kept / (kept / "checkpoint").read_text(encoding="utf-8").strip()
        return load_checkpoint(str(last))["epoch"] > trainer.epoch

    def there(name: str) -> Callable[..., bool]:
        return lambda *_: (folder / name).exists()

    base.recover = noted(log, "recover", there("virtual.safetensors"), base.recover)
    teacher_zeroshot.fit_teacher = noted(
        log, "teacher", there(teacher_zeroshot.TEACHER_FILE), teacher_zeroshot.fit_teacher
    )
    DFZSL.generate = noted(log, "generate", there(CLASSIFIER_FILE), DFZSL.generate)
    base.CLIPTrainer.run_epoch = noted(log, "epoch", epoch_done, base.CLIPTrainer.run_epoch)
    train.main(["--output-dir", output, *words])


def encode(root: Path, output: Path, cache: Path, log: Path) -> None:
    """Extraction of the fake pets, four pictures a part."""
    encoding.IMAGES_PER_PART = 4
    backbone = fake_data.Backbone()
    backbone.encode_image = noted(log, "encode", lambda *_: False, backbone.encode_image)  # type: ignore[method-assign]
    data = extract.open_dataset("oxford_pets", str(root))
    extract.extract(data, backbone, output, batch_size=4, num_workers=0, cache_dir=cache)


def work(folder: Path, words: list[str]) -> None:
    """One worker of a sweep."""
    os.chdir(folder)
    workers.work(planned_jobs(words), threads=1)
