"""docs/end_to_end.sh, and the trainer beside it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from dfzsl import train
from dfzsl.configs import CONFIGS
from dfzsl.io.class_names import read_classnames
from dfzsl.io.results import read_results

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def served(teacher: Path, ledger: Path) -> Iterator[str]:
    """The address of `dfzsl teacher serve`, for as long as the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "dfzsl.cli.main", "teacher", "serve", teacher, "--port", port, "--ledger", ledger]
    server = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def test_the_script_does_what_the_trainer_does(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "docs/end_to_end.sh"), str(tmp_path / "e2e")],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "e2e"
    said = {name: re.search(rf"^{name} +([\d.]+)", done.stdout, re.M)[1] for name in ("base", "new", "H")}
    for name in ("classifier.onnx", "confusion.png", "classifier.safetensors", "teacher.safetensors"):
        assert (folder / name).stat().st_size > 10_000

    words = ["--trainer", "DFZSL", "--seed", "1"]
    words += ["--dataset-config-file", str(CONFIGS / "datasets/shapes.yaml")]
    words += ["--config-file", str(CONFIGS / "trainers/DFZSL/dfzsl.yaml"), "--backbone", "shapes"]
    words += ["--root", str(tmp_path / "data"), "TEACHER.ACCESS", "labels", "TRAINER.DFZSL.NEW_CLASSES"]
    words += [repr(tuple(read_classnames(str(folder / "new.txt"))))]
    log = (folder / "access.log").read_text()
    assert '"status": 200' in log and os.environ.get("DFZSL_TEACHER_TOKEN", "Bearer") not in log
    with served(folder / "teacher.safetensors", tmp_path / "other.ledger") as address:
        words += ["TEACHER.FILE", address]
        # The class that came later is one that the trained model does not know.
        for part, more in (("base", []), ("new", ["--eval-only", "--model-dir", str(tmp_path / "base")])):
            output = ["--output-dir", str(tmp_path / part)]
            train.main([*more, *output, *words, "DATASET.SUBSAMPLE_CLASSES", part])
            assert said[part] == f"{read_results(tmp_path / part / 'results.json')['accuracy']:.1f}"
