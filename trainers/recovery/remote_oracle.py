"""Query a teacher on an HTTP server.

Protocol:

    GET  url   ->  {"classnames": [...], "dim": d, "normalized": bool, "backbone": "..."}
    POST url   <-  {"level": "logits" | "probabilities" | "labels", "features": [[...], ...]}
               ->  {LEVEL: responses}

The description may also have "budget", the remaining number of queries, and "batch", the maximum number of
queries per request.
"""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from dfzsl.io.class_names import check_class_names
from dfzsl.io.files import read_json, write_json
from dfzsl.utils.errors import TOKEN, UNPRINTABLE, UserError, one_line

from .http_exchange import Reply, exchange
from .oracle import Oracle

MAX_DESCRIPTION_BYTES = 1 << 26
MAX_ENVELOPE_BYTES = 1 << 16  # of a reply apart from its numbers
MAX_NUMBER_BYTES = 40
MAX_EXPLANATION_CHARS = 200  # of an error reply, quoted in a message


def is_address(source: str) -> bool:
    """Return whether `source` is the address of a server, and not a file."""
    return source.lower().startswith(("http://", "https://"))


def check_address(url: str) -> None:
    """Check that an address names a host and holds no secret, because logs and results contain it.

    Raises:
        UserError: the address is invalid, or has a user, a password, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and (parts.port or 1) > 0 and bool(httpx.URL(url).host)
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid or UNPRINTABLE.search(url) or " " in url:
        raise UserError("a teacher's address must start with http:// or https:// and name a host")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{parts.scheme}://{parts.hostname}: remove user, password and the part after ? or # from the "
            f"address, which logs and results contain; set a secret as environment variable {TOKEN}"
        )


class HTTPTeacher:
    """A teacher on an HTTP server (for the protocol see this module).

    Each request has the SHA-256 of its body as `Idempotency-Key`, so that a server that bills per query can
    recognize retries, and the environment variable DFZSL_TEACHER_TOKEN, if set, as `Authorization: Bearer`.
    Redirects are not followed, because they could send queries and token to another host. Proxies are those
    of the environment.

    Args:
        url: http:// or https:// address.
        timeout: seconds in which a complete reply must arrive.
        retries: number of retries after a time-out, a lost connection, or a status 429 or 5xx.
        backoff: seconds before the first retry, doubled with each retry, or more if `Retry-After` says so.
        max_wait: longest wait in seconds that `Retry-After` may ask for.
        batch_size: queries per request.
        headers: additional headers.

    Raises:
        UserError: the address or the token is invalid.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        backoff: float = 0.5,
        max_wait: float = 120.0,
        batch_size: int = 256,
        headers: dict[str, str] | None = None,
    ) -> None:
        check_address(url)
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self.max_wait, self.batch_size, self.headers = max_wait, batch_size, dict(headers or {})
        if token := os.environ.get(TOKEN, "").strip():
            if not (token.isascii() and token.isprintable()):
                raise UserError(
                    f"the environment variable {TOKEN} has characters that are not printable ASCII"
                )
            self.headers["Authorization"] = f"Bearer {token}"
        self.ssl_context = ssl.create_default_context()

    def oracle(self, level: str, journal: str | os.PathLike[str] | None = None, budget: int = 0) -> Oracle:
        """Request the description of the teacher, and open its oracle.

        Args:
            level: "logits", "probabilities" or "labels".
            journal: directory in which responses are stored, or None.
            budget: limit on the number of queries, besides the server's own; 0 for none.

        Returns:
            The oracle.

        Raises:
            UserError: the server has no valid description, or its budget is used up.
        """
        if level == "weights":
            raise UserError(
                "a server does not provide weights; set TEACHER.ACCESS to logits, probabilities or labels"
            )
        try:
            description = self._request(None, MAX_DESCRIPTION_BYTES)
        except OSError as error:
            raise UserError(f"cannot read the description of the teacher ({error})") from error
        names, dim, batch = (description.get(name) for name in ("classnames", "dim", "batch"))
        if not isinstance(names, list) or type(dim) is not int or not names or dim < 1:
            raise UserError(f"{self.url}: 'classnames' or 'dim' is missing from the server's description")
        names = check_class_names(names, self.url)
        if not isinstance(normalized := description.get("normalized", True), bool):
            raise UserError(f"{self.url}: 'normalized' in the server's description must be true or false")
        return Oracle(
            lambda x: self._query(x, level, len(names)),
            level,
            names,
            dim,
            normalized=normalized,
            backbone=str(description.get("backbone", "")),
            batch_size=min(self.batch_size, batch) if type(batch) is int and batch > 0 else self.batch_size,
            journal=journal,
            budget=self._limit_budget(budget, description, journal),
        )

    def _limit_budget(
        self, budget: int, description: dict[str, Any], journal: str | os.PathLike[str] | None
    ) -> int:
        """Return the lesser of the client's budget and the queries that the server has left.

        It decides which queries a run makes, so it is stored in the journal for a run that resumes.
        """
        path = Path(journal) / "budget.json" if journal is not None else None
        if path and path.exists():
            return int(read_json(path))  # type: ignore[call-overload]
        remaining = description.get("budget")
        if type(remaining) is int and remaining >= 0:
            if remaining == 0:
                raise UserError(f"{self.url}: the query budget of the server is used up")
            budget = min(budget, remaining) if budget else remaining
        if path and budget:
            write_json(path, budget)
        return budget

    def _query(self, x: Tensor, level: str, classes: int) -> Tensor:
        """Return the responses to one batch x (n, d)."""
        numbers = len(x) * (1 if level == "labels" else classes)
        body = {"level": level, "features": x.tolist()}
        reply = self._request(body, MAX_ENVELOPE_BYTES + MAX_NUMBER_BYTES * numbers)
        problem = f"{self.url}: the reply has no array '{level}'"
        try:
            if level != "labels":
                return torch.tensor(reply[level], dtype=torch.float64)
            # Without this check, torch would truncate 1.7 to 1.
            if not all(type(label) is int for label in reply[level]):
                raise UserError(f"{problem} of integers")
            return torch.tensor(reply[level], dtype=torch.int64)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(problem) from None

    def _request(self, query: dict[str, Any] | None, max_bytes: int) -> dict[str, Any]:
        """Send a POST of `query`, or a GET for None, with retries, and return the JSON object of the reply.

        Raises:
            UserError: the status is a permanent failure, or the reply is too long or not a JSON object.
            OSError: all attempts failed, or `Retry-After` exceeds `max_wait`.
        """
        body = None if query is None else json.dumps(query).encode()
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                text = self._send(body, max_bytes)
                break
            except _Busy as error:
                problem = f"{self.url}: {error}"
                wait = max(wait, error.wait)
                if wait > self.max_wait:
                    raise OSError(f"{problem}; it accepts no request for {wait:,.0f} seconds") from None
            except OSError as error:
                problem = f"{self.url}: {error}"
            if attempt == self.retries:
                raise OSError(problem)
            time.sleep(wait)
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise UserError(f"{self.url}: the reply is not a JSON object")
        return reply

    def _send(self, body: bytes | None, max_bytes: int) -> bytes:
        """Send one request, and return the body of the reply."""
        headers = {"Accept": "application/json", **self.headers}
        if body is not None:
            digest = hashlib.sha256(body).hexdigest()
            headers |= {"Content-Type": "application/json", "Idempotency-Key": digest}
        reply = exchange(
            self.url,
            body,
            headers,
            seconds=self.timeout,
            max_bytes=max_bytes,
            ssl_context=self.ssl_context,
        )
        if not 200 <= reply.status < 300:
            raise self._status_error(reply)
        if len(reply.body) > max_bytes:
            raise UserError(f"{self.url}: the reply is longer than any valid one ({max_bytes:,} bytes)")
        return reply.body

    def _status_error(self, reply: Reply) -> Exception:
        """Return the error for a status: `_Busy` if a retry may help, else UserError."""
        status = reply.status
        explanation = _explanation(reply.body) if 400 <= status < 500 else ""
        if status == 429 or status >= 500:
            return _Busy(f"status {status}{explanation}", _retry_after(reply.headers))
        if status == 401:
            state = "is not accepted" if "Authorization" in self.headers else "is not set"
            explanation += f"; the token in the environment variable {TOKEN} {state}"
        return UserError(f"{self.url}: the server refused with status {status}{explanation}")


class _Busy(Exception):
    """A temporary failure of the server.

    Args:
        message: description with the status.
        wait: seconds before a retry.
    """

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.wait = wait


def _explanation(body: bytes) -> str:
    """Return ": " and the server's error message, without the token, or ""."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(content, dict):
        return ""
    message = content.get("error") or content.get("detail")
    return (
        f": {one_line(message)[:MAX_EXPLANATION_CHARS]}"
        if isinstance(message, str) and message.strip()
        else ""
    )


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds of the header Retry-After; 0 without one.

    Args:
        headers: values by lower-case name. `retry-after` is a number of seconds, or a date by the server's
            clock, whose time is in `date`.
    """
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        date = headers.get("date")
        now = parsedate_to_datetime(date).timestamp() if date else time.time()
        return max(parsedate_to_datetime(value).timestamp() - now, 0.0)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
