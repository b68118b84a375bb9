"""Tables and one HTML page from the results of runs: `python -m dfzsl.report OUTPUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from .formats import FORMATS, terminal
from .outcomes import collect, collect_logs
from .sections import sections

__all__ = ["FORMATS", "collect", "collect_logs", "sections", "show"]


def show(folder: Path) -> None:
    """Print the tables of an output folder, or of the folder of one protocol, for the terminal."""
    print(terminal(sections(collect(folder)), marked=sys.stdout.isatty()), end="")
