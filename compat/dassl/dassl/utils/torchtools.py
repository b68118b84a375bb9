"""Checkpoints and parameters."""

from __future__ import annotations

import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial as partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import safe_pickle
from .tools import mkdir_if_missing, replace_file

__all__ = [
    "count_num_param",
    "init_network_weights",
    "load_checkpoint",
    "load_pretrained_weights",
    "open_all_layers",
    "open_specified_layers",
    "resume_from_checkpoint",
    "save_checkpoint",
]


def save_checkpoint(
    state: dict[str, Any],
    save_dir: str,
    is_best: bool = False,
    remove_module_from_keys: bool = True,
    model_name: str = "",
) -> None:
    """Write `state` as save_dir/model.pth.tar-<epoch> (or `model_name`), and its name to save_dir/checkpoint.

    state: state_dict, epoch (1-based), optimizer, scheduler (state dicts or None), val_result. The prefix
    "module." of DataParallel is taken off the keys of state_dict. is_best: also copy to model-best.pth.tar.
    """
    mkdir_if_missing(save_dir)
    if remove_module_from_keys:
        weights = ((k.removeprefix("module."), v) for k, v in state["state_dict"].items())
        state = {**state, "state_dict": OrderedDict(weights)}
    fpath = os.path.join(save_dir, model_name or f"model.pth.tar-{state['epoch']}")
    replace_file(fpath, lambda path: _save(state, path))
    print(f"Checkpoint saved to {fpath}")
    name = os.path.basename(fpath) + "\n"
    pointer = os.path.join(save_dir, "checkpoint")
    replace_file(pointer, lambda path: Path(path).write_text(name, encoding="utf-8"))
    if is_best:
        best = os.path.join(save_dir, "model-best.pth.tar")
        replace_file(best, lambda path: shutil.copy(fpath, path))
        print(f'Best checkpoint saved to "{best}"')


def _save(state: dict[str, Any], path: str) -> None:
    # Given a name, torch writes it into the file; given a file it does not, and equal states are equal bytes.
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # Of a write that failed (the disk is full) torch tells only that its archive came out wrong.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_checkpoint(fpath: str) -> Any:
    """What `save_checkpoint` wrote, on the CPU.

    Files of the original, which pickle whole schedulers, are read with those objects made inert. Raises
    ValueError if `fpath` is None, FileNotFoundError, or pickle.UnpicklingError for a file that is damaged, of
    another kind, or asks for anything a checkpoint does not need.
    """
    if fpath is None:
        raise ValueError("File path is None")
    if not os.path.exists(fpath):
        raise FileNotFoundError(f'File is not found at "{fpath}"')
    return safe_pickle.load(fpath)


def load_trainer_checkpoint(fpath: str) -> dict[str, Any]:
    """As `load_checkpoint`, but ValueError unless the file has what a trainer saves."""
    checkpoint = load_checkpoint(fpath)
    if not isinstance(checkpoint, dict) or not {"state_dict", "epoch"} <= checkpoint.keys():
        raise ValueError(f"{fpath} was not saved by a trainer: it has no state_dict and epoch")
    weights, epoch = checkpoint["state_dict"], checkpoint["epoch"]
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{fpath} was not saved by a trainer: its state_dict is none")
    if type(epoch) is not int:
        raise ValueError(f"{fpath} was not saved by a trainer: its epoch is not a number")
    return checkpoint


def load_weights(model: nn.Module, checkpoint: dict[str, Any], fpath: str) -> None:
    """model.load_state_dict, naming the file where it does not fit."""
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise RuntimeError(f"{fpath} does not fit the model: {error}") from error


def resume_from_checkpoint(fdir: str, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> int:
    """Load the file that fdir/checkpoint names into model, optimizer and scheduler; return its epoch."""
    return resume_training(fdir, model, optimizer, scheduler)["epoch"]


def resume_training(
    fdir: str, model: nn.Module, optimizer: Any = None, scheduler: Any = None, file_name: str = ""
) -> dict[str, Any]:
    """As `resume_from_checkpoint`, but returns the whole checkpoint; of the file `file_name` if given."""
    if not file_name:
        with open(os.path.join(fdir, "checkpoint"), encoding="utf-8") as file:
            file_name = file.readline().strip()
    fpath = os.path.join(fdir, file_name)
    print(f'Loading checkpoint from "{fpath}"')
    checkpoint = load_trainer_checkpoint(fpath)
    load_weights(model, checkpoint, fpath)
    print("Loaded model weights")
    if optimizer is not None and checkpoint.get("optimizer") is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        print("Loaded optimizer")
    if scheduler is not None and checkpoint.get("scheduler") is not None:
        scheduler.load_state_dict(checkpoint["scheduler"])
        print("Loaded scheduler")
    print(f"Previous epoch: {checkpoint['epoch']}")
    return checkpoint


def adjust_learning_rate(
    optimizer: Any,
    base_lr: float,
    epoch: int,
    stepsize: int = 20,
    gamma: float = 0.1,
    linear_decay: bool = False,
    final_lr: float = 0,
    max_epoch: int = 100,
) -> None:
    """base_lr gamma^(epoch // stepsize); with `linear_decay` from base_lr to final_lr at max_epoch."""
    done = epoch / max_epoch
    lr = done * final_lr + (1 - done) * base_lr if linear_decay else base_lr * gamma ** (epoch // stepsize)
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_bn_to_eval(m: nn.Module) -> None:
    """For model.apply: batch normalisation keeps its running statistics, and its parameters still learn."""
    if "BatchNorm" in type(m).__name__:
        m.eval()


def open_all_layers(model: nn.Module) -> None:
    """Training mode, and gradients for all parameters."""
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad = True


def open_specified_layers(model: nn.Module, open_layers: str | Iterable[str]) -> None:
    """Training mode and gradients for the named children alone; the others are frozen in evaluation mode."""
    if isinstance(model, nn.DataParallel):
        model = model.module
    names = [open_layers] if isinstance(open_layers, str) else list(open_layers)
    for name in names:
        if not hasattr(model, name):
            raise ValueError(f'"{name}" is not an attribute of the model')
    for name, module in model.named_children():
        module.train(name in names)
        for parameter in module.parameters():
            parameter.requires_grad = name in names


def count_num_param(model: nn.Module | None = None, params: Any = None) -> int:
    """Number of parameters of `model`, or of `params`: tensors, or parameter groups as optimizers take."""
    if model is not None:
        return sum(p.numel() for p in model.parameters())
    if params is None:
        raise ValueError("model and params must provide at least one")
    return sum(
        sum(p.numel() for p in item["params"]) if isinstance(item, dict) else item.numel() for item in params
    )


def load_pretrained_weights(model: nn.Module, weight_path: str) -> None:
    """Load from a checkpoint, or a bare state dict, the tensors that match in name and shape.

    Warns if none does; prints the names of those left out.
    """
    checkpoint = load_checkpoint(weight_path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{weight_path} holds no weights but a {type(checkpoint).__name__}")
    state_dict = checkpoint.get("state_dict", checkpoint)
    own = model.state_dict()
    matched, discarded = OrderedDict(), []
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        if key in own and own[key].shape == getattr(value, "shape", None):
            matched[key] = value
        else:
            discarded.append(key)
    model.load_state_dict({**own, **matched})
    if not matched:
        warnings.warn(f"Cannot load {weight_path} (check the key names manually)", stacklevel=2)
        return
    print(f"Successfully loaded pretrained weights from {weight_path}")
    if discarded:
        print(f"Layers discarded due to unmatched keys or size: {discarded}")


def init_network_weights(model: nn.Module, init_type: str = "normal", gain: float = 0.02) -> None:
    """Initialise convolutions, linear layers and normalisations; biases become zero.

    init_type: normal, xavier, kaiming or orthogonal; `gain` is the standard deviation or gain of all but
    kaiming. Raises ValueError for another.
    """
    inits = {
        "normal": lambda w: nn.init.normal_(w, 0.0, gain),
        "xavier": lambda w: nn.init.xavier_normal_(w, gain=gain),
        "kaiming": lambda w: nn.init.kaiming_normal_(w, a=0, mode="fan_in"),
        "orthogonal": lambda w: nn.init.orthogonal_(w, gain=gain),
    }
    if init_type not in inits:
        raise ValueError(f"initialization method {init_type} is not implemented; known: {', '.join(inits)}")
    for module in model.modules():
        name = type(module).__name__
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is None:
            continue
        if "Conv" in name or "Linear" in name:
            inits[init_type](weight)
        elif "BatchNorm" in name or "InstanceNorm" in name:
            nn.init.constant_(weight, 1.0)
        else:
            continue
        if bias is not None:
            nn.init.constant_(bias, 0.0)
