"""The data set that DATASET.NAME names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from yacs.config import CfgNode

from ...utils import Registry, check_availability

DATASET_REGISTRY = Registry("DATASET")
LEFT_OUT = {
    "da": ("CIFARSTL", "Digit5"),
    "dg": ("CIFAR100C", "CIFAR10C", "Camelyon17", "DigitSingle", "FMoW", "IWildCam"),
    "ssl": ("CIFAR10", "CIFAR100", "STL10", "SVHN"),
}


def build_dataset(cfg: CfgNode) -> Any:
    """Those of `da` and `dg` are registered when a name is asked for that nobody else has."""
    if cfg.DATASET.NAME not in DATASET_REGISTRY:
        for package in ("da", "dg"):
            import_module(f"dassl.data.datasets.{package}")
    check_availability(cfg.DATASET.NAME, DATASET_REGISTRY.registered_names(), sum(LEFT_OUT.values(), ()))
    if cfg.VERBOSE:
        print(f"Loading dataset: {cfg.DATASET.NAME}")
    return DATASET_REGISTRY.get(cfg.DATASET.NAME)(cfg)
