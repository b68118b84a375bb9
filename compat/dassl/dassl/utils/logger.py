"""Standard output copied to a file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any, TextIO

from .tools import mkdir_if_missing

__all__ = ["Logger", "setup_logger"]


class Logger:
    """A text stream that writes to the console and, if `fpath` is given, to that file as well.

    Everything else (encoding, isatty, fileno ...) is the console's. Closing it closes the file alone: the
    console belongs to the program, not to the log.
    """

    def __init__(self, fpath: str | None = None) -> None:
        stdout = sys.stdout
        self.console: TextIO = stdout.console if isinstance(stdout, Logger) else stdout
        self.file: TextIO | None = None
        if fpath is not None:
            mkdir_if_missing(os.path.dirname(fpath))
            self.file = open(fpath, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["console"], name)

    def write(self, msg: str) -> int:
        if self.file is not None:
            try:
                self.file.write(msg)
                # Line by line, so that a killed run leaves its whole log.
                self.file.flush()
            except OSError as error:  # the disk is full: what the buffer holds must not fail again at the end
                error.filename = error.filename or self.file.name
                with contextlib.suppress(OSError):
                    self.close()
                self.file = None
                raise
        return self.console.write(msg)

    def flush(self) -> None:
        self.console.flush()
        if self.file is not None:
            self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def setup_logger(output: str | None = None) -> None:
    """Copy standard output to `output`: a path ending in .txt or .log, or a folder (its log.txt).

    A file that exists is kept: the new one gets the suffix -YYYY-MM-DD-hh-mm-ss. None: no file. A logger set
    up before is closed, so each run of one program has a log of its own.
    """
    if output is None:
        return
    path = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    if os.path.exists(path):
        path += time.strftime("-%Y-%m-%d-%H-%M-%S")
    previous = sys.stdout
    sys.stdout = Logger(path)  # type: ignore[assignment]
    if isinstance(previous, Logger):
        previous.close()
