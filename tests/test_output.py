"""A run's identity: other data, another encoder or teacher of the same name are never taken for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import fake_data
import numpy as np
import pytest
import torch
from conftest import ROOT, write_features

from dfzsl import train
from dfzsl.datasets.encoding import checksum
from dfzsl.datasets.extract import open_dataset
from dfzsl.errors import UserError
from dfzsl.trainers.recovery.teacher import Teacher

SMALL = {"RECOVERY.NUM_PER_CLASS": 8, "GENERATOR.NAME": "vmf", "GENERATOR.CLASSIFIER_STEPS": 5}


def words(trainer: str, data: Path, output: Path, *more: object) -> list[str]:
    given = ["--trainer", trainer, "--root", data, "--seed", 1, "--output-dir", output]
    given += ["--dataset-config-file", ROOT / "configs/datasets/features.yaml"]
    pairs = {"DATASET.SUBSAMPLE_CLASSES": "base", **(SMALL if trainer == "DFZSL" else {})}
    return [str(word) for word in (*given, *more, *(word for pair in pairs.items() for word in pair))]


def test_other_test_data_under_the_same_path_is_refused(tmp_path):
    path = write_features(tmp_path / "x.npz", per_class=8)
    given = words("ZeroshotCLIP", path, tmp_path / "out", "--eval-only")
    train.main(given)
    train.main(given)  # the same again
    write_features(path, seed=1, per_class=8)
    with pytest.raises(UserError, match="out holds another experiment, made of other test data"):
        train.main(given)


def test_other_training_data_is_refused_where_it_is_read(tmp_path):
    path = write_features(tmp_path / "x.npz", per_class=8)
    arrays = dict(np.load(path))
    train.main(words("TeacherZeroshot", path, tmp_path / "owner"))
    teacher = tmp_path / "owner/teacher.safetensors"
    client = words("DFZSL", path, tmp_path / "client")
    client += ["TEACHER.FILE", str(teacher)]
    train.main(client)
    np.savez(path, **{**arrays, "x_val": arrays["x_val"][::-1].copy(), "y_val": arrays["y_val"][::-1].copy()})
    train.main(client)  # it has not read them
    with pytest.raises(UserError, match="made of other training data"):
        train.main(words("TeacherZeroshot", path, tmp_path / "owner"))


def test_an_older_folder_that_does_not_say_is_gone_on_with(tmp_path):
    path = write_features(tmp_path / "x.npz", per_class=8)
    given = words("ZeroshotCLIP", path, tmp_path / "out", "--eval-only")
    train.main(given)
    config = tmp_path / "out/config.yaml"
    whole = config.read_text(encoding="utf-8")
    assert whole.count("# made of ") == 2
    lines = (line for line in whole.splitlines(True) if not line.startswith("# made"))
    config.write_text("".join(lines), encoding="utf-8")
    train.main(given)
    assert config.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("kind", ["Folder", "Csv", "Features", "OxfordPets", "AWA2"])
def test_data_is_known_by_its_content_and_not_by_its_place(kind, tmp_path):
    config = {"Folder": "folder", "Csv": "csv", "Features": "features", "OxfordPets": "oxford_pets"}

    def sums(root: Path) -> list[str]:
        data = open_dataset(config.get(kind, kind.lower()), str(root))
        return [checksum(data, datums) for datums in (data.test, data.train_x)]

    root = fake_data.make(kind, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = tmp_path / "b" / root.relative_to(tmp_path / "a")
    assert sums(root) == sums(moved)
    if kind not in ("Features", "AWA2"):
        data = open_dataset(config[kind], str(moved))
        picture = Path(data.test[0].impath)
        picture.write_bytes(picture.read_bytes()[:-1] + b"x")  # as long as it was
        (test, training), (other_test, other_training) = sums(root), sums(moved)
        assert test != other_test and training == other_training


@pytest.mark.parametrize("wrong", ["of another encoder", "of other classes"])
def test_a_failed_start_claims_nothing(wrong, tmp_path):
    path = write_features(tmp_path / "x.npz", per_class=8)
    train.main(words("TeacherZeroshot", path, tmp_path / "owner"))
    right = tmp_path / "owner/teacher.safetensors"
    teacher = Teacher.load(right)
    if wrong == "of another encoder":
        teacher.backbone = "ViT-B-32 (openai)"
    else:
        teacher.classnames[0] = "zebra"
    teacher.save(tmp_path / "wrong.safetensors")
    with pytest.raises(UserError):
        train.main(
            [*words("DFZSL", path, tmp_path / "out"), "TEACHER.FILE", str(tmp_path / "wrong.safetensors")]
        )
    assert not (tmp_path / "out/config.yaml").exists()
    train.main([*words("DFZSL", path, tmp_path / "out"), "TEACHER.FILE", str(right)])
    assert (tmp_path / "out/results.json").exists()


def test_no_new_class_is_a_legal_task(tmp_path):
    path = write_features(tmp_path / "x.npz", per_class=8, new=np.array([], dtype="int64"))
    train.main(words("TeacherZeroshot", path, tmp_path / "owner"))
    given = words("DFZSL", path, tmp_path / "out")
    train.main([*given, "TEACHER.FILE", str(tmp_path / "owner/teacher.safetensors")])
    assert (tmp_path / "out/classifier.safetensors").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("('a\\x1b[2Jb','x')", "cannot be shown"),
        ("('x','x')", "'x' is the name of two classes"),
        ("('ant','x')", "'ant' is a base class already"),
        ("('','x')", "class 0 has no name"),
        ("(1,2)", "no list of class names"),
    ],
)
def test_names_of_new_classes_are_looked_at_before_any_work(names, said, tmp_path):
    path = write_features(tmp_path / "x.npz", per_class=8)
    Teacher(torch.randn(4, 32), ["ant", "bee", "cat", "dog"]).save(tmp_path / "t.safetensors")
    given = words("DFZSL", path, tmp_path / "out", "TEACHER.FILE", tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=said):
        train.main([*given, "TRAINER.DFZSL.NEW_CLASSES", names])
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_the_owner_has_no_teacher_yet(tmp_path):
    path = write_features(tmp_path / "x.npz", per_class=8)
    with pytest.raises(UserError, match=r"leave TEACHER\.FILE empty"):
        train.main([*words("TeacherZeroshot", path, tmp_path / "o"), "TEACHER.FILE", "http://localhost:1/x"])
