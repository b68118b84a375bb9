"""Sweeps through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


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
