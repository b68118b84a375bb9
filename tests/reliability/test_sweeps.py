"""Test sweeps with killed workers, without file locks, and with wrong clocks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from conftest import needs_proc, write_features
from submitit.core.utils import UncompletedJobError
from sweeps import planned_jobs
from test_sweep import files, finish, start

from dfzsl import report
from dfzsl.datasets.features import Features
from dfzsl.io.files import lock, supports_locks, write_json
from dfzsl.launch import __main__ as launch
from dfzsl.launch import workers
from dfzsl.launch.forecast import forecast
from dfzsl.launch.preflight import check
from dfzsl.launch.runs import Job
from dfzsl.trainers.recovery.remote_oracle import _retry_after
from dfzsl.utils import errors
from dfzsl.utils.errors import UserError

METHODS = "ZeroshotCLIP,TeacherZeroshot,TextTeacherMix"


@pytest.fixture
def world(tmp_path) -> Path:
    write_features(tmp_path / "animals.npz")
    return tmp_path


def given(world: Path, *more: str) -> list[str]:
    words = ["base2new", "--methods", METHODS, "--output", str(world / "output")]
    return [*words, f"features:{world / 'animals.npz'}", "1", *more]


def jobs(world: Path) -> list[Job]:
    return planned_jobs(given(world))


# ---------------------------------------------------------------- killed by another process


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_the_system_kills(count, world, tried):
    """Another worker repeats its run, or the run is marked as failed; all other runs finish."""
    sweep = start(world, "1", methods=METHODS, workers=count)
    at: list[Path] = []
    while not at:
        assert sweep.poll() is None
        notes = sorted((world / "output").glob(".workers/*/*.run"))
        at = [path for path in notes if "ZeroshotCLIP" in path.read_text()]
        time.sleep(0.01)
    job = Path(at[0].read_text())
    number = int(at[0].stem)
    controllers = sorted(children(sweep.pid))
    (worker,) = [one for parent in controllers[number : number + 1] for one in children(parent)]
    os.kill(worker, signal.SIGKILL)
    said = sweep.communicate()[1]
    noted = [path.parent for path in files(world, "failed.txt").values()]
    assert "Traceback" not in said and sweep.returncode == (2 if noted else 0)
    if count == 1 or noted:
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "1 of 3 runs" in line and "ZeroshotCLIP" in line and "memory" in line
        assert "fewer --workers" in line and "DATALOADER.TRAIN_X.BATCH_SIZE" in line
        assert noted == [world / job.parent]
    assert len(files(world, "results.json")) >= 4
    finish(start(world, "1", methods=METHODS, workers=count))
    assert len(files(world, "results.json")) == 6 and not files(world, "failed.txt")
    tried("sweeps", "a worker killed by the system, as where memory runs out", 1, "noted; the others go on")


def test_a_killed_worker_is_replaced(world, monkeypatch):
    """Its run is marked as failed, and a new worker does the rest."""

    class Worker:
        """A worker of submitit in this process; the first is killed at the last run."""

        count = 0

        def __init__(self, work, open_jobs, threads, gpus, share, note):
            Worker.count += 1
            self.error = UncompletedJobError("killed") if Worker.count == 1 else None
            if self.error:
                note.write_text(str(open_jobs[-1].failure), encoding="utf-8")
            else:
                work(open_jobs, threads, gpus, share, note)

        def done(self) -> bool:
            return True

        def exception(self) -> Exception | None:
            return self.error

    monkeypatch.setattr("submitit.AutoExecutor.submit", Worker)
    planned = jobs(world)
    workers.launch(planned, "local", 1, 1, world / "output")
    assert Worker.count == 2
    *others, last = planned
    assert "memory" in last.failure.read_text(encoding="utf-8") and not last.finished
    assert all(job.finished for job in others)


def test_a_rank_that_the_system_kills(monkeypatch):
    ended = "import sys; sys.stderr.write('exitcode  : -9 (pid: 7)'); sys.exit(1)"
    real = subprocess.Popen
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda _, **keys: real([sys.executable, "-c", ended], **keys)
    )
    with pytest.raises(UserError, match="memory"):
        workers._torchrun(2, [])


def test_a_pool_that_lost_a_process_is_one_line(tried):
    from concurrent.futures import ProcessPoolExecutor

    with pytest.raises(RuntimeError) as broken, ProcessPoolExecutor(1) as pool:
        pool.submit(os.kill, os.getpid(), 0).result()
        pool.submit(_die).result()
    assert "lack of memory" in str(errors.describe_user_error(broken.value))
    tried("sweeps", "a process that decodes images killed by the system", 1, "one line")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- disks of several machines

WITHOUT = {"ENOLCK": errno.ENOLCK, "ENOSYS": errno.ENOSYS, "EOPNOTSUPP": errno.EOPNOTSUPP}


@pytest.fixture(params=WITHOUT)
def no_locks(request, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(WITHOUT[request.param], os.strerror(WITHOUT[request.param]))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_disk_without_locks(no_locks, world, monkeypatch, tried):
    """Several workers are refused before any run; one worker needs no lock."""
    assert not supports_locks(world)
    with pytest.raises(UserError, match=r"locks.* --workers 1"):
        launch.main(given(world, "--workers", "2"))
    assert not (world / "output").exists()
    planned = jobs(world)
    left = planned[0].parts()[0][0] / ".results.json.0123abcd.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("")
    workers.work(planned, 1)
    assert all(job.finished for job in planned)
    assert left.exists()  # it may be another machine's
    tried("sweeps", "a disk without locks", 1, "refused before any run; one worker goes on")


HOLD = """
import sys, time
from dfzsl.io.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("when", ["now", "in ten years", "in 1970"])
def test_no_lock_is_stale(when, tmp_path, tried):
    """A lock is held by a process, whatever the age or the content of its file."""
    path = tmp_path / ".lock"
    path.write_text("elsewhere 1\n")
    moment = {"now": time.time(), "in ten years": time.time() + 3e8, "in 1970": 0}[when]
    with lock(path) as held:
        assert held
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "held\n"
    os.utime(path, (moment, moment))
    with lock(path) as held:
        assert held is False
    other.kill()
    other.wait()
    other.stdout.close()
    assert path.exists()
    with lock(path) as held:
        assert held
    tried("sweeps", "locks left by killed processes, files of any age and content", 1, "free, or held")


# ---------------------------------------------------------------- many runs, and those of another version


def test_a_thousand_runs_read_their_data_once(world, monkeypatch, tried):
    """Plan, check and forecast: data are read once if the seeds select no images."""
    seeds = [str(seed) for seed in range(1, 501)]
    words = ["base2new", "--methods", "ZeroshotCLIP,TextTeacherMix", "--output", str(world / "output")]
    planned = planned_jobs([*words, f"features:{world / 'animals.npz'}", *seeds])
    read: list[str] = []
    real = Features.read
    monkeypatch.setattr(Features, "read", lambda self: read.append(self.dataset_dir) or real(self))
    check(planned)
    assert len(planned) == 1000 and 1 <= len(read) <= 4  # base and new classes
    assert "Estimated time: unknown" in forecast(planned, 2)
    tried("sweeps", "1,000 runs: planned, looked at, forecast", len(planned), "data read once")


@pytest.mark.parametrize("schema", [0, 2, "2", None, [1]])
def test_results_of_another_version(schema, world, tried):
    """Sweeps and reports refuse them before any run, and keep the file."""
    path = jobs(world)[0].parts()[0][0] / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": schema, "accuracy": 50.0}))
    said = "update" if schema == 2 else "delete"
    with pytest.raises(UserError, match=said):
        jobs(world)
    with pytest.raises(UserError, match=said):
        report.collect(world / "output" / "base2new")
    assert json.loads(path.read_text())["schema"] == schema
    tried("sweeps", "results.json of a newer or an older version", 1, "one line, and kept")


# ---------------------------------------------------------------- clocks

ODD = [-5.0, -1e9, 1e300, float("nan"), True, "12", None, [1]]


@pytest.mark.parametrize("elapsed", ODD, ids=str)
def test_a_forecast_ignores_invalid_durations(elapsed, world, tried):
    planned = jobs(world)
    for folder, _ in planned[1].parts():
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"schema": 1, "elapsed": elapsed}))
    (again,) = [
        Job(**{**vars(planned[1]), "seed": 2}),
    ]
    assert "Estimated time: unknown" in forecast([again], 1)
    for folder, _ in planned[1].parts():
        write_json(folder / "results.json", {"schema": 1, "elapsed": 30})
    assert "About 0:01:00" in forecast([again], 1)
    tried("sweeps", "clocks: results that took no time, less or for ever", 1, "no part of the forecast")


@pytest.mark.parametrize("ahead", [-86400, 0, 86400])
def test_a_server_whose_clock_is_wrong(ahead, tried):
    """Dates are compared with the server's clock, which its reply contains."""
    headers = {
        "date": formatdate(time.time() + ahead, usegmt=True),
        "retry-after": formatdate(time.time() + ahead + 30, usegmt=True),
    }
    assert 29 <= _retry_after(headers) <= 31
    tried("sweeps", "clocks: a server's is a day off", 1, "its own date counts")
