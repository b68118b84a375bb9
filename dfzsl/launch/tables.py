"""The tables at a sweep's end. They need no torch, whose import takes seconds: a sweep that ended well shows
them at once when the same command comes again, and only then is looked at as closely as any other."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfzsl import report
from dfzsl.io.files import read_json, write_json
from dfzsl.io.results import RESULTS
from dfzsl.utils.errors import UserError

ENDED = ".ended"  # in a protocol's folder: the folders of runs of each command that ended well


def show(folder: Path) -> None:
    """Print the tables of a protocol's folder, and write its page where matplotlib is there to draw it and
    some results are newer."""
    parts = report.sections(report.collect(folder))
    report.show(parts)
    if importlib.util.find_spec("matplotlib"):
        page = folder / "report.html"
        made = page.stat().st_mtime_ns if page.exists() else 0
        if any(path.stat().st_mtime_ns >= made for path in folder.rglob(RESULTS)):
            from dfzsl.report.page import write_page

            write_page(page, parts)
        print(f"The same with pictures: {page}")


def count(runs: int, finished: int, folder: Path) -> str:
    return f"{runs} runs ({finished} finished already) into {folder}"


def show_ended(args: argparse.Namespace) -> bool:
    """Show the tables of a command that ended well before, unless results are missing; whether it did."""
    output = Path(args.output)
    try:
        runs: Any = read_json(_note(args))
        if not all((output / part / RESULTS).exists() for parts in runs for part in parts):
            return False
    except (UserError, OSError, TypeError):  # there is none, or another than is written here
        return False
    print(count(len(runs), len(runs), output / args.protocol))
    show(output / args.protocol)
    print("Data, encoder and settings, beside those of these runs:", end=" ", flush=True)
    return True


def note_ended(args: argparse.Namespace, runs: Sequence[Sequence[Path]]) -> None:
    """Note that a command ended well, with the folders of its `runs`."""
    write_json(_note(args), [[str(part.relative_to(args.output)) for part in parts] for parts in runs])


def _note(args: argparse.Namespace) -> Path:
    command = hashlib.sha256(json.dumps(vars(args), sort_keys=True).encode()).hexdigest()
    return Path(args.output, args.protocol, ENDED, f"{command[:16]}.json")
