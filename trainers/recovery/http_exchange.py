"""Exchange one HTTP request for a reply of bounded size, within one deadline."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass

import anyio
import httpx
from anyio.from_thread import start_blocking_portal

from dfzsl.utils.errors import UserError

MAX_ERROR_BYTES = 1 << 14  # read of a refusal's body


@dataclass(frozen=True)
class Reply:
    """A reply.

    Attributes:
        status: HTTP status.
        headers: by their names in lower case.
        body: its first bytes; more than `max_bytes` of `exchange` if there are more.
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
            `MAX_ERROR_BYTES` are read, as far as they arrive.
        ssl_context: for https.

    Raises:
        OSError: no whole reply in time, no connection, or a reply that is not HTTP. The message holds nothing
            that a server sent.
        UserError: the environment names a proxy that cannot be used.
    """
    # The time-outs of httpx are those of single operations: each received byte starts them anew. A task can
    # be cancelled at any point instead. Its thread is its own, because the caller's may run an event loop
    # already, as notebooks do.
    with start_blocking_portal() as portal:
        return portal.call(_exchange, url, content, headers, seconds, max_bytes, ssl_context)


async def _exchange(
    url: str,
    content: bytes | None,
    headers: Mapping[str, str],
    seconds: float,
    max_bytes: int,
    ssl_context: ssl.SSLContext,
) -> Reply:
    try:
        client = httpx.AsyncClient(verify=ssl_context, follow_redirects=False, timeout=None)
    except (ValueError, httpx.InvalidURL) as error:
        raise UserError(f"a proxy in the environment cannot be used: {error}") from None
    response, body = None, bytearray()
    failure: OSError
    try:
        with anyio.move_on_after(seconds):
            async with (
                client,
                client.stream(
                    "GET" if content is None else "POST",
                    url,
                    content=content,
                    headers={"User-Agent": "dfzsl", "Accept-Encoding": "identity", **headers},
                ) as response,
            ):
                limit = max_bytes if response.is_success else MAX_ERROR_BYTES
                async for piece in response.aiter_raw():
                    body += piece
                    if len(body) > limit:
                        break
                return _reply(response, body)
    except httpx.NetworkError as error:
        failure = ConnectionError(str(error))
    except httpx.TransportError as error:  # its text may quote what the server sent
        failure = ConnectionError(f"a reply that is not HTTP's ({type(error).__name__})")
    else:
        failure = TimeoutError(f"no whole reply within {seconds:g} seconds")
    if response is not None and not response.is_success:
        return _reply(response, body)
    raise failure


def _reply(response: httpx.Response, body: bytearray) -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status_code, headers, bytes(body))
