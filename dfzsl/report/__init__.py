"""Tables and one HTML page from the results of runs: `python -m dfzsl.report OUTPUT`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from .formats import FORMATS, terminal
from .read_runs import collect, collect_logs
from .sections import Section, sections

__all__ = ["FORMATS", "collect", "collect_logs", "sections", "show"]


def show(parts: Sequence[Section]) -> None:
    """Print the tables for whoever reads standard output: a terminal of some width, or a file."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(terminal(parts, width), end="")
