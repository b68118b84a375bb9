"""Provide the project's logger and the handler that shows its messages on standard output."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("dfzsl")


class _StandardOutput(logging.Handler):
    """Write messages to what `sys.stdout` is at that moment: Dassl's own logger replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stdout.write(f"{self.format(record)}\n")
        except Exception:
            self.handleError(record)


def log_to_stdout() -> None:
    """Show the messages of trainers on standard output, which Dassl copies to OUTPUT_DIR/log.txt.

    A trainer calls this when it is built; a second call changes nothing.
    """
    if not any(isinstance(handler, _StandardOutput) for handler in logger.handlers):
        logger.addHandler(_StandardOutput())
        logger.setLevel(logging.INFO)
