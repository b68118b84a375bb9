"""Every shipped data set config loads, names a registered data set, and sets nothing that is unknown."""

from __future__ import annotations

import pytest
import yaml
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY

from dfzsl.configs import CONFIGS

SHIPPED = sorted((CONFIGS / "datasets").glob("*.yaml"))
COOPS = [
    "imagenet",
    "caltech101",
    "oxford_pets",
    "stanford_cars",
    "oxford_flowers",
    "food101",
    "fgvc_aircraft",
    "sun397",
    "dtd",
    "eurosat",
    "ucf101",
    "imagenetv2",
    "imagenet_sketch",
    "imagenet_a",
    "imagenet_r",
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_config(path):
    cfg = get_cfg_default()
    cfg.merge_from_file(str(path))
    assert cfg.DATASET.NAME in DATASET_REGISTRY.registered_names()
    given = yaml.safe_load(path.read_text())
    allowed = {"DATASET", "INPUT", "MODEL", "GEOMETRY"}
    assert set(given) <= allowed, "a data set's file says nothing of training"


def test_every_data_set_has_exactly_one_config():
    named = [yaml.safe_load(path.read_text())["DATASET"]["NAME"] for path in SHIPPED]
    own_names = [
        name
        for name in DATASET_REGISTRY.registered_names()
        if DATASET_REGISTRY.get(name).__module__.startswith("dfzsl.")
    ]
    assert sorted(named) == sorted(own_names)


def test_files_are_called_as_coop_calls_them():
    assert {path.stem for path in SHIPPED} >= set(COOPS) | {"awa2", "cub", "sun", "flo", "apy"}
    assert {path.stem for path in SHIPPED} >= {"features", "folder", "csv"}
