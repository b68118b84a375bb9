"""Read class names and check that they are unique and printable."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable

from dfzsl.utils.errors import UNPRINTABLE, UserError

from .files import read_json, read_text

SUFFIXES = (".txt", ".json")  # of files of class names


def read_classnames(source: str) -> list[str]:
    """Read class names.

    Args:
        source: a .txt file (one name per line), a .json file (a list), or the names themselves, separated by
            commas.

    Raises:
        UserError: the file is missing or broken, or the names are refused by `check_class_names`.
    """
    if not source.endswith(SUFFIXES) and not os.path.exists(source):
        names = [name.strip() for name in source.split(",")]
    elif source.endswith(".json"):
        content = read_json(source)
        if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
            raise UserError(f"{source}: class names are a JSON list of texts")
        names = content
    else:
        names = [line.strip() for line in read_text(source).splitlines()]
    names = [name for name in names if name]
    if not names:
        raise UserError(f"{source}: it names no class")
    return check_class_names(names, source)


def check_class_names(names: object, where: object, taken: Iterable[str] = ()) -> list[str]:
    """Check class names and return them as a list.

    Args:
        names: list or tuple of class names, from a file or from the user.
        where: file or option that the names come from, for the message.
        taken: names of base classes, which `names` must not repeat.

    Raises:
        UserError: `names` is no list of texts; a name is empty, has control characters (logs, tables and
            terminals would obey them), or is read by the text encoder like another one (`normalize_class_name`).
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: it has no list of class names")
    base = {normalize_class_name(name): name for name in taken}
    seen = dict(base)
    for label, name in enumerate(names):
        if UNPRINTABLE.search(name):
            raise UserError(
                f"{where}: the name of class {label} has characters that cannot be shown: '{name}'"
            )
        if not (key := normalize_class_name(name)):
            raise UserError(f"{where}: class {label} has no name")
        if key in seen:
            problem = "is a base class already" if key in base else "is the name of two classes"
            other = "" if seen[key] == name else f" (also written '{seen[key]}')"
            raise UserError(f"{where}: '{name}' {problem}{other}; a class needs a name of its own")
        seen[key] = name
    return list(names)


def normalize_class_name(name: str) -> str:
    """Normalize a class name to what a text encoder reads of it.

    Underscores become spaces; case, repeated blanks and the Unicode form of a letter do not matter. Two names
    with the same normal form name the same class.
    """
    return " ".join(unicodedata.normalize("NFC", name.replace("_", " ").casefold()).split())
