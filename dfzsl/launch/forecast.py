"""How long a sweep may take, by what has finished already."""

from __future__ import annotations

import datetime
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from ..results import RESULTS, read_results
from .runs import Job


def forecast(todo: Sequence[Job], workers: int) -> str:
    """What will run and how long it may take, by finished runs of the same method on the same data."""

    @functools.cache
    def usual(runs: Path) -> float | None:
        """Median over the seeds in a folder; None where none is finished."""
        found = [read_results(path) for path in runs.glob(f"seed*/{RESULTS}")]
        elapsed = [results["elapsed"] for results in found if "elapsed" in results]
        return statistics.median(elapsed) if elapsed else None

    def seconds(job: Job) -> float | None:
        """Of the parts that are not finished; None where one of them is unknown."""
        each = [usual(folder.parent) for folder, _ in job.parts() if not (folder / RESULTS).exists()]
        return None if None in each else sum(filter(None, each))

    kinds: dict[tuple[str, str], list[Job]] = {}
    for job in todo:
        method, config = job.parts()[0][0].parts[-3:-1]
        kinds.setdefault((f"{method} ({config})", job.data.name), []).append(job)
    rows, known = [], []
    for kind, jobs in kinds.items():
        each = [value for value in map(seconds, jobs) if value is not None]
        known += each
        rows.append((*kind, len(jobs), _clock(statistics.median(each)) if each else "unknown"))
    headers = ["method", "data set", "runs", "each takes"]
    table = tabulate(rows, headers, colalign=("left", "left", "right", "right"))
    if not known:
        return f"{table}\nHow long: unknown until a run of each has finished."
    of = "" if len(known) == len(todo) else f" for {len(known)} of {len(todo)} runs, the others unknown"
    # No run is split, so the last ones leave workers idle.
    longest = max(sum(known) / workers, max(known))
    basis = "by the median of finished runs of the same method on the same data"
    return f"{table}\nAbout {_clock(longest)} on {workers} workers{of}; {basis}."


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
