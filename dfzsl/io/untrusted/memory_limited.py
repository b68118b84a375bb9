"""Run a third-party parser in a child process whose memory is limited.

Parsers without a limit of their own need this. The child is started as `python -m
dfzsl.io.untrusted.memory_limited FUNCTION PATH OUTPUT`; it writes the arrays, or its error, to the folder
OUTPUT.
"""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dfzsl.utils.errors import UserError, describe_user_error

from .archives import MAX_EXPANSION

MIN_MEMORY = 1 << 30  # bytes for any file, in addition to 100 times its size
ARRAYS, ERROR = "arrays.npz", "error.txt"


def read_arrays(function: str, path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Call a function on a file in a child process of limited memory.

    Args:
        function: "package.module:name" of a function of a path that returns a dict of arrays.
        path: the file to read.

    Returns:
        The arrays that the function returned.

    Raises:
        UserError: the function raised an error, or the child ran out of memory.
    """
    with tempfile.TemporaryDirectory(prefix="dfzsl-") as folder:
        command = [sys.executable, "-m", __name__, function, os.fspath(path), folder]
        # The child imports the same modules, also if the caller has changed sys.path.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        child = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if (error := Path(folder, ERROR)).exists():
            raise UserError(error.read_text(encoding="utf-8"))
        if child.returncode:
            raise UserError(
                f"{path}: the reading process failed with exit code {child.returncode} or ran out of memory"
            )
        with np.load(Path(folder, ARRAYS), allow_pickle=False) as arrays:
            return dict(arrays)


def limit_memory(path: str | os.PathLike[str]) -> None:
    """Limit this process to its current memory plus 1 GiB plus 100 times the size of `path` (Linux only)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    except (ImportError, OSError):  # not Linux
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MIN_MEMORY + MAX_EXPANSION * os.stat(path).st_size
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main(function: str, path: str, folder: str) -> None:
    # The import comes first, because the limit is meant for the file alone.
    read = pkgutil.resolve_name(function)
    limit_memory(path)
    try:
        np.savez(Path(folder, ARRAYS), **read(path))
    except Exception as error:
        problem = describe_user_error(error) or f"{path}: it cannot be read ({type(error).__name__}: {error})"
        if isinstance(error, MemoryError):
            problem = f"{path}: it declares far more data than it has, or memory is short"
        Path(folder, ERROR).write_text(problem, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
