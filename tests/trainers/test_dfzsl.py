"""The three stages with a text encoder, on features laid around the built-in CLIP's own text features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, unit

from dfzsl import train
from dfzsl.io.results import read_results
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.dfzsl import DFZSL
from dfzsl.trainers.generation.classifier import Classifier

NAMES = [
    f"{pattern} {color} {shape}"
    for pattern in ("striped", "dotted")
    for color in ("red", "blue")
    for shape in ("star", "circle")
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A feature file without text features: the backbone's text tower has to make them."""
    rng = np.random.default_rng(0)
    text = load_backbone("shapes").class_features(NAMES, ["a photo of a {}."]).numpy()
    labels = np.repeat(np.arange(len(NAMES)), 30)
    noise = rng.normal(size=(2, len(labels), text.shape[1])) / text.shape[1] ** 0.5
    off, gap = rng.normal(size=text.shape), unit(rng.normal(size=text.shape[1]))
    # Near each other, off their text, in another cone than the texts: as CLIP's image features lie.
    center = text.mean(0)
    moved = center + 0.3 * (text - center) + 0.7 * off / text.shape[1] ** 0.5 + 0.4 * gap
    x = unit(moved[labels] + 0.6 * noise)
    path = tmp_path_factory.mktemp("world") / "objects.npz"
    np.savez(path, x_val=x[0], y_val=labels, x_test=x[1], y_test=labels, classnames=np.array(NAMES))
    return path


SMALL = {
    "MODEL.BACKBONE.NAME": "shapes",
    "RECOVERY.NUM_PER_CLASS": 16,
    "OPTIM.MAX_EPOCH": 3,
    "DATALOADER.TRAIN_X.BATCH_SIZE": 16,
}


def run(trainer: str, data: Path, output: Path, *flags: str, classes: str = "base", **keys: object) -> dict:
    config = ROOT / "configs/trainers" / trainer / "dfzsl.yaml"
    words = ["--trainer", trainer, "--root", str(data), "--seed", "1", "--output-dir", str(output), *flags]
    words += ["--dataset-config-file", str(ROOT / "configs/datasets" / "features.yaml")]
    words += ["--config-file", str(config)] if config.exists() else []
    given = {key.replace("__", "."): value for key, value in keys.items()}
    settings = {**SMALL, "DATASET.SUBSAMPLE_CLASSES": classes, **given}
    train.main(words + [str(word) for pair in settings.items() for word in pair])
    return read_results(output / "results.json")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("owner")
    run("TeacherZeroshot", data, output)
    return output / "teacher.safetensors"


@pytest.fixture(scope="module")
def client(data, teacher, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("client")
    run("DFZSL", data, output, TEACHER__FILE=teacher)
    return output


def test_each_stage_leaves_its_result(client):
    results = read_results(client / "results.json")
    for name in ("virtual.safetensors", "prompt_learner/model.pth.tar-3", "classifier.safetensors"):
        assert (client / name).is_file()
    assert set(results["seconds"]) == {"recovery", "train", "generate"}
    assert results["images_used"] == 0
    assert results["notes"] == []
    assert len(results["curves"]["loss"]) == 3
    classifier = Classifier.load(client / "classifier.safetensors")
    assert classifier.classnames == NAMES
    assert results["trained_parameters"] > classifier.weight.numel()  # and the prompts
    assert classifier.shift is not None
    assert classifier.backbone == "shapes"


def test_dfzsl_learns_from_the_teacher_and_keeps_new_classes(data, teacher, client, tmp_path):
    zero_base = run("ZeroshotCLIP", data, tmp_path / "zero_base", "--eval-only")["accuracy"]
    zero_new = run("ZeroshotCLIP", data, tmp_path / "zero_new", "--eval-only", classes="new")["accuracy"]
    base = read_results(client / "results.json")["accuracy"]
    loaded = ("--eval-only", "--model-dir", str(client))
    new = run("DFZSL", data, tmp_path / "new", *loaded, classes="new", TEACHER__FILE=teacher)["accuracy"]
    assert base > zero_base
    assert new >= zero_new - 3
    joint = run("DFZSL", data, tmp_path / "all", *loaded, classes="all", TEACHER__FILE=teacher)
    assert [row["new"] for row in joint["per_class"]] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("moment", ["after an epoch", "before stage 3"])
def test_an_interrupted_run_ends_in_the_same_classifier(data, teacher, client, tmp_path, monkeypatch, moment):
    class Killed(Exception):
        pass

    def killed(self, *_):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before stage 3":
            patch.setattr(DFZSL, "generate", killed)
        else:
            epochs = DFZSL.run_epoch
            patch.setattr(DFZSL, "run_epoch", lambda self: killed(self) if self.epoch == 2 else epochs(self))
        with pytest.raises(Killed):
            run("DFZSL", data, tmp_path, TEACHER__FILE=teacher, TRAIN__CHECKPOINT_FREQ=1)
    assert not (tmp_path / "classifier.safetensors").exists()
    run("DFZSL", data, tmp_path, TEACHER__FILE=teacher, TRAIN__CHECKPOINT_FREQ=1)
    for name in ("virtual.safetensors", "classifier.safetensors"):
        assert (tmp_path / name).read_bytes() == (client / name).read_bytes()


def test_a_classifier_of_one_data_set_names_the_classes_of_another(data, tmp_path):
    """The cross-data-set protocol: trained on all classes, tested on strangers by their tuned text."""
    run("TeacherZeroshot", data, tmp_path / "owner", classes="all")
    teacher = tmp_path / "owner" / "teacher.safetensors"
    run("DFZSL", data, tmp_path / "source", classes="all", TEACHER__FILE=teacher)
    names = ["plain green ring", "checkered purple heart", "zigzag yellow cross"]
    text = load_backbone("shapes").class_features(names, ["a photo of a {}."]).numpy()
    np.savez(tmp_path / "other.npz", x_test=text, y_test=np.arange(3), classnames=np.array(names))
    loaded = ("--eval-only", "--model-dir", str(tmp_path / "source"))
    other = run(
        "DFZSL", tmp_path / "other.npz", tmp_path / "target", *loaded, classes="all", TEACHER__FILE=teacher
    )
    assert other["accuracy"] == 100.0


def test_another_seed_is_another_run(data, teacher, client, tmp_path):
    run("DFZSL", data, tmp_path, TEACHER__FILE=teacher, SEED=2)
    first, other = (Classifier.load(folder / "classifier.safetensors") for folder in (client, tmp_path))
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize("trainer", ["CoOp", "FLPT"])
def test_prompt_learners_train_on_virtual_features(data, teacher, tmp_path, trainer):
    # One pool of draws, so that the loss of an epoch is comparable with the last one's.
    keys = {"RECOVERY__FRESH": False, "OPTIM__NAME": "sgd", "OPTIM__LR": 0.02, "OPTIM__MAX_EPOCH": 8}
    results = run(trainer, data, tmp_path, TEACHER__FILE=teacher, **keys)
    assert results["images_used"] == 0
    assert results["queries"] > 0
    assert results["curves"]["loss"][-1] < results["curves"]["loss"][0]
