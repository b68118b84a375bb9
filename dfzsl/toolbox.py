"""How this project joins Dassl: config keys added to its defaults, classes added to its registries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dassl.config.defaults import _C as DEFAULTS
from yacs.config import CfgNode


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


def keys_of(settings: type) -> dict[str, Any]:
    """Config keys for the fields of a settings dataclass, upper case, with the defaults."""
    return {field.name.upper(): field.default for field in dataclasses.fields(settings)}


def register(registry: Any) -> Callable[[type], type]:
    """Class decorator: register under the class's name, unless somebody else holds that name already.

    In a CoOp checkout the names CoOp and OxfordPets belong to the checkout; ours step aside.
    """

    def decorate(cls: type) -> type:
        if cls.__name__ not in registry.registered_names():
            registry.register(cls)
        return cls

    return decorate
