"""README's "In a CoOp checkout", typed in a checkout in CoOp's manner."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fake_data
import pytest
from conftest import ROOT
from test_checkouts import checkout

from dfzsl.io.results import read_results
from dfzsl.trainers.generation.classifier import Classifier

pytestmark = pytest.mark.slow


@pytest.fixture
def section() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8").partition("## In a CoOp checkout\n")[2]


@pytest.fixture
def theirs(section, tmp_path) -> Path:
    """A stand-in of CoOp's checkout with the line that the README has its reader add."""
    folder = checkout("coop", tmp_path / "CoOp", commit=False)
    (plugin,) = set(re.findall(r"`(import dfzsl[.\w]*)`", section))
    program = (folder / "train.py").read_text()
    last = re.findall("^(?:import|from) .*\n", program, re.MULTILINE)[-1]
    (folder / "train.py").write_text(program.replace(last, f"{last}{plugin}\n"))
    return folder


def test_the_commands_do_what_is_said(section, theirs, tmp_path):
    """With pictures made up and the built-in CLIP in place of ViT-B/16."""
    data = fake_data.make("OxfordPets", tmp_path / "data")
    installing, block = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert all(line.startswith("pip install /path/to/this/checkout") for line in installing.splitlines())
    block += block.split("\n\n")[-1].replace("CLASSES new", "CLASSES all").replace("client_new", "client_all")
    script = block.replace("/path/to/data", str(data)).replace("--backbone ViT-B/16", "--backbone shapes")
    done = subprocess.run(
        ["bash", "-e", "-u", "-c", script],
        cwd=theirs,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    output = theirs / "output"
    classifier = Classifier.load(output / "client/classifier.safetensors")
    base, new = classifier.classnames[:3], classifier.classnames[3:]
    assert classifier.is_new.tolist() == [False] * 3 + [True] * 2
    tested = {"owner": base, "client": base, "client_new": new, "client_all": [*base, *new]}
    for run, names in tested.items():
        results = read_results(output / run / "results.json")
        assert [row["class"] for row in results["per_class"]] == names
        assert results["images_used"] == (12 if run == "owner" else 0)
