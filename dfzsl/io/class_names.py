"""Read class names and check that they are unique and printable."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable

from dfzsl.utils.errors import UNPRINTABLE, UserError

from .files import read_json, read_text

CLASS_NAME_SUFFIXES = (".txt", ".json")


def read_classnames(source: str) -> list[str]:
    """Read class names.

    Args:
        source: a .txt file (one name per line), a .json file (a list), or names separated by commas.

    Returns:
        The class names in the order of the source.

    Raises:
        UserError: the file is missing or broken, or `check_class_names` rejects the names.
    """
    if not source.endswith(CLASS_NAME_SUFFIXES) and not os.path.exists(source):
        names = [name.strip() for name in source.split(",")]
    elif source.endswith(".json"):
        content = read_json(source)
        if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
            raise UserError(f"{source}: class names must be a JSON list of strings")
        names = content
    else:
        names = [line.strip() for line in read_text(source).splitlines()]
    names = [name for name in names if name]
    if not names:
        raise UserError(f"{source}: it has no class names")
    return check_class_names(names, source)


def check_class_names(names: object, where: object, taken: Iterable[str] = ()) -> list[str]:
    """Check class names and return them as a list.

    Args:
        names: list or tuple of class names, from a file or from the user.
        where: file or option that the names come from, for the message.
        taken: names of base classes, which `names` must not repeat.

    Returns:
        The class names as a list.

    Raises:
        UserError: `names` is not a list of strings; a name is empty, has control characters (which could
            control a terminal), or equals another one after `normalize_class_name`.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: class names must be a list of strings")
    base = {normalize_class_name(name): name for name in taken}
    seen = dict(base)
    for label, name in enumerate(names):
        if UNPRINTABLE.search(name):
            raise UserError(f"{where}: the name of class {label} has unprintable characters: '{name}'")
        if not (key := normalize_class_name(name)):
            raise UserError(f"{where}: class {label} has no name")
        if key in seen:
            problem = "is already a base class" if key in base else "occurs twice"
            spelling = "" if seen[key] == name else f" (also written '{seen[key]}')"
            raise UserError(f"{where}: '{name}' {problem}{spelling}; class names must be unique")
        seen[key] = name
    return list(names)


def normalize_class_name(name: str) -> str:
    """Normalize a class name: underscores become spaces, case is folded, spaces collapse, Unicode is NFC.

    Two names with the same normal form name the same class: the text encoder cannot distinguish them.
    """
    return " ".join(unicodedata.normalize("NFC", name.replace("_", " ").casefold()).split())
