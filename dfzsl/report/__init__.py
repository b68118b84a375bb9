"""Tables and one HTML page from the results of runs: `python -m dfzsl.report OUTPUT`."""

from __future__ import annotations

from pathlib import Path

from .outcomes import collect, collect_logs
from .tables import FORMATS, sections

__all__ = ["FORMATS", "collect", "collect_logs", "sections", "show"]


def show(folder: Path) -> None:
    """Print the tables of an output folder, or of the folder of one protocol, for the terminal."""
    print(FORMATS["terminal"](sections(collect(folder))), end="")
