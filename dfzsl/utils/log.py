"""Provide the logger `dfzsl` and a handler that writes its messages to standard output."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

logger = logging.getLogger("dfzsl")


class _StandardOutput(logging.Handler):
    """Write messages to the current `sys.stdout`, which Dassl's logger replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stdout.write(f"{self.format(record)}\n")
        except Exception:
            self.handleError(record)


def log_to_stdout() -> None:
    """Print log messages on standard output, which Dassl copies to OUTPUT_DIR/log.txt.

    Meant for programs. A second call has no effect.
    """
    if not any(isinstance(handler, _StandardOutput) for handler in logger.handlers):
        logger.addHandler(_StandardOutput())
        logger.setLevel(logging.INFO)


@contextlib.contextmanager
def logged_to_stdout() -> Iterator[None]:
    """Print log messages on standard output in this block, as `log_to_stdout` does."""
    handlers, level = list(logger.handlers), logger.level
    log_to_stdout()
    try:
        yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
