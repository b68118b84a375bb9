"""Estimate the duration of a sweep from finished runs, and order its runs, longest first."""

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

MAX_RUN_SECONDS = 1e8  # three years; longer durations come from wrong clocks


def forecast(pending: Sequence[Job], workers: int) -> str:
    """Return a table of pending runs and an estimate of their duration.

    Args:
        pending: jobs that are not finished.
        workers: number of runs at a time.

    Returns:
        Text. The duration of a run is the median of finished runs of the same method on the same data set.
    """

    median_seconds = functools.cache(_median_seconds)

    def seconds(job: Job) -> float | None:
        """Return the duration of the parts that are not finished, None if one of them is unknown."""
        by_part = [
            median_seconds(folder.parent) for folder, _ in job.parts() if not (folder / RESULTS).exists()
        ]
        return None if None in by_part else sum(filter(None, by_part))

    kinds: dict[tuple[str, str], list[Job]] = {}
    for job in pending:
        method, config = job.parts()[0][0].parts[-3:-1]
        kinds.setdefault((f"{method} ({config})", job.data.name), []).append(job)
    rows, known_seconds = [], []
    for kind, jobs in kinds.items():
        durations = [value for value in map(seconds, jobs) if value is not None]
        known_seconds += durations
        median = _format_duration(statistics.median(durations)) if durations else "unknown"
        rows.append((*kind, len(jobs), median))
    headers = ["method", "data set", "runs", "time per run"]
    table = tabulate(rows, headers, colalign=("left", "left", "right", "right"))
    if not known_seconds:
        return f"{table}\nEstimated time: unknown until a run of each kind has finished."
    total = len(pending)
    coverage = (
        ""
        if len(known_seconds) == total
        else f" for {len(known_seconds)} of {total} runs, the others unknown"
    )
    # A run is not split among workers, so the total is no shorter than the longest run.
    estimate = max(sum(known_seconds) / workers, max(known_seconds))
    basis = "by the median of finished runs of the same method on the same data set"
    return f"{table}\nAbout {_format_duration(estimate)} on {workers} workers{coverage}; {basis}."


def longest_first(jobs: Sequence[Job]) -> Iterator[Job]:
    """Yield each job once, the longest of the remaining ones first, so that no long run starts last.

    Durations are read from the runs that have finished by then; a method without a finished run counts as
    longest. Jobs of equal duration keep their order.
    """
    remaining = [(job, [folder.parent for folder, _ in job.parts()]) for job in jobs]
    median_by_kind: dict[Path, float] = {}
    while remaining:
        for kind in {kind for _, kinds in remaining for kind in kinds} - median_by_kind.keys():
            with contextlib.suppress(UserError):  # invalid results raise an error where they are read
                if (seconds := _median_seconds(kind)) is not None:
                    median_by_kind[kind] = seconds
        durations = [sum(median_by_kind.get(kind, math.inf) for kind in kinds) for _, kinds in remaining]
        yield remaining.pop(durations.index(max(durations)))[0]


def _median_seconds(runs: Path) -> float | None:
    """Return the median duration over the seeds in a folder, None if none is finished."""
    results = [read_results(path) for path in runs.glob(f"seed*/{RESULTS}")]
    elapsed = [seconds for seconds in map(_seconds, results) if seconds is not None]
    return statistics.median(elapsed) if elapsed else None


def _seconds(results: Mapping[str, Any]) -> float | None:
    """Return the duration of a run, None if it is invalid, e.g. because the clock was set back."""
    elapsed = results.get("elapsed")
    is_number = isinstance(elapsed, int | float) and not isinstance(elapsed, bool)
    return elapsed if is_number and 0 <= elapsed < MAX_RUN_SECONDS else None  # type: ignore[operator]


def _format_duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
