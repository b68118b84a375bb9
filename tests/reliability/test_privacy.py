"""Test that a data-free run opens no training image, does not depend on them, and stores nothing of them."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_data
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from dfzsl import train
from dfzsl.io.results import VOLATILE_KEYS
from dfzsl.trainers.recovery.teacher import Teacher

# Records every file that the process opens, by whatever library, in the file named by the first argument.
RECORD = """
import os, sys
record = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def note(event, arguments):
    if event in ("open", "os.open", "os.posix_spawn", "subprocess.Popen"):
        os.write(record, f"{arguments[0]}\\n".encode("utf-8", "surrogateescape"))

sys.addaudithook(note)
"""
RUN = f"""{RECORD}
from dfzsl import train
train.run_program(train.main)
"""
# The second argument lists commands of `dfzsl` in JSON.
COMMANDS = f"""{RECORD}
import json
from dfzsl.cli.main import entry
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        entry()
    except SystemExit as end:
        assert not end.code, words
"""
PRESET = ["RECOVERY.NUM_PER_CLASS", "8", "OPTIM.MAX_EPOCH", "1", "DATALOADER.NUM_WORKERS", "0"]


def words(folder: Path, config: str, root: Path, teacher: Path, backbone: str) -> list[str]:
    """The arguments of a data-free run in `folder`."""
    given = ["--trainer", "DFZSL", "--dataset-config-file", str(ROOT / f"configs/datasets/{config}.yaml")]
    given += [
        "--config-file",
        str(ROOT / "configs/trainers/DFZSL/dfzsl.yaml"),
        "--root",
        str(root),
        "--seed",
        "1",
    ]
    given += [
        "--output-dir",
        str(folder),
        "DATASET.SUBSAMPLE_CLASSES",
        "base",
        "MODEL.BACKBONE.NAME",
        backbone,
    ]
    return [*given, "TEACHER.FILE", str(teacher), *PRESET]


def watched(folder: Path, *given: object) -> set[str]:
    """Run in a process of its own; the paths of all files that it opened."""
    record = folder.with_name("opened")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(record), *words(folder, *given)],  # type: ignore[arg-type]
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DFZSL_CACHE": str(folder.with_name("cache"))},
    )
    assert done.returncode == 0, done.stderr
    return set(record.read_text(encoding="utf-8", errors="surrogateescape").splitlines())


def again(folder: Path, *given: object) -> Path:
    """The same run anew, in this process."""
    shutil.rmtree(folder)
    train.main(words(folder, *given))  # type: ignore[arg-type]
    return folder


def results(folder: Path) -> dict:
    """results.json without clocks, memory and the folder's own name."""
    return {
        k: v for k, v in json.loads((folder / "results.json").read_text()).items() if k not in VOLATILE_KEYS
    }


MADE = ("virtual.safetensors", "classifier.safetensors")


def left(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in MADE}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """A finished run on images: arguments, folder, what it opened, training and test images."""
    root = tmp_path_factory.mktemp("images")
    fake_data.make("DescribableTextures", root)
    split = json.loads((root / "dtd/split_zhou_DescribableTextures.json").read_text())
    training, tests = (
        {str(root / "dtd/images" / row[0]) for part in parts for row in split[part] if row[1] < 3}
        for parts in (("train", "val"), ("test",))
    )
    names = sorted({(row[1], row[2]) for row in split["train"]})[:3]
    rows = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    (root / "owner").mkdir()
    teacher = root / "owner/teacher.safetensors"
    Teacher(rows - rows.mean(0), [name for _, name in names]).save(teacher)
    given = (root / "client/out", "dtd", root, teacher, "shapes")
    (root / "client").mkdir()
    return SimpleNamespace(
        given=given, folder=given[0], opened=watched(*given), training=training, tests=tests
    )


def test_a_data_free_run_opens_no_training_image(run, tried):
    assert run.tests | {str(run.given[3])} <= run.opened, "the record holds what a run must open"
    assert not {os.path.realpath(path) for path in run.opened} & run.training
    tried("privacy", "files that a data-free run on images opens", len(run.opened), "no training image")


def test_the_commands_open_no_training_image(run, tmp_path, tried):
    """`dfzsl build`, add, predict, evaluate and show, in the folder of the data set."""
    tests = next(iter(run.tests))
    labeled = tmp_path / "labeled"
    for path in sorted(run.tests):
        (labeled / Path(path).parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, labeled / Path(path).parent.name)
    record, made = tmp_path / "opened", tmp_path / "classifier.safetensors"
    commands = (
        [
            "build",
            "--teacher",
            run.given[3],
            "--new",
            "zigzagged",
            "--backbone",
            "shapes",
            "-o",
            made,
            *PRESET,
        ],
        ["add", made, "--new", "polka-dotted"],
        ["predict", tests, "-c", made, "--workers", "0"],
        ["evaluate", labeled, "-c", made, "--workers", "0"],
        ["show", made],
    )
    subprocess.run(
        [sys.executable, "-c", COMMANDS, record, json.dumps(commands, default=str)],
        check=True,
        capture_output=True,
        cwd=run.given[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DFZSL_CACHE": str(tmp_path / "cache")},
    )
    opened = set(record.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    assert {tests, str(run.given[3])} <= opened, "the record holds what the commands must open"
    assert not {os.path.realpath(run.given[2] / path) for path in opened} & run.training
    tried("privacy", "files that the commands of dfzsl open", len(opened), "no training image")


def test_a_run_leaves_nothing_but_what_the_client_had(run, tried):
    training = {Path(path).name.encode() for path in run.training}
    user, home = getpass.getuser().encode(), str(Path.home()).encode()
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {*MADE, "log.txt", "results.json"} <= {path.name for path in files}
    for path in files:
        assert not any(name in path.read_bytes() for name in training), path
    for name in MADE:
        with safe_open(run.folder / name, framework="pt") as file:
            about = {key: json.loads(value) for key, value in file.metadata().items()}
            rows = {"mu", "kappa", "weight", "is_new", "bias", "shift", "text_map", "text_shift", "context"}
            assert set(file.keys()) <= rows
        known = {"kind", "classnames", "queries", "method", "level", "backbone", "error", "known_weight"}
        assert set(about) <= known | {"temperature", "new_bias", "weights", "templates", "prompts", "words"}
        content = (run.folder / name).read_bytes()
        assert str(run.given[2]).encode() not in content and home + b"/" not in content
        assert len(user) < 5 or user not in content
    tried(
        "privacy",
        "files that a run leaves, searched",
        len(files),
        "no training image, user or folder is named",
    )


def test_without_the_training_images_not_a_byte_differs(run, tried):
    first, told = left(run.folder), results(run.folder)
    for path in run.training:
        Path(path).write_bytes(b"no picture")
        Path(path).chmod(0)
    again(*run.given)
    assert (left(run.folder), results(run.folder)) == (first, told)
    for path in run.training:
        os.unlink(path)
    again(*run.given)
    assert (left(run.folder), results(run.folder)) == (first, told)
    tried("privacy", "training images unreadable, then deleted", len(run.training), "the same bytes")


def test_no_training_feature_of_a_feature_file_is_reachable(tmp_path, tried):
    """The same file with other training features, without them, and with bytes that are none."""
    whole = dict(np.load(fake_data.make("Features", tmp_path / "data")))
    rows = torch.randn(3, fake_data.DIM, generator=torch.Generator().manual_seed(0))
    Teacher(rows - rows.mean(0), list(fake_data.NAMES[:3])).save(tmp_path / "teacher.safetensors")
    training = [name for name in whole if name.endswith(("_train", "_val"))]
    assert len(training) == 4
    changes = [
        whole,
        {
            n: np.full_like(a, np.nan) if n in training and a.dtype.kind == "f" else a
            for n, a in whole.items()
        },
        {name: array for name, array in whole.items() if name not in training},
        {n: np.array([b"\x80 no array"]) if n in training else a for n, a in whole.items()},
    ]
    path, folder = tmp_path / "data/features.npz", tmp_path / "out"
    folder.mkdir()
    found = []
    for arrays in changes:
        np.savez(path, **arrays)
        again(folder, "features", path, tmp_path / "teacher.safetensors", "")
        found.append((left(folder), results(folder)))
    assert all(outcome == found[0] for outcome in found)
    tried("privacy", "training features of a feature file changed or gone", len(changes), "the same bytes")


def test_results_do_not_tell_where_somebody_lives(tmp_path, monkeypatch):
    """Results are passed on; a path below the home folder is written with ~."""
    from dassl.config import get_cfg_default

    from dfzsl.io.results import write_results

    monkeypatch.setenv("HOME", "/home/alice.example")
    cfg = get_cfg_default()
    cfg.merge_from_list(["DATASET.ROOT", "/home/alice.example/data", "OUTPUT_DIR", "/home/alice.example/o"])
    write_results(tmp_path / "results.json", cfg)
    text = (tmp_path / "results.json").read_text()
    assert "alice" not in text and "~/data" in text
