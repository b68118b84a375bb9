"""Summarize the project's safetensors files from their headers, for `dfzsl show`."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors import SafetensorError, safe_open
from tabulate import tabulate

from dfzsl.utils.errors import UserError, one_line

KINDS = {
    "teacher": "teacher: the owner's classifier of base classes",
    "classifier": "classifier of base and new classes",
    "virtual": "virtual classes, recovered from a teacher",
    "geometry": "feature statistics of an image encoder (geometry)",
    "features": "image features of a data set",
    "image features": "image features of the cache",
    "text features": "text features of the cache",
    "answers": "billed responses of a teacher",
    "part": "part of image features of the cache",
}
MAX_VALUE_CHARS = 76


def summarize_file(path: str | os.PathLike[str]) -> str:
    """Summarize a file: kind, classes, metadata and shapes of the tensors, as a table.

    Raises:
        UserError: this project does not write such files.
    """
    try:
        # Importing torch would take seconds, and no tensor is needed.
        with safe_open(path, framework="np") as file:
            about = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
            kind = about.pop("kind", "")
            flags = [bool(flag) for flag in file.get_tensor("is_new")] if kind == "classifier" else []
    except FileNotFoundError:
        raise UserError(f"{os.fspath(path)}: no such file") from None
    # AttributeError: the file has a type that numpy does not have.
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError, AttributeError) as error:
        raise UserError(f"{os.fspath(path)}: not a file of this project ({error})") from None
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{os.fspath(path)}: a safetensors file, but of no kind that this project writes")
    names = about.pop("classnames", [])
    names = names if isinstance(names, list) else [names]
    rows = [("file", f"{os.fspath(path)} ({os.path.getsize(path):,} bytes)"), ("is", KINDS[kind])]
    if len(names) == len(flags) > 0:
        for heading, new in (("base classes", False), ("new classes", True)):
            part = [name for name, flag in zip(names, flags, strict=True) if flag == new]
            rows.append((heading, _format_list(part)))
    elif names:
        rows.append(("classes", _format_list(names)))
    nested = {
        f"{name}: {key}": v
        for name, value in about.items()
        if isinstance(value, dict)
        for key, v in value.items()
    }
    flat = {name: value for name, value in about.items() if not isinstance(value, dict)}
    rows += [
        (name.replace("_", " "), _format_value(value))
        for name, value in sorted({**flat, **nested}.items())
        if value not in ("", [], None)
    ]
    rows += [("tensor", f"{name} {tuple(shape)}") for name, shape in shapes.items()]
    return tabulate([(name, one_line(text)) for name, text in rows], tablefmt="plain", disable_numparse=True)


def _format_list(names: Any) -> str:
    text = ", ".join(map(str, names[:MAX_VALUE_CHARS]))
    if len(text) > MAX_VALUE_CHARS:
        text = text[:MAX_VALUE_CHARS]
        text = f"{text.rpartition(',')[0] or text}, ..."
    return f"{len(names)}: {text}" if len(names) != 0 else "0"


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return _format_list(value)
    return str(value) if isinstance(value, str | bool | int | float) else json.dumps(value)[:MAX_VALUE_CHARS]
