from importlib import import_module
from typing import Any

from ..utils.left_out import left_out
from .build import LEFT_OUT, TRAINER_REGISTRY, build_trainer
from .trainer import SimpleNet, SimpleTrainer, TrainerBase, TrainerX, TrainerXU

__all__ = [
    "TRAINER_REGISTRY",
    "SimpleNet",
    "SimpleTrainer",
    "TrainerBase",
    "TrainerX",
    "TrainerXU",
    "build_trainer",
]


def __getattr__(name: str) -> Any:
    """The trainers of `da`, `dg` and `ssl`, as in the original; they are imported when asked for."""
    for package in () if name.startswith("_") else ("da", "dg", "ssl"):
        module = import_module(f".{package}", __name__)
        if name in module.__all__:
            return getattr(module, name)
    return left_out(__name__, sum(LEFT_OUT.values(), ()))(name)
