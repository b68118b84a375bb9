"""Provide the project's logger, and handlers for a run's messages."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

logger = logging.getLogger("dfzsl")


class _StandardOutput(logging.Handler):
    """Write messages to what `sys.stdout` is at that moment: Dassl's own logger replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stdout.write(f"{self.format(record)}\n")
        except Exception:
            self.handleError(record)


def log_to_stdout() -> None:
    """Show messages on standard output, which Dassl copies to OUTPUT_DIR/log.txt.

    For programs. A second call changes nothing.
    """
    if not any(isinstance(handler, _StandardOutput) for handler in logger.handlers):
        logger.addHandler(_StandardOutput())
        logger.setLevel(logging.INFO)


@contextlib.contextmanager
def logged_to_stdout() -> Iterator[None]:
    """Show messages on standard output within the block, as `log_to_stdout` does."""
    handlers, level = list(logger.handlers), logger.level
    log_to_stdout()
    try:
        yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
