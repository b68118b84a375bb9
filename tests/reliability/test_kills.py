"""Kill runs at any file operation, byte or moment, resume them, and compare with uninterrupted runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import ANY

import fake_data
import killing
import numpy as np
import pytest
import torch
from conftest import ROOT, unit, write_features
from sweeps import planned_jobs
from test_sweep import METHODS, files, finish, outcome, start

from dfzsl import train
from dfzsl.io.results import VOLATILE_KEYS
from dfzsl.launch import workers
from dfzsl.launch.runs import Job
from dfzsl.trainers import teacher_zeroshot
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.dfzsl import DFZSL
from dfzsl.trainers.generation.generators import NeuralGenerator
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.teacher import Teacher, fit_teacher
from dfzsl.utils.errors import UserError

KILLS = 50
NAMES = [f"{pattern} {shape}" for pattern in ("striped", "dotted", "plain") for shape in ("star", "circle")]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Features around the built-in backbone's text features, with a training and a validation part."""
    rng = np.random.default_rng(0)
    text = load_backbone("shapes").class_features(NAMES, ["a photo of a {}."]).numpy()
    labels = np.repeat(np.arange(len(NAMES)), 12)
    moved = text.mean(0) + 0.5 * (text - text.mean(0)) + 0.4 * unit(rng.normal(size=text.shape[1]))
    noise = rng.normal(size=(3, len(labels), text.shape[1])) / text.shape[1] ** 0.5
    parts = zip(("train", "val", "test"), unit(moved[labels] + 0.5 * noise), strict=True)
    path = tmp_path_factory.mktemp("world") / "objects.npz"
    arrays = {name: part for split, x in parts for name, part in ((f"x_{split}", x), (f"y_{split}", labels))}
    np.savez(path, classnames=np.array(NAMES), **arrays)
    return path


def words(trainer: str, world: Path, **keys: object) -> list[str]:
    given = ["--trainer", trainer, "--root", str(world), "--seed", "1"]
    given += ["--dataset-config-file", str(ROOT / "configs/datasets" / "features.yaml")]
    keys = {
        "MODEL.BACKBONE.NAME": "shapes",
        "DATASET.SUBSAMPLE_CLASSES": "base",
        "DATALOADER.TRAIN_X.BATCH_SIZE": 8,
        "RECOVERY.NUM_PER_CLASS": 8,
        "OPTIM.MAX_EPOCH": 4,
        "TRAIN.CHECKPOINT_FREQ": 1,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    return given + [str(word) for pair in keys.items() for word in pair]


def results(folder: Path) -> dict:
    """Return results.json without fields that depend on the clock."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key not in (*VOLATILE_KEYS, "versions")}


def made(folder: Path) -> dict[str, bytes]:
    """Return the files of a run's stages and checkpoints, byte for byte."""
    kept = [*folder.rglob("*.safetensors"), *folder.rglob("*.pth.tar*"), *folder.rglob("*.json")]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in kept
        if path.name[0] != "." and ".partial-" not in path.name and path.name != "results.json"
    }


def kill_until_done(
    folder: Path, run: Callable[..., None], compare: Callable[[int], None], sizes: tuple[int, int]
) -> int:
    """Kill run(**fault) again and again, each time in a new `folder` when it is done, `KILLS` times or more.

    `compare(kills)` looks at what a finished run left, which was killed so often. Returns all kills.
    """
    started = time.perf_counter()
    assert run()
    seconds = time.perf_counter() - started
    compare(0)
    total, seed = 0, 0
    while total < KILLS:
        shutil.rmtree(folder)
        folder.mkdir()
        kills, seed = 0, seed + 1
        for fault in killing.faults(seconds, sizes, seed):
            if run(**fault):
                break
            kills += 1
        compare(kills)
        total += kills
    return total


def kill_run(given: list[str], folder: Path, sizes: tuple[int, int] = (2_000, 60_000)) -> tuple[int, int]:
    """`kill_until_done` for a train.py command line; returns the kills, and how many runs were finished."""
    expected: list = []
    finished = 0
    folder.mkdir(exist_ok=True)

    def run(**fault) -> bool:
        log = folder / "calls.txt"
        return killing.attempt(killing.run, given, str(folder / "run"), log, folder=folder / "run", **fault)

    def compare(kills: int) -> None:
        nonlocal finished
        finished += 1
        found = made(folder / "run"), results(folder / "run")
        expected[:] = expected or found
        assert found[0].keys() == expected[0].keys()
        assert [name for name in found[0] if found[0][name] != expected[0][name]] == []
        assert found[1] == expected[1]
        noted = killing.calls(folder / "calls.txt")
        assert noted and not any(done for _, done in noted)  # nothing is begun again after its end

    return kill_until_done(folder, run, compare, sizes), finished


def test_a_used_folder_refuses_another_teacher(world, teacher, tmp_path):
    """The folder's config.yaml names the same file; what is in the file has changed."""
    teacher.save(tmp_path / "teacher.safetensors")
    keys = {"TEACHER.FILE": tmp_path / "teacher.safetensors", "OPTIM.MAX_EPOCH": 1}
    given = ["--output-dir", str(tmp_path / "run"), *words("CoOp", world, **keys)]
    train.main(given)
    train.main(given)
    teacher.weight = teacher.weight.flip(0)
    teacher.save(tmp_path / "teacher.safetensors")
    with pytest.raises(UserError, match="teacher"):
        train.main(given)


def test_a_resumed_run_keeps_its_curves_and_stages(world, teacher, tmp_path, monkeypatch):
    teacher.save(tmp_path / "teacher.safetensors")
    keys = {"TEACHER.FILE": tmp_path / "teacher.safetensors", "OPTIM.MAX_EPOCH": 2, "GENERATOR.NAME": "vmf"}
    given = words("DFZSL", world, **keys)
    train.main(["--output-dir", str(tmp_path / "whole"), *given])
    with monkeypatch.context() as patch:
        patch.setattr(DFZSL, "test", lambda self: sys.exit("after the last stage"))
        with pytest.raises(SystemExit):
            train.main(["--output-dir", str(tmp_path / "cut"), *given])
    for stage in ("run_epoch", "generate"):
        monkeypatch.setattr(DFZSL, stage, lambda self: pytest.fail("a finished stage is done again"))
    train.main(["--output-dir", str(tmp_path / "cut"), *given])
    assert results(tmp_path / "cut") == {**results(tmp_path / "whole"), "config": ANY}
    assert len(results(tmp_path / "cut")["curves"]["loss"]) == 2


@pytest.mark.parametrize("at", [2, 5])
def test_an_interrupted_generator_resumes(at, world, teacher, tmp_path, monkeypatch):
    """In training on all classes, or on a fold of the calibration."""
    teacher.save(tmp_path / "teacher.safetensors")
    keys = {"TEACHER.FILE": tmp_path / "teacher.safetensors", "OPTIM.MAX_EPOCH": 1, "GENERATOR.NAME": "cvae"}
    keys |= {"GENERATOR.EPOCHS": 3, "GENERATOR.HIDDEN": 8, "GENERATOR.CLASSIFIER_STEPS": 5}
    given = words("DFZSL", world, **keys)
    train.main(["--output-dir", str(tmp_path / "whole"), *given])
    keep, kept = NeuralGenerator._save_checkpoint, []

    def cut(*args) -> None:
        keep(*args)
        kept.append(args[1])
        if len(kept) == at:
            sys.exit("in the middle")

    monkeypatch.setattr(NeuralGenerator, "_save_checkpoint", cut)
    with pytest.raises(SystemExit):
        train.main(["--output-dir", str(tmp_path / "cut"), *given])
    train.main(["--output-dir", str(tmp_path / "cut"), *given])
    assert len(kept) == 3 * (len(kept) // 3)  # no epoch is trained twice
    assert made(tmp_path / "cut") == made(tmp_path / "whole")
    assert not (tmp_path / "cut" / "generator").exists()


def test_a_fitted_teacher_is_not_fitted_again(world, tmp_path, monkeypatch):
    given = ["--output-dir", str(tmp_path), *words("TeacherZeroshot", world)]
    train.main(given)
    (tmp_path / "results.json").unlink()
    monkeypatch.setattr(teacher_zeroshot, "fit_teacher", lambda *_: pytest.fail("it is fitted again"))
    train.main(given)
    assert results(tmp_path)["trained_parameters"] > 0


def test_a_killed_sweep_has_recorded_its_settings(tmp_path, monkeypatch):
    """A run killed directly after its results refuses other settings."""
    write_features(tmp_path / "animals.npz")
    given = ["base2new", "--methods", "ZeroshotCLIP", f"features:{tmp_path / 'animals.npz'}", "1"]
    given += ["--output", str(tmp_path / "output")]

    def jobs(*opts: str) -> list[Job]:
        return planned_jobs([*given, *opts])

    def killed(words: list[str]) -> None:
        main(words)
        raise KeyboardInterrupt

    main = train.main
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "main", killed)
        workers.work(jobs("DATALOADER.TEST.BATCH_SIZE", "7"), threads=1)
    with pytest.raises(UserError, match=r"DATALOADER\.TEST\.BATCH_SIZE 7"):
        jobs()
    shutil.rmtree(tmp_path / "output")
    workers.work(jobs("TEACHER.FILE", "nowhere"), threads=1)  # a slip leaves no mark
    workers.work(jobs(), threads=1)
    assert jobs()[0].finished


@pytest.mark.slow
def test_the_owner(world, tmp_path, tried):
    kills, _ = kill_run(words("TeacherZeroshot", world), tmp_path / "owner")
    tried("killed", "the owner's teacher", kills, "the same bytes")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["CoOp", "KgCoOp"])
def test_training_of_prompts(trainer, world, tmp_path, tried):
    kills, _ = kill_run(words(trainer, world, TEST__FINAL_MODEL="best_val"), tmp_path / "prompts")
    tried("killed", f"training of prompts ({trainer})", kills, "the same bytes, no epoch twice")


class Server(ThreadingHTTPServer):
    """Teacher that answers labels over HTTP and records the hash of each request."""

    def __init__(self, teacher: Teacher) -> None:
        self.asked: list[str] = []
        oracle = open_oracle(teacher, "labels")

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                dim = teacher.weight.shape[1]
                self.reply({"classnames": teacher.classnames, "dim": dim, "backbone": teacher.backbone})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                asked.append(hashlib.sha256(body).hexdigest())
                self.reply({"labels": oracle(torch.tensor(json.loads(body)["features"])).tolist()})

            def reply(self, what: dict) -> None:
                text = json.dumps(what).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        asked = self.asked
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *_: object) -> None:
        """The client was killed."""


@pytest.fixture
def teacher(world) -> Teacher:
    base = load_backbone("shapes")
    arrays = np.load(world)
    keep = arrays["y_train"] < 3
    x, y = torch.from_numpy(arrays["x_train"][keep]).float(), torch.from_numpy(arrays["y_train"][keep])
    return fit_teacher(x, y, NAMES[:3], f"{base.name} ({base.weights_id})")


@pytest.mark.slow
def test_the_three_stages_with_a_teacher_behind_http(world, teacher, tmp_path, tried):
    server = Server(teacher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/"
        keys = {"TEACHER.FILE": address, "TEACHER.ACCESS": "labels", "RECOVERY.BISECTIONS": 5}
        keys |= {"GENERATOR.CLASSIFIER_STEPS": 40, "GENERATOR.NAME": "vmf"}
        kills, finished = kill_run(words("DFZSL", world, **keys), tmp_path / "client")
    finally:
        server.shutdown()
        server.server_close()
    tried("killed", "DFZSL, its teacher behind HTTP", kills, "the same bytes, no stage twice")
    # A killed client repeats the one request that was on its way, under the same key.
    assert len(server.asked) - finished * len(set(server.asked)) <= kills


@pytest.mark.slow
def test_extraction(tmp_path, tried):
    root = fake_data.make("OxfordPets", tmp_path / "data")
    folder = tmp_path / "run"
    folder.mkdir()
    expected: list[bytes] = []

    def run(**fault) -> bool:
        paths = (root, folder / "pets.safetensors", folder / "cache", folder.parent / "calls.txt")
        return killing.attempt(killing.encode, *paths, folder=folder, **fault)

    def compare(kills: int) -> None:
        expected[:] = expected or [(folder / "pets.safetensors").read_bytes()]
        assert (folder / "pets.safetensors").read_bytes() == expected[0]
        left = {path.suffix for path in (folder / "cache").iterdir() if path.name[0] != "."}
        assert left == {".safetensors"}  # no part is left behind
        encoded = len(killing.calls(folder.parent / "calls.txt"))
        (folder.parent / "calls.txt").unlink()
        assert 12 <= encoded <= 12 + kills  # 20, 10 and 15 pictures, four a part

    kills = kill_until_done(folder, run, compare, (40, 300))
    tried("killed", "extraction of features", kills, "the same bytes, no part twice")


@pytest.mark.slow
def test_a_sweep(tmp_path, tried):
    """Kill one or both of two workers on the same folder."""
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    asked = ["1", "2", "GENERATOR.NAME", "vmf", "GENERATOR.CLASSIFIER_STEPS", "20"]
    given = ["base2new", "--methods", METHODS, "features:animals.npz", *asked, "RECOVERY.NUM_PER_CLASS", "20"]
    for folder in (quiet, killed):
        folder.mkdir()
        write_features(folder / "animals.npz")
    finish(start(quiet, *asked))
    expected = outcome(quiet)

    def run(fault: dict) -> bool:
        return killing.attempt(killing.work, killed, given, folder=killed / "output", **fault)

    total, seed = 0, 0
    while total < KILLS:
        shutil.rmtree(killed / "output", ignore_errors=True)
        seed += 1
        faults = killing.faults(3.0, (3_000, 30_000), seed)
        survived = [False]
        while not all(survived):
            with ThreadPoolExecutor(2) as pool:
                workers = [pool.submit(run, next(faults)) for _ in range(2)]
            survived = [worker.result() for worker in workers]
            total += survived.count(False)
        assert outcome(killed) == expected
        assert files(killed, "settings.txt").keys() == files(quiet, "settings.txt").keys()
        assert not files(killed, "failed.txt")
    assert "8 finished already" in finish(start(killed, *asked))
    tried("killed", "a sweep, two workers at a time", total, "the same bytes")
