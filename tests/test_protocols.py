"""Run base-to-new and GZSL on a miniature copy of every data set in its true layout."""

from __future__ import annotations

import fake_data
import pytest
from dassl.data.datasets import DATASET_REGISTRY

from dfzsl import train
from dfzsl.io.results import read_results
from dfzsl.utils.errors import UserError

# Nothing to train on, by design: ImageNet's variants are tests of models trained on ImageNet.
TEST_ONLY = {"ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR"}


def run(trainer: str, name: str, root, output, classes: str, *flags: str, **keys: object) -> dict:
    words = ["--trainer", trainer, "--root", str(root), "--seed", "1", "--output-dir", str(output), *flags]
    given = {key.replace("__", "."): str(value) for key, value in keys.items()}
    settings = {
        "DATASET.NAME": name,
        "DATASET.SUBSAMPLE_CLASSES": classes,
        "DATALOADER.NUM_WORKERS": "0",
        **given,
    }
    train.main(words + [word for pair in settings.items() for word in pair])
    return read_results(output / "results.json")


def one_of_each_kind() -> list:
    """All data sets; those that share the base class of an earlier one are marked slow."""
    kinds: set[type] = set()
    cases = []
    for name in sorted(fake_data.FAKES):
        kind = DATASET_REGISTRY.get(name).__base__
        cases.append(pytest.param(name, marks=[pytest.mark.slow] if kind in kinds else []))
        kinds.add(kind)
    return cases


@pytest.mark.parametrize("name", one_of_each_kind())
def test_a_data_set_runs_through_base_to_new_and_gzsl(name, tmp_path):
    root = fake_data.make(name, tmp_path / "data")
    encoder = {} if name == "Features" else {"MODEL__BACKBONE__NAME": "shapes"}
    if name in TEST_ONLY:
        zero = run("ZeroshotCLIP", name, root, tmp_path / "zero", "all", "--eval-only", **encoder)
        assert sum(row["total"] for row in zero["per_class"]) > 0
        with pytest.raises(UserError, match="test images"):
            run("TeacherZeroshot", name, root, tmp_path / "owner", "all", **encoder)
        return
    run("TeacherZeroshot", name, root, tmp_path / "owner", "base", **encoder)
    cheap = {
        **encoder,
        "TEACHER__FILE": tmp_path / "owner" / "teacher.safetensors",
        "TRAINER__DFZSL__FLPT": False,
        "RECOVERY__FILTER": False,
        "GENERATOR__NAME": "none",
        "GENERATOR__CALIBRATE": False,
        "GENERATOR__CLASSIFIER_STEPS": 5,
    }
    loaded = ("--eval-only", "--model-dir", str(tmp_path / "client"))
    base = run("DFZSL", name, root, tmp_path / "client", "base", **cheap)
    new = run("DFZSL", name, root, tmp_path / "new", "new", *loaded, **cheap)
    joint = run("DFZSL", name, root, tmp_path / "all", "all", *loaded, **cheap)
    assert base["images_used"] == 0
    assert not any(row["new"] for row in base["per_class"])
    assert all(row["new"] for row in new["per_class"])
    names = {row["class"] for row in base["per_class"] + new["per_class"]}
    assert names == {row["class"] for row in joint["per_class"]}
