"""Test sweeps through the command line: interrupted, repeated, and two at a time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import write_features
from sweeps import start_sweep

from dfzsl.io.results import VOLATILE_KEYS

METHODS = "ZeroshotCLIP,TeacherZeroshot,TextTeacherMix,DFZSL"


def start(folder: Path, *seeds: str, methods: str = METHODS, workers: int = 1) -> subprocess.Popen:
    """A sweep over FOLDER/animals.npz into FOLDER/output."""
    words = ["base2new", "--methods", methods, "--workers", str(workers), "--output", "output"]
    words += ["features:animals.npz", *seeds, "RECOVERY.NUM_PER_CLASS", "20"]
    return start_sweep(folder, *words)


def finish(sweep: subprocess.Popen) -> str:
    shown, errors = sweep.communicate()
    assert sweep.returncode == 0, errors[-3000:]
    return shown


def files(folder: Path, *names: str) -> dict[str, Path]:
    output = folder / "output"
    return {str(path.relative_to(output)): path for name in names for path in output.rglob(name)}


def outcome(folder: Path) -> tuple[dict[str, bytes], dict[str, dict]]:
    """Return the files of tensors of a sweep, and its results without fields that depend on the clock."""
    results = {}
    for name, path in files(folder, "results.json").items():
        results[name] = json.loads(path.read_text(encoding="utf-8"))
        for key in VOLATILE_KEYS:
            del results[name][key]
        del results[name]["versions"]["revision"]  # a developer may commit while the test runs
    tensors = files(folder, "teacher.safetensors", "virtual.safetensors", "classifier.safetensors")
    return {name: path.read_bytes() for name, path in tensors.items()}, results


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_features(tmp_path / "animals.npz")
    return tmp_path


def test_a_finished_sweep_prints_its_table_and_repeats_no_run(world):
    shown = finish(start(world, "1"))
    for method in METHODS.split(","):
        assert method in shown
    made = {name: path.stat().st_mtime_ns for name, path in files(world, "results.json").items()}
    assert len(made) == 2 * len(METHODS.split(","))
    again = finish(start(world, "1"))
    assert "4 finished already" in again
    assert {name: path.stat().st_mtime_ns for name, path in files(world, "results.json").items()} == made
    assert "DFZSL (dfzsl)" in shown and "DFZSL (dfzsl)" not in again  # announced, and not again
    assert shown[shown.index("base-to-new") :] == again[again.index("base-to-new") :]
    assert {path.read_text() for path in files(world, "settings.txt").values()} == {
        "RECOVERY.NUM_PER_CLASS 20"
    }
    write_features(world / "animals.npz", seed=1)
    other = start(world, "1")
    shown, errors = other.communicate()
    assert other.returncode == 2 and shown == "" and "test data" in errors  # checked before it prints


def test_a_terminated_sweep_ends_its_workers(world):
    sweep = start(world, "1", "2", "3")
    while not files(world, "results.json") and sweep.poll() is None:
        time.sleep(0.1)
    sweep.terminate()
    _, errors = sweep.communicate(timeout=60)  # its workers hold the pipes open while they live
    assert sweep.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors


def test_two_sweeps_on_one_folder_share_the_work(world):
    both = [start(world, "1", "2", methods="ZeroshotCLIP,TextTeacherMix") for _ in range(2)]
    for sweep in both:
        finish(sweep)
    assert not files(world, "failed.txt")
    assert len(files(world, "results.json")) == 3 * 2 * 2  # the teacher is made though nobody asked


@pytest.mark.slow
def test_a_sweep_killed_at_any_moment_gives_the_results_of_an_uninterrupted_one(tmp_path):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    for folder in (quiet, killed):
        folder.mkdir()
        write_features(folder / "animals.npz")
    finish(start(quiet, "1", "2", workers=2))
    draw, kills, sweep = random.Random(0), 0, start(killed, "1", "2", workers=2)
    while sweep.returncode is None:
        done = len(files(killed, "results.json")) + draw.randint(1, 4)
        while sweep.poll() is None and len(files(killed, "results.json")) < done:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 0.5))
        if sweep.poll() is None:
            os.killpg(sweep.pid, signal.SIGKILL)  # the launcher and its workers are one group
            sweep.communicate()
            kills += 1
            sweep = start(killed, "1", "2", workers=2)
    finish(sweep)
    assert kills >= 2
    tensors, results = outcome(quiet)
    tensors_of_killed, results_of_killed = outcome(killed)
    assert len(tensors) == 2 * 3 and tensors_of_killed == tensors
    assert len(results) == 2 * 8 and results_of_killed == results
    assert not files(killed, "failed.txt")
