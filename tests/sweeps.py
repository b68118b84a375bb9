"""Sweeps through the command line: their options, jobs and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dfzsl.cli import experiments
from dfzsl.launch.runs import Job
from dfzsl.launch.sweep import SweepOptions, plan


def sweep_options(words: Sequence[str]) -> SweepOptions:
    """The options of `dfzsl WORDS`. Raises click.UsageError or UserError for a user's mistake."""
    protocol, *rest = words
    context = experiments.launch.commands[protocol].make_context(protocol, rest)
    params = {name: value for name, value in context.params.items() if name != "dry_run"}
    return experiments.sweep_options(protocol, **params)


def planned_jobs(words: Sequence[str]) -> list[Job]:
    """The jobs of `dfzsl WORDS`. Raises click.UsageError or UserError for a user's mistake."""
    return plan(sweep_options(words))


def start_sweep(folder: Path, *words: str) -> subprocess.Popen:
    """`python -m dfzsl.launch WORDS` in `folder`, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dfzsl.launch", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
