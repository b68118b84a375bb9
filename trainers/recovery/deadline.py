"""Provide a network backend of httpcore that ends a whole HTTP exchange by one deadline.

The time-outs of httpcore and httpx are those of single operations: each received byte starts them anew, so
that a server which sends its headers one by one could hold a client for ever.
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Iterable
from typing import Any

import httpcore

WRITE_AT_ONCE = 1 << 16  # bytes


class DeadlineBackend(httpcore.NetworkBackend):
    """Blocking sockets on which every operation ends when so many seconds have passed from now on.

    It raises the time-out errors of httpcore. The resolution of a host name is not interrupted.

    Args:
        seconds: time for all operations together.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.backend = httpcore.SyncBackend()

    def left(self, timeout: float | None = None) -> float:
        """Return the seconds until the deadline, or `timeout` if that is less."""
        left = min(self.end - time.monotonic(), math.inf if timeout is None else timeout)
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline has passed")
        return left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        stream = self.backend.connect_tcp(host, port, self.left(timeout), local_address, socket_options)
        return _DeadlineStream(stream, self)


class _DeadlineStream(httpcore.NetworkStream):
    """A connection of a `DeadlineBackend`."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: DeadlineBackend) -> None:
        self.stream, self.deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, self.deadline.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), WRITE_AT_ONCE):
            self.stream.write(buffer[start : start + WRITE_AT_ONCE], self.deadline.left(timeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self.stream.start_tls(ssl_context, server_hostname, self.deadline.left(timeout))
        return _DeadlineStream(stream, self.deadline)

    def close(self) -> None:
        self.stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)
