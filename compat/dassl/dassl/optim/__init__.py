from .lr_scheduler import ConstantWarmupScheduler, LinearWarmupScheduler, build_lr_scheduler
from .optimizer import build_optimizer
from .radam import RAdam

__all__ = [
    "ConstantWarmupScheduler",
    "LinearWarmupScheduler",
    "RAdam",
    "build_lr_scheduler",
    "build_optimizer",
]
