"""The optimizer that OPTIM.NAME names."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from .radam import RAdam

AVAI_OPTIMS = ["adam", "amsgrad", "sgd", "rmsprop", "radam", "adamw"]


def build_optimizer(
    model: nn.Module | Iterable[Any], optim_cfg: CfgNode, param_groups: Iterable[Any] | None = None
) -> Optimizer:
    """An optimizer over `param_groups`, or else over the model's parameters.

    model: a module, or an iterable of parameters or parameter groups; optim_cfg: the OPTIM node.
    With OPTIM.STAGED_LR the model's children named in OPTIM.NEW_LAYERS learn at OPTIM.LR, the others at
    OPTIM.LR * OPTIM.BASE_LR_MULT. Raises ValueError for an unknown OPTIM.NAME.
    """
    name = optim_cfg.NAME
    if name not in AVAI_OPTIMS:
        raise ValueError(f"optim must be one of {AVAI_OPTIMS}, but got {name}")
    if param_groups is None:
        if optim_cfg.STAGED_LR:
            param_groups = _staged_groups(model, optim_cfg)
        else:
            param_groups = model.parameters() if isinstance(model, nn.Module) else model
    elif optim_cfg.STAGED_LR:
        warnings.warn(
            "staged_lr will be ignored, if you need to use staged_lr, "
            "please bind it with param_groups yourself.",
            stacklevel=2,
        )
    common: dict[str, Any] = dict(lr=optim_cfg.LR, weight_decay=optim_cfg.WEIGHT_DECAY)
    betas = (optim_cfg.ADAM_BETA1, optim_cfg.ADAM_BETA2)
    if name in ("adam", "amsgrad"):
        return torch.optim.Adam(param_groups, betas=betas, amsgrad=name == "amsgrad", **common)
    if name == "adamw":
        return torch.optim.AdamW(param_groups, betas=betas, **common)
    if name == "radam":
        return RAdam(param_groups, betas=betas, **common)
    if name == "rmsprop":
        return torch.optim.RMSprop(
            param_groups, momentum=optim_cfg.MOMENTUM, alpha=optim_cfg.RMSPROP_ALPHA, **common
        )
    return torch.optim.SGD(
        param_groups,
        momentum=optim_cfg.MOMENTUM,
        dampening=optim_cfg.SGD_DAMPNING,
        nesterov=optim_cfg.SGD_NESTEROV,
        **common,
    )


def _staged_groups(model: Any, optim_cfg: CfgNode) -> list[dict[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError("When staged_lr is True, model given to build_optimizer() must be an nn.Module")
    if isinstance(model, nn.DataParallel):
        model = model.module
    new_layers = optim_cfg.NEW_LAYERS
    if isinstance(new_layers, str):
        new_layers = [new_layers]
    if not new_layers:
        warnings.warn("new_layers is empty, therefore staged_lr is useless", stacklevel=3)
    base: list[nn.Parameter] = []
    new: list[nn.Parameter] = []
    for name, module in model.named_children():
        (new if name in new_layers else base).extend(module.parameters())
    return [{"params": base, "lr": optim_cfg.LR * optim_cfg.BASE_LR_MULT}, {"params": new}]
