"""Exchange one HTTP request for a reply of bounded size, headers and all, by one deadline.

The time-outs of httpcore, and of httpx on top of it, are those of single operations: each received byte
starts them anew, so that a server which sends its headers byte by byte could hold a client for ever. A
network backend of our own ends every operation by the same deadline.
"""

from __future__ import annotations

import contextlib
import math
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore

from dfzsl.utils.errors import UserError

MAX_ERROR_BYTES = 1 << 14  # read of a refusal's body
WRITE_AT_ONCE = 1 << 16  # bytes
FAILURES = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
)


@dataclass(frozen=True)
class Reply:
    """A reply.

    Attributes:
        status: HTTP status.
        headers: by their names in lower case.
        body: its first bytes, more than the most that was asked for if there are more.
    """

    status: int
    headers: dict[str, str]
    body: bytes


def exchange(
    url: str,
    content: bytes | None,
    headers: Mapping[str, str],
    *,
    seconds: float,
    max_bytes: int,
    ssl_context: ssl.SSLContext,
) -> Reply:
    """Send one request over a connection of its own, and return the reply.

    Redirects are not followed. The proxy is that of the environment.

    Args:
        url: http:// or https:// address.
        content: body of a POST, or None for a GET.
        headers: beyond those of the protocol.
        seconds: time for the whole exchange, apart from the resolution of the host name.
        max_bytes: where to stop reading the body of a reply with a status of success; of others at most
            `MAX_ERROR_BYTES` are read, and what cannot be read is left out.
        ssl_context: for https.

    Raises:
        OSError: no whole reply in time, no connection, or a reply that is not HTTP. The message holds
            nothing that a server sent.
        UserError: the environment names a proxy that cannot be used.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~").encode()
    address = httpcore.URL(
        scheme=parts.scheme.encode(), host=host.encode("idna"), port=parts.port, target=target
    )
    own = {"Host": host_of(url), "User-Agent": "dfzsl", "Accept-Encoding": "identity"}
    pool = httpcore.ConnectionPool(
        ssl_context=ssl_context,
        proxy=_proxy(parts.scheme, host),
        network_backend=DeadlineBackend(seconds),
    )
    method = "GET" if content is None else "POST"
    try:
        with (
            pool,
            pool.stream(method, address, headers=[*own.items(), *headers.items()], content=content) as reply,
        ):
            received = {
                name.decode("latin-1").lower(): value.decode("latin-1") for name, value in reply.headers
            }
            if 200 <= reply.status < 300:
                body = b"".join(_pieces(reply, max_bytes))
            else:
                body = b""
                with contextlib.suppress(*FAILURES):
                    for piece in _pieces(reply, MAX_ERROR_BYTES):
                        body += piece
            return Reply(reply.status, received, body)
    except httpcore.TimeoutException:
        raise TimeoutError(f"no whole reply within {seconds:g} seconds") from None
    except httpcore.NetworkError as error:
        raise ConnectionError(str(error)) from None
    except FAILURES as error:  # its text may quote what the server sent
        raise ConnectionError(f"a reply that is not HTTP's ({type(error).__name__})") from None


def _pieces(reply: httpcore.Response, max_bytes: int) -> Iterator[bytes]:
    """Yield the body of a reply until its size exceeds `max_bytes`."""
    size = 0
    for piece in reply.iter_stream():
        yield piece
        size += len(piece)
        if size > max_bytes:
            return


def host_of(url: str) -> str:
    """Return the host and port of an address as the `Host` header has them."""
    parts = urlsplit(url)
    host = (parts.hostname or "").encode("idna").decode()
    host = f"[{host}]" if ":" in host else host
    return host if parts.port is None else f"{host}:{parts.port}"


def _proxy(scheme: str, host: str) -> httpcore.Proxy | None:
    """Return the proxy that the environment names for a host, or None."""
    address = getproxies().get(scheme)
    if not address or proxy_bypass(host):
        return None
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{scheme.upper()}_PROXY in the environment is not an http:// or https:// address")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    url = httpcore.URL(scheme=parts.scheme, host=parts.hostname, port=port, target="/")
    user = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
    return httpcore.Proxy(url, auth=user)


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
