"""How long a sweep may take, by what has finished already."""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dfzsl.io.results import RESULTS, read_results
from dfzsl.utils.errors import UserError

from .runs import Job

LONGEST = 1e8  # seconds that a run can take: three years


def forecast(todo: Sequence[Job], workers: int) -> str:
    """What will run and how long it may take, by finished runs of the same method on the same data."""

    usual = functools.cache(_usual)

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


def longest_first(jobs: Sequence[Job]) -> Iterator[Job]:
    """Each job once: of those left the one that takes longest, by what has finished by then, so that no
    worker is left with a long one when the others are through. A kind of which nothing has finished is taken
    for long; equals come in the order given."""
    left = [(job, [folder.parent for folder, _ in job.parts()]) for job in jobs]
    known: dict[Path, float] = {}
    while left:
        for kind in {kind for _, kinds in left for kind in kinds} - known.keys():
            with contextlib.suppress(UserError):  # of results that are broken: told where they are read
                if (seconds := _usual(kind)) is not None:
                    known[kind] = seconds
        took = [sum(known.get(kind, math.inf) for kind in kinds) for _, kinds in left]
        yield left.pop(took.index(max(took)))[0]


def _usual(runs: Path) -> float | None:
    """Median over the seeds in a folder; None where none is finished."""
    found = [read_results(path) for path in runs.glob(f"seed*/{RESULTS}")]
    elapsed = [seconds for seconds in map(_seconds, found) if seconds is not None]
    return statistics.median(elapsed) if elapsed else None


def _seconds(results: Mapping[str, Any]) -> float | None:
    """What a run took; None where that is no length of time, as of a clock that was set back."""
    said = results.get("elapsed")
    real = isinstance(said, int | float) and not isinstance(said, bool)
    return said if real and 0 <= said < LONGEST else None  # type: ignore[operator]


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
