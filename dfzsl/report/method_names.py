"""Read glossary.yaml: the names of methods and data sets in papers, and the meaning of table columns."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfzsl.io.untrusted.yaml_reader import read_yaml

GLOSSARY: Any = read_yaml(Path(__file__).parent / "glossary.yaml")
NUM_COLORS = 8
MARKERS = "osD^vPXphd<>"
PROTOCOL_TITLES = {
    "base2new": "base-to-new",
    "gzsl": "generalized zero-shot",
    "xd": "cross-data-set transfer",
    "dg": "domain generalization",
    "fewshot": "few-shot classification",
}


def method_name(trainer: str, config: str) -> str:
    """Return the name of a trainer in papers, or `trainer` itself if the glossary has no entry."""
    entry = GLOSSARY["methods"].get(f"{trainer}:{config}") or GLOSSARY["methods"].get(trainer)
    return entry["name"] if entry else trainer


def dataset_name(folder: str) -> str:
    """Return the name of a data set in papers, or `folder` itself if the glossary has no entry."""
    return GLOSSARY["datasets"].get(folder, folder)


def sort_datasets(folders: Iterable[str]) -> list[str]:
    """Sort data sets in the order of papers; unknown ones follow by name."""
    known = list(GLOSSARY["datasets"])
    return sorted(folders, key=lambda name: (known.index(name) if name in known else len(known), name))


def style_of(label: str) -> tuple[int, str]:
    """Return the color (0 to 7) and the marker of a method; they are the same on every page."""
    fixed = {entry["name"]: (entry["color"], entry["marker"]) for entry in GLOSSARY["methods"].values()}
    free = [pair for pair in itertools.product(range(NUM_COLORS), MARKERS) if pair not in fixed.values()]
    return fixed.get(label) or free[zlib.crc32(label.encode()) % len(free)]


def describe_method(label: str) -> str:
    """Return the description of a method, "" if the glossary has none."""
    descriptions = {entry["name"]: entry["means"] for entry in GLOSSARY["methods"].values()}
    names = [name for name in descriptions if label == name or label.startswith((f"{name} (", f"{name} ["))]
    return descriptions[max(names, key=len)] if names else ""


def glossary_markdown() -> str:
    """Return the glossary as Markdown, the content of docs/glossary.md."""
    methods = [(entry["name"], key, entry["means"]) for key, entry in GLOSSARY["methods"].items()]
    lines = [
        "# Names in tables",
        "",
        "For readers of result tables and pages: the meaning of each name. Methods have their names in",
        "papers; the second column is the value for `--methods`.",
        "",
        "| method | `--methods` | meaning |",
        "|---|---|---|",
        *(f"| {name} | `{key}` | {means} |" for name, key, means in methods),
        "",
        "| after a name | meaning |",
        "|---|---|",
        *(f"| {name} | {means} |" for name, means in GLOSSARY["suffixes"].items()),
        "",
        "| mark | meaning |",
        "|---|---|",
        *(f"| {name} | {means} |" for name, means in GLOSSARY["marks"].items()),
        "",
        "| column | meaning |",
        "|---|---|",
        *(f"| {name} | {means} |" for name, means in GLOSSARY["columns"].items()),
    ]
    return "\n".join(lines) + "\n"
