from __future__ import annotations

import pytest
from dassl.engine import TRAINER_REGISTRY

from dfzsl import train
from dfzsl.configs import CONFIGS
from dfzsl.trainers.base import CLIPTrainer
from dfzsl.trainers.generation.training import GenerationSettings
from dfzsl.trainers.recovery.settings import RecoverySettings
from dfzsl.utils.errors import UserError

FOLDER = CONFIGS / "trainers"
SHIPPED = sorted(FOLDER.rglob("*.yaml"))
OURS = [
    name
    for name in TRAINER_REGISTRY.registered_names()
    if issubclass(TRAINER_REGISTRY.get(name), CLIPTrainer)
]

# What the paper's released code sets for each data set, where that differs from what it sets for most.
PAPER: dict[str, dict[str, float]] = {
    "apy": {},
    "awa2": {"NUM_PER_CLASS": 600},
    "caltech101": {"EPOCHS": 500},
    "cub": {"LR": 0.0015},
    "dtd": {},
    "eurosat": {"NUM_PER_CLASS": 2000},
    "fgvc_aircraft": {"THETA": 0.02, "NUM_PER_CLASS": 200},
    "flo": {"LR": 0.001},
    "food101": {"EPOCHS": 1500, "LR": 0.001, "NUM_PER_CLASS": 700},
    "imagenet": {"NUM_PER_CLASS": 200},
    "oxford_flowers": {"LR": 0.001},
    "oxford_pets": {"THETA": 5.0, "NUM_PER_CLASS": 200},
    "stanford_cars": {},
    "sun": {"EPOCHS": 1500, "LR": 0.001, "NUM_PER_CLASS": 50},
    "sun397": {"LR": 0.0015},
    "ucf101": {"EPOCHS": 1500, "LR": 0.001},
}


def merged(*words: str):
    return train.setup_cfg(train.parser().parse_args(list(words)))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_every_shipped_config_merges_and_says_what_its_trainer_can_take(path):
    trainer = path.relative_to(FOLDER).parts[0]
    assert trainer in TRAINER_REGISTRY.registered_names()
    cfg = merged("--config-file", str(path), "--trainer", trainer)
    RecoverySettings(**{key.lower(): value for key, value in cfg.RECOVERY.items()})
    GenerationSettings(**{key.lower(): value for key, value in cfg.GENERATOR.items()})


def test_every_trainer_has_the_recipe_it_names():
    for trainer in OURS:
        recipe = TRAINER_REGISTRY.get(trainer).recipe
        assert not recipe or (FOLDER / trainer / f"{recipe}.yaml").exists(), trainer


def test_the_papers_recipe_is_that_of_its_code():
    recovery = merged("--config-file", str(FOLDER / "DFZSL/paper.yaml")).RECOVERY
    assert (recovery.METHOD, recovery.DIRECTIONS, recovery.CONCENTRATION) == ("simulator", "teacher", "paper")
    assert (recovery.THETA, recovery.EPOCHS, recovery.LR, recovery.DRAWS) == (1.0, 1000, 0.003, 50)
    assert (recovery.NUM_PER_CLASS, recovery.FILTER, recovery.FRESH) == (100, True, False)
    assert {path.stem for path in (FOLDER / "DFZSL/paper").glob("*.yaml")} == set(PAPER)


def test_a_data_sets_own_config_is_the_papers_recipe_and_its_differences():
    for name, differences in PAPER.items():
        keys = [word for key, value in differences.items() for word in (f"RECOVERY.{key}", str(value))]
        if "NUM_PER_CLASS" in differences:  # stages 1 and 3 share the draws
            keys += ["GENERATOR.NUM_PER_CLASS", str(differences["NUM_PER_CLASS"])]
        recipe = merged("--config-file", str(FOLDER / f"DFZSL/paper/{name}.yaml"))
        assert recipe == merged("--config-file", str(FOLDER / "DFZSL/paper.yaml"), *keys), name


def write(path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_config_builds_on_another(tmp_path):
    write(tmp_path / "a.yaml", "OPTIM:\n  LR: 0.5\n  MAX_EPOCH: 7\n")
    write(tmp_path / "deep/b.yaml", "_BASE_: ../a.yaml\nOPTIM:\n  LR: 0.25\n")
    last = write(tmp_path / "deep/c.yaml", "_BASE_: b.yaml\nSEED: 3\n")
    cfg = merged("--config-file", last)
    assert (cfg.OPTIM.LR, cfg.OPTIM.MAX_EPOCH, cfg.SEED) == (0.25, 7, 3)
    assert "_BASE_" not in cfg


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("_BASE_: c.yaml", r"c\.yaml.*_BASE_"),
        ("_BASE_: [1]", r"c\.yaml.*_BASE_"),
        ("_BASE_: nowhere.yaml", r"nowhere\.yaml"),
        ("_BASE_: wrong.yaml", r"wrong\.yaml.*OPTIMUM"),
    ],
)
def test_a_base_that_is_wrong_is_one_line(tmp_path, text, fact):
    write(tmp_path / "wrong.yaml", "OPTIMUM: 1\n")
    with pytest.raises(UserError, match=fact):
        merged("--config-file", write(tmp_path / "c.yaml", text))
