"""The trainer that TRAINER.NAME names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from yacs.config import CfgNode

from ..utils import Registry, check_availability

TRAINER_REGISTRY = Registry("TRAINER")
LEFT_OUT = {
    "da": ("ADDA", "AdaBN", "CDAC", "DAEL", "DANN", "M3SDA", "MCD", "MME", "SelfEnsembling"),
    "dg": ("CrossGrad", "DAELDG", "DDAIG", "DomainMix"),
}


def build_trainer(cfg: CfgNode) -> Any:
    """Those of `da`, `dg` and `ssl` are registered when a name is asked for that nobody else has."""
    if cfg.TRAINER.NAME not in TRAINER_REGISTRY:
        for package in ("da", "dg", "ssl"):
            import_module(f"dassl.engine.{package}")
    check_availability(cfg.TRAINER.NAME, TRAINER_REGISTRY.registered_names(), sum(LEFT_OUT.values(), ()))
    if cfg.VERBOSE:
        print(f"Loading trainer: {cfg.TRAINER.NAME}")
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME)(cfg)
