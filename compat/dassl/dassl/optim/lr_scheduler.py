"""Learning-rate schedules, stepped once an epoch, with an optional warmup before them."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, StepLR
from yacs.config import CfgNode

AVAI_SCHEDS = ["single_step", "multi_step", "cosine"]


class _BaseWarmupScheduler(LRScheduler):
    """`warmup_epoch` epochs of its own, then `successor`'s schedule.

    Its state holds the successor's state, never the successor itself (whose optimizer a checkpoint would then
    carry along, and which would go on stepping that copy after a resume).
    """

    def __init__(
        self, optimizer: Optimizer, successor: LRScheduler, warmup_epoch: int, last_epoch: int = -1
    ) -> None:
        self.successor = successor
        self.warmup_epoch = warmup_epoch
        super().__init__(optimizer, last_epoch)

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch >= self.warmup_epoch:
            self.successor.step(epoch)
            self._last_lr = self.successor.get_last_lr()
        else:
            super().step(epoch)

    def get_lr(self) -> list[Any]:
        if self.last_epoch >= self.warmup_epoch:
            return self.successor.get_last_lr()
        return self.get_warmup_lr()

    def get_warmup_lr(self) -> list[float]:
        """The learning rate of each parameter group at epoch `last_epoch` < `warmup_epoch`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("optimizer", "successor")}
        state["successor"] = self.successor.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accepts its own state, and that of the original, whose `successor` is a whole scheduler."""
        state = dict(state_dict)
        successor = state.pop("successor")
        if not isinstance(successor, dict):
            successor = {k: v for k, v in vars(successor).items() if k != "optimizer"}
        state.pop("optimizer", None)
        self.__dict__.update(state)
        self.successor.load_state_dict(successor)


class ConstantWarmupScheduler(_BaseWarmupScheduler):
    """The constant `cons_lr` for `warmup_epoch` epochs, then `successor`."""

    def __init__(
        self,
        optimizer: Optimizer,
        successor: LRScheduler,
        warmup_epoch: int,
        cons_lr: float,
        last_epoch: int = -1,
    ) -> None:
        self.cons_lr = cons_lr
        super().__init__(optimizer, successor, warmup_epoch, last_epoch)

    def get_warmup_lr(self) -> list[float]:
        return [self.cons_lr for _ in self.base_lrs]


class LinearWarmupScheduler(_BaseWarmupScheduler):
    """`min_lr` at epoch 0, lr * epoch / `warmup_epoch` up to `warmup_epoch`, then `successor`."""

    def __init__(
        self,
        optimizer: Optimizer,
        successor: LRScheduler,
        warmup_epoch: int,
        min_lr: float,
        last_epoch: int = -1,
    ) -> None:
        self.min_lr = min_lr
        super().__init__(optimizer, successor, warmup_epoch, last_epoch)

    def get_warmup_lr(self) -> list[Any]:
        if self.last_epoch == 0:
            return [self.min_lr for _ in self.base_lrs]
        return [lr * self.last_epoch / self.warmup_epoch for lr in self.base_lrs]


def build_lr_scheduler(optimizer: Optimizer, optim_cfg: CfgNode) -> LRScheduler:
    """The schedule of OPTIM.LR_SCHEDULER, after OPTIM.WARMUP_EPOCH epochs of OPTIM.WARMUP_TYPE if positive.

    Raises ValueError for an unknown schedule or warmup, TypeError for a wrong OPTIM.STEPSIZE.
    """
    name, stepsize = optim_cfg.LR_SCHEDULER, optim_cfg.STEPSIZE
    if name not in AVAI_SCHEDS:
        raise ValueError(f"scheduler must be one of {AVAI_SCHEDS}, but got {name}")
    if optim_cfg.WARMUP_EPOCH > 0 and optim_cfg.WARMUP_TYPE not in ("constant", "linear"):
        raise ValueError(f"OPTIM.WARMUP_TYPE must be constant or linear, but got {optim_cfg.WARMUP_TYPE}")

    scheduler: LRScheduler
    if name == "cosine":
        scheduler = CosineAnnealingLR(optimizer, optim_cfg.MAX_EPOCH)
    elif name == "single_step":
        if isinstance(stepsize, (list, tuple)):
            stepsize = stepsize[-1]
        if not isinstance(stepsize, int):
            raise TypeError(f"For single_step, OPTIM.STEPSIZE must be an integer, but got {stepsize!r}")
        scheduler = StepLR(optimizer, stepsize if stepsize > 0 else optim_cfg.MAX_EPOCH, optim_cfg.GAMMA)
    else:
        if not isinstance(stepsize, (list, tuple)):
            raise TypeError(f"For multi_step, OPTIM.STEPSIZE must be a list, but got {stepsize!r}")
        scheduler = MultiStepLR(optimizer, stepsize, optim_cfg.GAMMA)

    if optim_cfg.WARMUP_EPOCH <= 0:
        return scheduler
    if not optim_cfg.WARMUP_RECOUNT:
        scheduler.last_epoch = optim_cfg.WARMUP_EPOCH
    if optim_cfg.WARMUP_TYPE == "constant":
        return ConstantWarmupScheduler(optimizer, scheduler, optim_cfg.WARMUP_EPOCH, optim_cfg.WARMUP_CONS_LR)
    return LinearWarmupScheduler(optimizer, scheduler, optim_cfg.WARMUP_EPOCH, optim_cfg.WARMUP_MIN_LR)
