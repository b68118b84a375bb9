"""Summarize a file of this project from its header alone."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors import SafetensorError, safe_open
from tabulate import tabulate

from dfzsl.utils.errors import UserError, one_line

KINDS = {
    "teacher": "a teacher: the owner's classifier of base classes",
    "classifier": "a classifier of base and new classes",
    "virtual": "virtual classes: what was recovered of a teacher",
    "geometry": "the geometry of an encoder: how its image features scatter",
    "features": "image features of a data set",
    "image features": "image features, from the cache",
    "text features": "text features, from the cache",
    "answers": "answers of a teacher that were paid for",
    "part": "a part of image features, from the cache",
}
LONGEST = 76


def summarize_file(path: str | os.PathLike[str]) -> str:
    """The card of a file that this project writes. Raises UserError for any other."""
    try:
        # Not as torch's: a card needs no tensor, and importing torch takes seconds.
        with safe_open(path, framework="np") as file:
            about = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
            kind = about.pop("kind", "")
            flags = [bool(flag) for flag in file.get_tensor("is_new")] if kind == "classifier" else []
    except FileNotFoundError:
        raise UserError(f"{os.fspath(path)}: no such file") from None
    # Of types that numpy does not know there are AttributeErrors.
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError, AttributeError) as error:
        raise UserError(f"{os.fspath(path)}: not a file of this project ({error})") from None
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{os.fspath(path)}: a safetensors file, but none that this project writes")
    names = about.pop("classnames", [])
    names = names if isinstance(names, list) else [names]
    rows = [("file", f"{os.fspath(path)} ({os.path.getsize(path):,} bytes)"), ("is", KINDS[kind])]
    if len(names) == len(flags) > 0:
        for what, new in (("base classes", False), ("new classes", True)):
            rows.append(
                (what, _listed([name for name, flag in zip(names, flags, strict=True) if flag == new]))
            )
    elif names:
        rows.append(("classes", _listed(names)))
    nested = {
        f"{name}: {key}": v
        for name, value in about.items()
        if isinstance(value, dict)
        for key, v in value.items()
    }
    flat = {name: value for name, value in about.items() if not isinstance(value, dict)}
    rows += [
        (name.replace("_", " "), _said(value))
        for name, value in sorted({**flat, **nested}.items())
        if value not in ("", [], None)
    ]
    rows += [("tensor", f"{name} {tuple(shape)}") for name, shape in shapes.items()]
    return tabulate([(name, one_line(text)) for name, text in rows], tablefmt="plain", disable_numparse=True)


def _listed(names: Any) -> str:
    said = ", ".join(map(str, names[:LONGEST]))
    short = said if len(said) <= LONGEST else f"{said[:LONGEST].rpartition(',')[0] or said[:LONGEST]}, ..."
    return f"{len(names)}: {short}" if len(names) != 0 else "0"


def _said(value: Any) -> str:
    if isinstance(value, list):
        return _listed(value)
    return str(value) if isinstance(value, str | bool | int | float) else json.dumps(value)[:LONGEST]
