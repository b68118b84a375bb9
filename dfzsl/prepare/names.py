"""Resolve names of data sets that can be downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from dfzsl.configs import CONFIGS
from dfzsl.io.untrusted.yaml_reader import read_yaml
from dfzsl.utils.errors import unknown_name

from .recipes import RECIPES


def dataset_names(given: Sequence[str]) -> list[str]:
    """Return the registry names of data sets.

    Args:
        given: registry names or config names, in any case; "all" is all.

    Raises:
        UserError: a name is unknown.
    """
    known = {name.lower(): name for name in RECIPES}
    for config in (CONFIGS / "datasets").glob("*.yaml"):
        keys = cast(dict[str, Any], read_yaml(config))
        if (name := keys["DATASET"]["NAME"]) in RECIPES:
            known[config.stem] = name
    names: list[str] = []
    for word in given:
        if word.lower() != "all" and word.lower() not in known:
            raise unknown_name("data set", word, [*known, "all"])
        names += list(RECIPES) if word.lower() == "all" else [known[word.lower()]]
    return list(dict.fromkeys(names))
