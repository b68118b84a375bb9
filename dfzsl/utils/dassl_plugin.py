"""Add config keys to Dassl's default config and classes to its registries."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from typing import Any

from dassl.config.defaults import _C as DEFAULTS
from yacs.config import CfgNode

from .errors import one_line

ADDED_KEYS: set[str] = set()  # dotted keys that only this project has


def add_keys(node: str, **keys: Any) -> None:
    """Add keys to Dassl's default config. A key that exists already keeps its default.

    Args:
        node: dotted name of the node, which is created if it does not exist.
        keys: names of keys and their defaults.

    >>> add_keys("TRAINER.COOP", N_CTX=16)
    """
    target = DEFAULTS
    for part in node.split("."):
        if part not in target:
            target[part] = CfgNode()
        target = target[part]
    for key, value in keys.items():
        if key not in target:
            target[key] = value
            if not node.startswith(("TRAINER", "DATASET")):  # CoOp and its forks have these nodes
                ADDED_KEYS.add(f"{node}.{key}")


def keys_of(settings: type) -> dict[str, Any]:
    """Return config keys for a dataclass of settings: upper-case field names and their defaults."""
    return {field.name.upper(): field.default for field in dataclasses.fields(settings)}


def list_changes(cfg: CfgNode) -> list[str]:
    """List the settings that differ from the defaults as `KEY VALUE`, except OUTPUT_DIR and RESUME."""
    default = _flat(DEFAULTS)
    ignored = ("OUTPUT_DIR", "RESUME")
    return [
        one_line(f"{key} {shlex.quote(str(value))}")
        for key, value in _flat(cfg).items()
        if key not in ignored and (key not in default or value != default[key])
    ]


def _flat(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return the values of a config by dotted key: {"OPTIM.LR": 0.002, ...}."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        values |= _flat(value, f"{name}.") if isinstance(value, CfgNode) else {name: value}
    return values


def register(registry: Any, replace: bool = False) -> Callable[[type], type]:
    """Register the decorated class under its name, unless that name is taken.

    In a CoOp checkout the trainers CoOp and CoCoOp are those of the checkout. The data sets replace those of
    the checkout: they read the same folders, and also have new classes, a prompt template and a mode without
    training images.

    Args:
        registry: Dassl's registry of trainers or data sets.
        replace: register also if the name is taken; the previous class becomes the attribute `replaced`.

    Returns:
        A class decorator.
    """

    def decorate(cls: type) -> type:
        if replace and cls.__name__ in registry.registered_names():
            cls.replaced = registry.get(cls.__name__)  # type: ignore[attr-defined]
        if replace or cls.__name__ not in registry.registered_names():
            registry.register(cls, force=replace)
        return cls

    return decorate
