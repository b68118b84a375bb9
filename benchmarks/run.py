"""Every benchmark that needs no data, small: python benchmarks/run.py [--write]

Prints each ratio beside that of the last run that was committed (benchmarks/last.json); --write puts this run
in its place. A ratio compares two ways of the same work in one run, but a busy machine moves even that: look
at what changed by half before believing it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tabulate import tabulate

HERE = Path(__file__).parent
LAST = HERE / "last.json"
SMALL = {
    "extract": "--backbone shapes --images 100 --side 300 --batch-size 32 --rows 500000 --device cpu",
    "predict": "--pictures 100 --side 300 --rounds 1",
    "vmf": "--draws 200 --rounds 5",
    "pipeline": "",
    "start": "--rounds 2",
    "prompts": "--small",
    "growth": "--most 1000",
    "teacher": "--classes 50,100",
}
RATIOS = (
    "of plain",
    "of the bound",
    "of ours",
    "share of the bound",
    "CPU of sampling's",
    "of the import",
    "of the least",
    "times faster",
    "times less",
    "default / ours",
    "tight / ours",
)  # columns


def ratios(printed: str) -> Iterator[tuple[str, float]]:
    """(row: column, value) of the columns that are ratios, in tables as tabulate writes them for GitHub."""
    head: list[str] = []
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif not set(line) <= set("|-:"):
            words = [
                cell
                for name, cell in zip(head, cells, strict=True)
                if name in ("", "stage", "kappa", "names")
            ]
            row = " ".join(words) or cells[0]
            for name, cell in zip(head, cells, strict=True):
                if name in RATIOS:
                    yield f"{row}: {name}", float(cell.replace(",", ""))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--write", action="store_true", help="keep this run in benchmarks/last.json")
    args = flags.parse_args()
    found: dict[str, float] = {}
    for name, words in SMALL.items():
        ran = subprocess.run(
            [sys.executable, HERE / f"{name}.py", *words.split()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # more of them wait for one another
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(f"## {name}\n\n{ran.stdout}")
        found |= {f"{name}, {what}": value for what, value in ratios(ran.stdout)}
    last = json.loads(LAST.read_text(encoding="utf-8"))["ratios"] if LAST.exists() else {}
    rows = [
        (what, last.get(what), now, now / was if (was := last.get(what)) else None)
        for what, now in found.items()
    ]
    print(tabulate(rows, ["ratio", "last", "now", "now / last"], floatfmt=".2f", tablefmt="github"))
    if args.write:
        machine = {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
        LAST.write_text(json.dumps({"machine": machine, "ratios": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
