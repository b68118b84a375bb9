"""Send HTTP requests with a limit on the size of replies and one deadline."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass

import anyio
import httpx
from anyio.from_thread import start_blocking_portal

from dfzsl.utils.errors import UserError

MAX_ERROR_BYTES = 1 << 14  # of the body of an error reply


@dataclass(frozen=True)
class Reply:
    """Reply of an HTTP server.

    Attributes:
        status: HTTP status.
        headers: values by lower-case name.
        body: its first bytes; more than `max_bytes` of `exchange` only if the reply is longer than that.
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

    Redirects are not followed. Proxies are those of the environment.

    Args:
        url: http:// or https:// address.
        content: body of a POST, or None for a GET.
        headers: additional headers.
        seconds: time limit of the whole exchange, without the resolution of the host name.
        max_bytes: limit on the body of a successful reply. Of other replies at most `MAX_ERROR_BYTES` are
            read, as far as they arrive in time.
        ssl_context: context of https connections.

    Returns:
        The reply.

    Raises:
        OSError: no complete reply in time, no connection, or a reply that is not HTTP. The message contains
            nothing that a server sent.
        UserError: the environment names a proxy that cannot be used.
    """
    # The time-outs of httpx apply to single operations, so a slow server can exceed them. A task can be
    # canceled at any point. It runs in a thread of its own, because the caller's thread may already run an
    # event loop, e.g. in notebooks.
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
    except httpx.TransportError as error:
        # The text of this error may quote the server, so it is not used.
        failure = ConnectionError(f"the reply is not valid HTTP ({type(error).__name__})")
    else:
        failure = TimeoutError(f"no complete reply within {seconds:g} seconds")
    if response is not None and not response.is_success:
        return _reply(response, body)
    raise failure


def _reply(response: httpx.Response, body: bytearray) -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status_code, headers, bytes(body))
