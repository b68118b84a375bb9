"""Provide the exception that becomes an error reply of the server."""

from __future__ import annotations


class Refusal(Exception):
    """A request that the server does not answer.

    Args:
        status: HTTP status of the reply.
        message: what is wrong and what to do, in one line.
        retry_after: seconds after which the client may try again, or None where that does not help.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
