"""Add config keys to Dassl's defaults and classes to its registries."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from typing import Any

from dassl.config.defaults import _C as DEFAULTS
from yacs.config import CfgNode

from .errors import one_line

ADDED_KEYS: set[str] = set()  # the keys of this project alone, dotted


def add_keys(node: str, **keys: Any) -> None:
    """Add `keys` under the dotted `node` of Dassl's default config; a key that stands there already stays.

    >>> add_keys("TRAINER.COOP", N_CTX=16)
    """
    place = DEFAULTS
    for part in node.split("."):
        if part not in place:
            place[part] = CfgNode()
        place = place[part]
    for key, value in keys.items():
        if key not in place:
            place[key] = value
            if not node.startswith(("TRAINER", "DATASET")):  # CoOp's relatives have these
                ADDED_KEYS.add(f"{node}.{key}")


def keys_of(settings: type) -> dict[str, Any]:
    """Config keys for the fields of a settings dataclass, upper case, with the defaults."""
    return {field.name.upper(): field.default for field in dataclasses.fields(settings)}


def list_changes(cfg: CfgNode) -> list[str]:
    """List what a config changes of the defaults, as `KEY VALUE` of a command line, without its folders."""
    default = _flat(DEFAULTS)
    elsewhere = ("OUTPUT_DIR", "RESUME")
    return [
        one_line(f"{key} {shlex.quote(str(value))}")
        for key, value in _flat(cfg).items()
        if key not in elsewhere and (key not in default or value != default[key])
    ]


def _flat(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """{"OPTIM.LR": 0.002, ...}"""
    found: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, CfgNode) else {name: value}
    return found


def register(registry: Any, replace: bool = False) -> Callable[[type], type]:
    """Class decorator: register a class under its name, unless that name is taken.

    In a CoOp checkout the trainers CoOp and CoCoOp are those of the checkout. Data sets replace those of the
    checkout: they read the same folders, and also know which classes are new, the prompt template, and how to
    do without training images.

    Args:
        registry: Dassl's registry of trainers or data sets.
        replace: register also where the name is taken; the class before becomes the attribute `replaced`.
    """

    def decorate(cls: type) -> type:
        if replace and cls.__name__ in registry.registered_names():
            cls.replaced = registry.get(cls.__name__)  # type: ignore[attr-defined]
        if replace or cls.__name__ not in registry.registered_names():
            registry.register(cls, force=replace)
        return cls

    return decorate
