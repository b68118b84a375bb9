"""Log each request of a server as one line of JSON, without features, tokens or query strings."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

REQUEST_KEYS = ("level", "queries", "billed")  # of `request.state`, where the endpoint sets them


class AccessLog:
    """ASGI middleware that logs time, client, method, path, status and seconds of each request.

    Args:
        app: the ASGI application.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        wall_time, start, status = time.time(), time.perf_counter(), 500

        async def send_and_note_status(message: Mapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            state = scope.get("state", {})
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(wall_time)),
                "client": state.get("client"),
                "method": scope["method"],
                "path": scope["path"][:100],
                "status": status,
                "seconds": round(time.perf_counter() - start, 4),
            }
            log.info(json.dumps(line | {key: state[key] for key in REQUEST_KEYS if key in state}))
