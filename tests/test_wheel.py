"""The wheel in a fresh environment: everything is there, and a real Dassl goes before ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy of the checkout, as it is, without what an earlier build left."""
    source, made = tmp_path_factory.mktemp("source") / "dfzsl", tmp_path_factory.mktemp("wheel")
    made_here = {"build", "dist", "output", "data"}  # by runs and builds, in the checkout's root

    def ignored(folder: str, names: list[str]) -> set[str]:
        hidden = {
            name for name in names if name.startswith(".") or name.endswith(("egg-info", "__pycache__"))
        }
        return hidden | (made_here if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(made), str(source)], check=True)
    return next(made.glob("dfzsl-*.whl"))


@pytest.fixture(scope="module")
def bin(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel. It sees the libraries of this one, but nothing that is installed
    editable, as the checkout and its drop-in are."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    bin = folder / ("Scripts" if os.name == "nt" else "bin")
    site = subprocess.run(
        [bin / "python", "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    libraries = [path for path in sys.path if path.endswith("-packages")]
    (Path(site) / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    pip = [sys.executable, "-m", "pip", "--python", str(bin / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--force-reinstall", str(wheel)], check=True)
    return bin


def call(bin: Path, folder: Path, *words: object) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [bin / str(words[0]), *map(str, words[1:])],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", "DFZSL_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for path in (
        "drop_in/dassl/engine/trainer.py",
        "configs/trainers/DFZSL/dfzsl.yaml",
        "py.typed",
        "__init__.pyi",
    ):
        assert f"dfzsl/{path}" in names
    assert any(name.endswith("shapes/clip.safetensors") for name in names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"dfzsl"}, (
        "nothing shadows others' packages"
    )


def test_a_fresh_environment_builds_a_classifier(bin, tmp_path):
    program = """if True:
        import dassl, dfzsl, torch
        from dfzsl.trainers.clip.loading import load_backbone
        from dfzsl.trainers.recovery.teacher import Teacher
        print(dassl.__file__, dfzsl.__file__, sep="\\n")
        names = ["red star", "blue circle", "green square", "striped red circle"]
        backbone = load_backbone("shapes")
        rows = backbone.class_features(names, ["a photo of a {}."])
        Teacher(rows - rows.mean(0), names, backbone.identity).save("teacher.safetensors")
    """.replace("import dassl, dfzsl, torch", "import dfzsl, dassl, torch")
    places = call(bin, tmp_path, "python", "-c", program).split()
    assert all(str(bin.parent) in place for place in places), places
    assert Path(places[0]).parts[-4:-1] == ("dfzsl", "drop_in", "dassl")
    assert "Usage: dfzsl" in call(bin, tmp_path, "dfzsl", "--help")
    settings = ("OPTIM.MAX_EPOCH", "1", "RECOVERY.NUM_PER_CLASS", "8")
    out = call(
        bin, tmp_path, "dfzsl", "build", "--teacher", "teacher.safetensors", "--new", "yellow ring", *settings
    )
    assert "4 base + 1 new classes" in out
    assert "yellow ring" in call(bin, tmp_path, "dfzsl", "show", "classifier.safetensors")


def test_a_real_dassl_wins(bin, tmp_path):
    (tmp_path / "dassl").mkdir()
    (tmp_path / "dassl/__init__.py").write_text("real = True\n")
    assert call(bin, tmp_path, "python", "-c", "import dfzsl, dassl; print(dassl.real)") == "True\n"
