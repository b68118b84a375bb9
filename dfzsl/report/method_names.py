"""Names as papers write them, and what they mean: the reader of glossary.yaml."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfzsl.io.untrusted.yaml_reader import read_yaml

BOOK: Any = read_yaml(Path(__file__).parent / "glossary.yaml")
COLORS = 8
MARKERS = "osD^vPXphd<>"
NAMES = {
    "base2new": "base-to-new",
    "gzsl": "generalized zero-shot",
    "xd": "cross-data-set transfer",
    "dg": "domain generalization",
    "fewshot": "few-shot classification",
}


def method_name(trainer: str, config: str) -> str:
    """A trainer's name in papers; its own where the glossary has none."""
    entry = BOOK["methods"].get(f"{trainer}:{config}") or BOOK["methods"].get(trainer)
    return entry["name"] if entry else trainer


def dataset_name(folder: str) -> str:
    return BOOK["datasets"].get(folder, folder)


def in_papers_order(folders: Iterable[str]) -> list[str]:
    """Data sets as papers list them, unknown ones after these by name."""
    known = list(BOOK["datasets"])
    return sorted(folders, key=lambda name: (known.index(name) if name in known else len(known), name))


def look(label: str) -> tuple[int, str]:
    """The colour (0 to 7) and the marker of a method, the same on every page."""
    fixed = {entry["name"]: (entry["color"], entry["marker"]) for entry in BOOK["methods"].values()}
    free = [pair for pair in itertools.product(range(COLORS), MARKERS) if pair not in fixed.values()]
    return fixed.get(label) or free[zlib.crc32(label.encode()) % len(free)]


def meaning(label: str) -> str:
    """What a method is, in words; "" where the glossary does not say."""
    said = {entry["name"]: entry["means"] for entry in BOOK["methods"].values()}
    found = [name for name in said if label == name or label.startswith((f"{name} (", f"{name} ["))]
    return said[max(found, key=len)] if found else ""


def glossary() -> str:
    """The whole as Markdown: docs/glossary.md."""
    methods = [(entry["name"], key, entry["means"]) for key, entry in BOOK["methods"].items()]
    lines = [
        "# Names in tables",
        "",
        "For readers of a table or a page of results: what each name in it means. Methods bear the names of",
        "papers; beside these stands what to type after `--methods`.",
        "",
        "| method | to type | is |",
        "|---|---|---|",
        *(f"| {name} | `{key}` | {means} |" for name, key, means in methods),
        "",
        "| after a name | means |",
        "|---|---|",
        *(f"| {name} | {means} |" for name, means in BOOK["suffixes"].items()),
        "",
        "| mark | means |",
        "|---|---|",
        *(f"| {name} | {means} |" for name, means in BOOK["marks"].items()),
        "",
        "| column | holds |",
        "|---|---|",
        *(f"| {name} | {means} |" for name, means in BOOK["columns"].items()),
    ]
    return "\n".join(lines) + "\n"
