"""The same seed gives the same bytes, whatever process or loader does the work; another seed does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_data
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_features
from dassl.engine import TRAINER_REGISTRY
from fake_data import Backbone, pixels

from dfzsl import train
from dfzsl.datasets import extract
from dfzsl.datasets.encoding import encode_datums
from dfzsl.io.results import VOLATILE_KEYS
from dfzsl.trainers.base import CLIPTrainer
from dfzsl.trainers.clip.aligned_text import AlignedText
from dfzsl.trainers.coop import CoOp
from dfzsl.trainers.generation.generate import generate
from dfzsl.trainers.generation.generators import GENERATORS
from dfzsl.trainers.generation.training import GenerationSettings
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.oracle import LEVELS
from dfzsl.trainers.recovery.recover import recover
from dfzsl.trainers.recovery.settings import METHODS
from dfzsl.trainers.recovery.teacher import Teacher, fit_teacher

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox"]
Made = dict[str, torch.Tensor]


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world(d: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    text = F.normalize(torch.randn(9, d, generator=stream(0)), dim=1)
    return text[:6] - text[:6].mean(0), text[:6], text[6:]


def recovered(method: str, level: str) -> Callable[[int], Made]:
    def run(seed: int) -> Made:
        weight, text, new = world()
        oracle = open_oracle(Teacher(weight, NAMES), level)
        virtual = recover(
            oracle, text, new_text=new, generator=stream(seed), method=method, epochs=20, draws=20
        )
        return {"mu": virtual.mu, "weight": virtual.weight, "drawn": virtual.sample(20, stream(seed))[0]}

    return run


def classified(generator: str) -> Callable[[int], Made]:
    def run(seed: int) -> Made:
        weight, text, new = world()
        virtual = recover(open_oracle(Teacher(weight, NAMES), "logits"), text, new_text=new)
        own = {"epochs": 1, "hidden": 32} if generator in GENERATORS and generator != "vmf" else {}
        few = {"num_per_class": 20, "num_generated": 20, "classifier_steps": 10, "calibrate": False}
        settings = GenerationSettings(name=generator, **few, **own)
        made = generate(
            virtual,
            AlignedText(text, new, ["gnu", "hen", "ibis"]),
            settings=settings,
            generator=stream(seed),
        )
        return {"weight": made.weight, "bias": made.bias}

    return run


def fitted(seed: int) -> Made:
    x = F.normalize(torch.randn(600, 96, generator=stream(seed)), dim=1)
    return {"weight": fit_teacher(x, torch.arange(600) % 6, NAMES).weight}


STAGES: dict[str, Callable[[int], Made]] = {
    "teacher": fitted,
    **{f"recovery, {method}": recovered(method, "logits") for method in METHODS},
    **{f"recovery, {level}": recovered("closed_form", level) for level in LEVELS},
    **{f"generation, {name}": classified(name) for name in [*GENERATORS, "none"]},
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages(stage, tried):
    first, again, other = (STAGES[stage](seed) for seed in (1, 1, 2))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert any(not torch.equal(other[name], value) for name, value in first.items())
    tried("determinism", "a stage again, and with another seed", 2, "the same bytes; others")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_threads(stage, tried):
    """Two threads may share out a sum in another way: then its last bits differ, and no more than those."""
    first = STAGES[stage](1)
    torch.set_num_threads(2)
    try:
        two, again = STAGES[stage](1), STAGES[stage](1)
    finally:
        torch.set_num_threads(1)
    for name, value in first.items():
        assert torch.equal(two[name], again[name])
        assert torch.allclose(two[name], value, atol=1e-4)
    tried("determinism", "a stage with 2 threads", 1, "the same bytes each time, to 1e-4 those of one")


def words(trainer: str, folder: Path, output: Path, seed: int = 1, **keys: object) -> list[str]:
    given = ["--trainer", trainer, "--root", str(folder / "animals.npz"), "--seed", str(seed)]
    given += ["--dataset-config-file", str(ROOT / "configs/datasets" / "features.yaml")]
    given += ["--output-dir", str(output), "DATASET.SUBSAMPLE_CLASSES", "base"]
    settings = {
        "OPTIM.MAX_EPOCH": 1,
        "RECOVERY.NUM_PER_CLASS": 16,
        "DATALOADER.TRAIN_X.BATCH_SIZE": 16,
        **keys,
    }
    return given + [str(word) for pair in settings.items() for word in pair]


def made(folder: Path) -> dict[str, object]:
    """Tensors and checkpoints byte for byte; results without what the clock decides."""
    kept = [*folder.rglob("*.safetensors"), *folder.rglob("*.pth.tar*")]
    found: dict[str, object] = {str(path.relative_to(folder)): path.read_bytes() for path in kept}
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    apart = (*VOLATILE_KEYS, "versions", "config")
    return {**found, "results": {key: value for key, value in results.items() if key not in apart}}


LEARNERS = [
    name
    for name in TRAINER_REGISTRY.registered_names()
    if issubclass(TRAINER_REGISTRY.get(name), CoOp) and issubclass(TRAINER_REGISTRY.get(name), CLIPTrainer)
]


@pytest.fixture
def animals(tmp_path) -> Path:
    """Features of the width of the built-in backbone's, whose text encoder the trainers tune."""
    write_features(tmp_path / "animals.npz", per_class=8, dim=128, text=None)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("trainer", LEARNERS)
def test_trainers(trainer, animals, tried):
    """Twice in one process, where a first run could leave something behind for the second."""
    shapes = {"MODEL.BACKBONE.NAME": "shapes", "GENERATOR.CLASSIFIER_STEPS": 10, "GENERATOR.NAME": "vmf"}
    train.main(words("TeacherZeroshot", animals, animals / "owner", **shapes))
    shapes["TEACHER.FILE"] = animals / "owner" / "teacher.safetensors"
    if pictures := TRAINER_REGISTRY.get(trainer).image_prompts:
        shapes = {"MODEL.BACKBONE.NAME": "shapes-vit", "DATALOADER.NUM_WORKERS": 0}
        root = fake_data.make("Folder", animals)
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        given = words(trainer, animals, animals / name, seed, **shapes)
        if pictures:
            given[given.index("--root") + 1] = str(root)
            given[given.index("--dataset-config-file") + 1] = str(ROOT / "configs/datasets/folder.yaml")
        train.main(given)
    assert made(animals / "one") == made(animals / "two")
    assert made(animals / "one") != made(animals / "other")
    tried("determinism", "each trainer again, and with another seed", 2, "the same bytes; others")


@pytest.mark.slow
def test_processes(tmp_path, tried):
    """Python gives each process another order of sets and dictionary hashes."""
    animals = write_features(tmp_path / "animals.npz", per_class=8).parent
    owner = animals / "owner"
    train.main(words("TeacherZeroshot", animals, owner))
    runs = []
    for hashing in ("1", "2"):
        keys = {"TEACHER.FILE": owner / "teacher.safetensors"}
        command = [sys.executable, "-m", "dfzsl.train", *words("DFZSL", animals, animals / hashing, **keys)]
        environment = {**os.environ, "PYTHONHASHSEED": hashing, "OMP_NUM_THREADS": "1"}
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    assert [run.wait() for run in runs] == [0, 0]
    assert made(animals / "1") == made(animals / "2")
    tried("determinism", "two processes, other hash seeds", 2, "the same bytes")


def test_loader_processes(tmp_path, tried):
    """Encoding is the same with any number of them: nothing in it is drawn."""
    data = extract.open_dataset("oxford_pets", str(fake_data.make("OxfordPets", tmp_path)))
    encoded = [
        encode_datums(Backbone(), data.test, pixels, tmp_path / str(workers), 4, workers)
        for workers in (0, 1, 2)
    ]
    assert torch.equal(encoded[0], encoded[1]) and torch.equal(encoded[0], encoded[2])
    files = [next((tmp_path / str(workers)).iterdir()).read_bytes() for workers in (0, 1, 2)]
    assert files[0] == files[1] == files[2]
    tried("determinism", "0, 1 and 2 processes that decode images", 3, "the same bytes")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_are_augmented(workers, tmp_path, tried):
    """Each loader process draws from a stream of its own, so their number counts; given it, nothing else."""
    root = fake_data.make("OxfordPets", tmp_path)
    for output in ("one", "two"):
        given = [
            "--trainer",
            "CoOp",
            "--root",
            str(root),
            "--seed",
            "1",
            "--output-dir",
            str(tmp_path / output),
        ]
        given += ["--dataset-config-file", str(ROOT / "configs/datasets" / "oxford_pets.yaml")]
        keys = {"MODEL.BACKBONE.NAME": "shapes", "OPTIM.MAX_EPOCH": 2, "DATALOADER.NUM_WORKERS": workers}
        keys |= {"DATALOADER.TRAIN_X.BATCH_SIZE": 4}
        pairs = [str(word) for pair in keys.items() for word in pair]
        train.main([*given, *pairs, "INPUT.TRANSFORMS", "('random_resized_crop','random_flip','normalize')"])
    assert made(tmp_path / "one") == made(tmp_path / "two")
    tried("determinism", "augmented pictures with 0 and with 2 loader processes", 1, "the same bytes each")
