"""Run a third-party parser in a child process whose memory is limited.

For parsers that offer no bound of their own. The child is started as `python -m
dfzsl.io.untrusted.memory_limited FUNCTION PATH OUTPUT` and leaves its arrays in the folder OUTPUT, or the
line of its error.
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

MIN_MEMORY = 1 << 30  # bytes that reading any file may take, beside 100 times its size
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
        # Its modules are those of this process, also where the caller has put some in front.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ended = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if (error := Path(folder, ERROR)).exists():
            raise UserError(error.read_text(encoding="utf-8"))
        if ended.returncode:
            raise UserError(f"{path}: its reader ended with exit code {ended.returncode}, or out of memory")
        with np.load(Path(folder, ARRAYS), allow_pickle=False) as arrays:
            return dict(arrays)


def limit_memory(path: str | os.PathLike[str]) -> None:
    """Limit this process to the memory that it has, 1 GiB and 100 times the size of `path` (Linux only)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    except (ImportError, OSError):  # another system
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MIN_MEMORY + MAX_EXPANSION * os.stat(path).st_size
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def main(function: str, path: str, folder: str) -> None:
    # Imported before memory is limited: the limit is for the file.
    read = pkgutil.resolve_name(function)
    limit_memory(path)
    try:
        np.savez(Path(folder, ARRAYS), **read(path))
    except Exception as error:
        problem = describe_user_error(error) or f"{path}: it cannot be read ({type(error).__name__}: {error})"
        if isinstance(error, MemoryError):
            problem = f"{path}: it claims far more data than it holds, or memory is short"
        Path(folder, ERROR).write_text(problem, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
