from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import CLASSES, ROOT, write_features
from dassl.config import get_cfg_default

from dfzsl import train
from dfzsl.io.results import read_results
from dfzsl.io.run_directory import RunDirectory
from dfzsl.utils.errors import UserError

CONFIGS = ROOT / "configs"


def words(trainer: str, data: Path, output: Path, *more: str) -> list[str]:
    config = CONFIGS / "trainers" / trainer / "features.yaml"
    return [
        *("--trainer", trainer, "--root", str(data), "--seed", "1", "--output-dir", str(output)),
        *("--dataset-config-file", str(CONFIGS / "datasets" / "features.yaml")),
        *(("--config-file", str(config)) if config.exists() else ()),
        *more,
    ]


@pytest.fixture
def teacher(feature_file, tmp_path) -> Path:
    train.main(
        words("TeacherZeroshot", feature_file, tmp_path / "owner", "DATASET.SUBSAMPLE_CLASSES", "base")
    )
    return tmp_path / "owner" / "teacher.safetensors"


def test_owner_then_client_beat_zero_shot_on_base_classes(feature_file, teacher, tmp_path):
    client = words("DFZSL", feature_file, tmp_path / "client", "DATASET.SUBSAMPLE_CLASSES", "base")
    train.main([*client, "TEACHER.FILE", str(teacher)])
    zero = words(
        "ZeroshotCLIP", feature_file, tmp_path / "zero", "--eval-only", "DATASET.SUBSAMPLE_CLASSES", "base"
    )
    train.main(zero)
    measured = read_results(tmp_path / "client" / "results.json")
    assert measured["accuracy"] > read_results(tmp_path / "zero" / "results.json")["accuracy"]
    assert measured["images_used"] == 0
    assert measured["queries"] > 0
    assert [row["class"] for row in measured["per_class"]] == list(CLASSES[:4])
    assert any("FLPT left out" in note for note in measured["notes"])


def test_same_seed_same_classifier(feature_file, teacher, tmp_path):
    written = []
    for name in ("one", "two"):
        client = words("DFZSL", feature_file, tmp_path / name, "DATASET.SUBSAMPLE_CLASSES", "base")
        train.main([*client, "TEACHER.FILE", str(teacher)])
        written.append((tmp_path / name / "classifier.safetensors").read_bytes())
    assert written[0] == written[1]


def test_a_data_free_run_needs_no_training_features(feature_file, teacher, tmp_path):
    """The client's file holds no training split at all, and the result is the same."""
    arrays = dict(np.load(feature_file))
    client_file = tmp_path / "client" / feature_file.name
    client_file.parent.mkdir()
    np.savez(client_file, **{name: array for name, array in arrays.items() if not name.endswith("_val")})
    accuracies = []
    for data, name in ((feature_file, "full"), (client_file, "bare")):
        client = words("DFZSL", data, tmp_path / name, "DATASET.SUBSAMPLE_CLASSES", "base")
        train.main([*client, "TEACHER.FILE", str(teacher)])
        accuracies.append(read_results(tmp_path / name / "results.json")["accuracy"])
    assert accuracies[0] == accuracies[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True, check=False
    )


def test_a_users_mistake_is_one_line_and_exit_code_2(feature_file, tmp_path):
    finished = run(*words("DFZLS", feature_file, tmp_path / "out"))
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "'DFZLS'" in finished.stderr and "Traceback" not in finished.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--trainer", "CoOpp"], "'CoOpp'.*CoOp"),
        (["DATASET.NAME", "Imagenet"], "'Imagenet'.*ImageNet"),
        (["--root", "/nowhere"], "/nowhere"),
        (
            ["TEACHER.FILE", "/nowhere/teacher.safetensors"],
            "TEACHER.FILE.*/nowhere/teacher.safetensors",
        ),
        (["DATASET.NAMED", "x"], "DATASET.NAMED"),
        (["--config-file", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(feature_file, tmp_path, change, message):
    base = words("ZeroshotCLIP", feature_file, tmp_path / "out", "--eval-only")
    with pytest.raises(UserError, match=message):
        train.main([*base, *change])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": np.ones((8, 16), "float32")}, "text"),
        ({"x_test": np.full((4, 32), np.nan, "float32"), "y_test": np.zeros(4, int)}, "x_test"),
        ({"classnames": np.array(["a"] * 8)}, "'a'"),
    ],
)
def test_a_broken_feature_file_is_named(tmp_path, changes, message):
    path = write_features(tmp_path / "broken.npz", **changes)
    with pytest.raises(UserError, match=message) as raised:
        train.main(words("ZeroshotCLIP", path, tmp_path / "out", "--eval-only"))
    assert "broken.npz" in str(raised.value)


def test_a_teacher_of_other_classes_is_refused(teacher, tmp_path):
    other = write_features(tmp_path / "other.npz", classnames=np.array([f"class {i}" for i in range(8)]))
    client = words("DFZSL", other, tmp_path / "client", "DATASET.SUBSAMPLE_CLASSES", "base")
    with pytest.raises(UserError, match="class names"):
        train.main([*client, "TEACHER.FILE", str(teacher)])
    assert not (tmp_path / "client" / "classifier.safetensors").exists()


def test_an_output_folder_of_another_experiment_is_refused(feature_file, tmp_path):
    train.main(words("ZeroshotCLIP", feature_file, tmp_path / "out", "--eval-only"))
    with pytest.raises(UserError, match=str(tmp_path / "out")):
        train.main(
            words(
                "ZeroshotCLIP", feature_file, tmp_path / "out", "--eval-only", "TEST.PER_CLASS_RESULT", "True"
            )
        )


def test_config_and_log_open_with_what_differs_from_the_defaults(feature_file, tmp_path, capsys):
    """These lines, given to train.py again, make the same config; a folder without them is still known."""
    output = tmp_path / "out"
    given = words("ZeroshotCLIP", feature_file, output, "--eval-only", "DATASET.SUBSAMPLE_CLASSES", "new")
    train.main(given)
    described = (output / "config.yaml").read_text(encoding="utf-8")
    head = [line.removeprefix("#:") for line in described.splitlines() if line.startswith("#:")][:-1]
    assert "DATASET.SUBSAMPLE_CLASSES new" in [line.strip() for line in head] and len(head) < 20
    again = [word for line in head for word in shlex.split(line)]
    cfg = train.setup_cfg(train.parser().parse_args(["--output-dir", str(output), *again]))
    assert cfg == train.setup_cfg(train.parser().parse_args(given))
    printed = capsys.readouterr().out
    assert "\nDATASET.SUBSAMPLE_CLASSES new\n" in printed and "CROSSGRAD" not in printed
    assert "CROSSGRAD" in described
    settings = "".join(line for line in described.splitlines(True) if not line.startswith("#:"))
    (output / "config.yaml").write_text(settings, encoding="utf-8")
    train.main(given)
    with pytest.raises(UserError, match=str(output)):
        train.main([*given, "TEST.PER_CLASS_RESULT", "True"])


def test_a_value_of_several_lines_changes_no_other(tmp_path):
    cfg = get_cfg_default()
    cfg.OUTPUT_DIR, cfg.INPUT.INTERPOLATION = str(tmp_path), "bicubic\nSEED: 7"
    RunDirectory(cfg).write_config()
    written = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert written["SEED"] == cfg.SEED and written["INPUT"]["INTERPOLATION"] == cfg.INPUT.INTERPOLATION
    RunDirectory(cfg)
