from __future__ import annotations

from pathlib import Path

import pytest
from dassl.engine import TRAINER_REGISTRY

import dfzsl.configs
from dfzsl import train
from dfzsl.trainers.base import CLIPTrainer
from dfzsl.trainers.generation.training import StageThreeSettings
from dfzsl.trainers.recovery.recover import RecoverySettings

FOLDER = Path(dfzsl.configs.__file__).parent / "trainers"
SHIPPED = sorted(FOLDER.rglob("*.yaml"))
OURS = [
    name
    for name in TRAINER_REGISTRY.registered_names()
    if issubclass(TRAINER_REGISTRY.get(name), CLIPTrainer)
]


def merged(*words: str):
    return train.setup_cfg(train.parser().parse_args(list(words)))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_every_shipped_config_merges_and_says_what_its_trainer_can_take(path):
    trainer = path.relative_to(FOLDER).parts[0]
    assert trainer in TRAINER_REGISTRY.registered_names()
    cfg = merged("--config-file", str(path), "--trainer", trainer)
    RecoverySettings(**{key.lower(): value for key, value in cfg.RECOVERY.items()})
    StageThreeSettings(**{key.lower(): value for key, value in cfg.GENERATOR.items()})


@pytest.mark.parametrize("trainer", OURS)
def test_every_trainer_has_the_recipe_it_names(trainer):
    recipe = TRAINER_REGISTRY.get(trainer).recipe
    assert not recipe or (FOLDER / trainer / f"{recipe}.yaml").exists()
