"""Test machines that lack disk space, memory, shared memory, network, permissions or Unix functions."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import fake_data
import killing
import numpy as np
import pytest
import torch
from conftest import ROOT, write_features
from dassl.config import get_cfg_default
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import save_checkpoint
from sweeps import planned_jobs

from dfzsl import train
from dfzsl.datasets import encoding, extract
from dfzsl.datasets.encoding import _Images
from dfzsl.io import files
from dfzsl.io.files import atomic, write_json
from dfzsl.io.results import VOLATILE_KEYS, peak_memory
from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.launch import workers
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.utils import errors
from dfzsl.utils.errors import UserError


def words(folder: Path, trainer: str, output: str, **keys: object) -> list[str]:
    given = ["--trainer", trainer, "--root", str(folder / "animals.npz"), "--seed", "1"]
    given += ["--dataset-config-file", str(ROOT / "configs/datasets" / "features.yaml")]
    given += ["--output-dir", str(folder / output), "DATASET.SUBSAMPLE_CLASSES", "base"]
    settings = {
        "RECOVERY.NUM_PER_CLASS": 8,
        "GENERATOR.NAME": "vmf",
        "GENERATOR.CLASSIFIER_STEPS": 10,
        **keys,
    }
    return given + [str(word) for pair in settings.items() for word in pair]


@pytest.fixture
def world(tmp_path) -> Path:
    write_features(tmp_path / "animals.npz", per_class=8)
    return tmp_path


def one_line(run, capfd) -> str:
    """The one line that a failing command prints; its exit code is 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        train.run_program(run)
    said = capfd.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert left.value.code == 2 and len(errors) == 1 and "Traceback" not in "\n".join(said)
    return errors[0]


def results(path: Path) -> dict:
    found = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key not in (*VOLATILE_KEYS, "versions", "config")}


def test_a_full_disk_at_each_file_in_turn(world, monkeypatch, capfd, tried):
    """Every write of a run fails once; the run is given again each time, and ends as one on an empty disk."""
    train.main(words(world, "TeacherZeroshot", "owner"))
    given = words(world, "DFZSL", "whole", **{"TEACHER.FILE": world / "owner" / "teacher.safetensors"})
    train.main(given)
    given[given.index(str(world / "whole"))] = str(world / "full")
    failed = 0
    real = files.os.open
    for budget in range(1, 100):
        seen = 0

        def scarce(path, flags, *args, **kwargs):
            nonlocal seen
            if flags & os.O_CREAT and str(path).startswith(str(world)):
                seen += 1
                if seen >= budget:  # noqa: B023
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
            return real(path, flags, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "open", scarce)
            try:
                train.main(given)
            except OSError as error:
                failed += 1
                assert "No space left" in errors.describe_user_error(error)
            else:
                break
    assert failed >= 3  # virtual classes, classifier, results
    for name in ("virtual.safetensors", "classifier.safetensors"):
        assert (world / "full" / name).read_bytes() == (world / "whole" / name).read_bytes()
    assert results(world / "full" / "results.json") == results(world / "whole" / "results.json")
    assert not [path for path in (world / "full").rglob(".*.tmp")]
    tried("machine", "disk full at each file in turn", failed, "one line; then the same bytes")


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 7, 100, 5_000])
@pytest.mark.parametrize("what", ["json", "tensors", "checkpoint"])
def test_a_disk_that_is_full_within_a_file(size, what, tmp_path, tried):
    """The limit of the kernel on a file's size stands for the disk: C and Rust code meet it too."""
    assert killing.attempt(_write, what, tmp_path, size, folder=tmp_path)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ["said.txt"]
    said = (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert "too large" in said and "\n" not in said
    tried(
        "machine", "disk full within a file (JSON, tensors, checkpoints)", 1, "one line, nothing left behind"
    )


def _write(what: str, folder: Path, size: int) -> None:
    import resource

    tensors = {"x": torch.zeros(100, 100)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        if what == "json":
            write_json(folder / "a.json", ["x" * 10_000])
        elif what == "tensors":
            save_tensors(folder / "a.safetensors", tensors, {"kind": "test"})
        else:
            state = {"state_dict": tensors, "epoch": 1}
            save_checkpoint(state, str(folder))
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said = errors.describe_user_error(error) or f"a traceback\n{type(error)} {error}"
        (folder / "said.txt").write_text(said, encoding="utf-8")


def test_folders_that_cannot_be_written(world, capfd, monkeypatch, tried):
    (world / "file").write_text("in the way")
    said = one_line(lambda: train.main(words(world, "ZeroshotCLIP", "file/output")), capfd)
    assert "file/output" in said or "Not a directory" in said
    data = extract.open_dataset("oxford_pets", str(fake_data.make("OxfordPets", world / "data")))
    output = world / "pets.safetensors"

    def encode(cache: Path) -> None:
        extract.extract(data, fake_data.Backbone(), output, num_workers=0, cache_dir=cache)

    assert "set the environment variable DFZSL_CACHE" in one_line(lambda: encode(world / "file"), capfd)
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
        return real(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "open", read_only)
        assert "Read-only file system" in one_line(lambda: encode(world / "cache"), capfd)
    encode(world / "cache")
    tried("machine", "output folder or cache that cannot be written", 3, "one line that names the way out")


OUT_OF_MEMORY = {
    "python": MemoryError(),
    "numpy": lambda: np.zeros(2**52, dtype="float64"),
    "torch, CPU": lambda: torch.empty(2**60, dtype=torch.uint8),
    "torch, GPU": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


@pytest.mark.parametrize("who", OUT_OF_MEMORY)
def test_out_of_memory_names_the_knobs(who, world, monkeypatch, capfd, tried):
    def exhausted(self) -> None:
        error = OUT_OF_MEMORY[who]
        if isinstance(error, Exception):
            raise error
        error()

    monkeypatch.setattr(TRAINER_REGISTRY.get("TeacherZeroshot"), "train", exhausted)
    said = one_line(lambda: train.main(words(world, "TeacherZeroshot", "output")), capfd)
    for knob in ("DATALOADER.TRAIN_X.BATCH_SIZE", "DATALOADER.TEST.BATCH_SIZE", "RECOVERY.NUM_PER_CLASS"):
        assert knob in said
    tried("machine", "out of memory (Python, numpy, torch, GPU)", 1, "one line, with the knobs")


class Deadly:
    """A picture's transform that ends its process, as a full /dev/shm does."""

    def __call__(self, image: object) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGBUS)
        return torch.zeros(3)


def test_a_loader_process_that_dies(tmp_path, capfd, tried):
    data = extract.open_dataset("oxford_pets", str(fake_data.make("OxfordPets", tmp_path)))

    def encode() -> None:
        encoding.encode_datums(fake_data.Backbone(), data.test, Deadly(), batch_size=4, num_workers=2)

    said = one_line(encode, capfd)
    assert "/dev/shm" in said and "DATALOADER.NUM_WORKERS 0" in said
    error = RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
    )
    assert "DATALOADER.NUM_WORKERS 0" in errors.describe_user_error(error)
    tried("machine", "/dev/shm missing or full: a loader process dies", 2, "one line that names NUM_WORKERS")


def test_no_network(monkeypatch, capfd, tried, tmp_path):
    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("HOME", str(tmp_path))
    for tag in ("openai", "laion400m_e32"):
        said = one_line(lambda: load_backbone("ViT-B-32", tag), capfd)  # noqa: B023
        assert "cannot fetch the weights" in said and "MODEL.BACKBONE.WEIGHTS /path/to/file" in said
    tried("machine", "no network: weights that are not there", 2, "one line that says where to get them")


# ---------------------------------------------------------------- other systems


def test_memory_is_not_measured_where_it_cannot_be(monkeypatch):
    assert peak_memory() > 0
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() == 0


def test_a_sweep_without_submitit(world, monkeypatch):
    """On Windows the command itself is the worker."""
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr(sys, "platform", "win32")
    given = ["base2new", "--methods", "ZeroshotCLIP", f"features:{world / 'animals.npz'}", "1"]
    jobs = planned_jobs([*given, "--output", str(world / "out")])
    workers.launch(jobs, "local", 2, 0, world / "out")
    assert jobs[0].finished
    windows = [str(path.relative_to(world)) for path in (world / "out").rglob("*")]
    assert not [name for name in windows if set(name) & set('<>:"|?*')]


def test_what_loader_processes_get_can_be_sent_to_them():
    """macOS and Windows start them afresh, so everything goes through pickle."""
    cfg = get_cfg_default()
    for transform in (load_backbone("shapes").transform, *(build_transform(cfg, is_train=k) for k in (0, 1))):
        pickle.loads(pickle.dumps(_Images(["a.jpg"], transform)))


def test_new_files_have_the_rights_that_files_have_here(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"kind": "test"})
        with atomic(tmp_path / "a.txt") as temporary:
            temporary.write_text("a", encoding="utf-8")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o640"}
    assert load_tensors(tmp_path / "a.safetensors", "test")[0]["x"].item() == 0


def test_a_mistake_is_told_apart_from_a_defect():
    assert errors.describe_user_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert errors.describe_user_error(UserError("two\nlines")) is not None


FULL = """
import subprocess
import sys
from dassl.utils import Logger
from dfzsl.utils.errors import run_program

def run():
    sys.stdout = Logger("/dev/full")
    print("x" * 10_000)

run_program(run)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's disk that is always full")
def test_a_log_on_a_full_disk_is_one_line_that_names_it(tried):
    ended = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: /dev/full: No space left on device\n")
    tried("machine", "disk full at the log", 1, "one line that names the file")


def test_a_full_disk_is_told_with_the_file_it_was_for(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"a\.json") as error:
        write_json(tmp_path / "a.json", 1)
    assert errors.describe_user_error(error.value) == f"{tmp_path / 'a.json'}: No space left on device"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, tried):
    """A power cut takes nothing that has its name. The order of calls is what can be tested."""
    done: list[str] = []

    def note(what: str, real):
        def call(first, *rest):
            if what == "replace":
                done.append("name")
            elif what == "fsync":
                done.append("folder" if os.path.isdir(f"/proc/self/fd/{first}") else "file")
            return real(first, *rest)

        return call

    for what in ("fsync", "replace"):
        monkeypatch.setattr(os, what, note(what, getattr(os, what)))
    write_json(tmp_path / "a.json", 1)
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"kind": "test"})
    save_checkpoint({"state_dict": {}, "epoch": 1}, str(tmp_path / "model"))
    order = ["file", "name", *(["folder"] if os.name == "posix" else [])]
    assert done == order * 4  # a checkpoint is two files
    tried("machine", "power cut: flushed before the name is given, and the name", 4, "file, name, folder")


MISTAKE = "import dfzsl.trainers; {hook}; from dfzsl.utils.errors import UserError; raise {kind}('a mistake')"
HOOK = "from dfzsl.utils.errors import install_excepthook; install_excepthook()"


@pytest.mark.parametrize(
    ("kind", "hook", "code", "shown"),
    [
        ("UserError", HOOK, 2, "error: a mistake\n"),
        ("KeyError", HOOK, 1, "Traceback"),
        ("UserError", "pass", 1, "Traceback"),
    ],
)
def test_a_mistake_in_a_program_of_the_users(kind, hook, code, shown):
    """CoOp's train.py knows nothing of `run_program`; its user may ask for the hook."""
    program = MISTAKE.format(kind=kind, hook=hook)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == code and ended.stderr.startswith(shown)


def test_importing_changes_nothing_of_the_process():
    program = """
import gc, resource, sys, threading
state = lambda: (
    (sys.excepthook, threading.excepthook, len(sys.meta_path), list(sys.path)),
    (gc.get_freeze_count(), resource.getrlimit(resource.RLIMIT_AS)),
)
import dassl, torch
before = state()
import dfzsl, dfzsl.trainers, dfzsl.datasets, dfzsl.train
from dfzsl.trainers.clip.backbone import import_open_clip
import_open_clip()
assert state() == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
