"""Query a teacher behind an HTTP server: check its address, read its description, request responses.

    GET  url   ->  {"classnames": [...], "dim": d, "normalized": bool, "backbone": "..."}
    POST url   <-  {"level": "logits" | "probabilities" | "labels", "features": [[...], ...]}
               ->  {LEVEL: responses}

The description may add "budget", the queries that are left, and "batch", the most of a request.
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
MAX_ENVELOPE_BYTES = 1 << 16  # of a reply without its numbers
MAX_NUMBER_BYTES = 40
MAX_EXPLANATION = 200  # characters of a server's own words in a message


def is_address(source: str) -> bool:
    """Return whether a teacher is a server's address and not a file."""
    return source.lower().startswith(("http://", "https://"))


def check_address(url: str) -> None:
    """Check that an address names a host and holds no secret: addresses stand in logs and results.

    Raises:
        UserError: it does not.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and (parts.port or 1) > 0 and bool(httpx.URL(url).host)
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid or UNPRINTABLE.search(url) or " " in url:
        raise UserError("a teacher's address starts with http:// or https:// and names a host")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{parts.scheme}://{parts.hostname}: a teacher's address stands in logs and results: leave user, "
            f"password and what follows ? or # out of it; a secret belongs into the environment as {TOKEN}"
        )


class HTTPTeacher:
    """A teacher's server (protocol: see this module).

    A request carries the SHA-256 of its body as `Idempotency-Key`, so that a server that bills by the query
    can tell a retry from a new query, and the environment variable DFZSL_TEACHER_TOKEN, if set, as
    `Authorization: Bearer`. Redirects are not followed: they could carry queries and token to another host.
    Proxies are those of the environment.

    Args:
        url: http:// or https:// address.
        timeout: seconds in which a whole reply must arrive.
        retries: further attempts after a time-out, a lost connection, or a status 429 or 5xx.
        backoff: seconds before the first retry, which double with each, unless `Retry-After` asks for more.
        longest: most seconds of `Retry-After` to wait for.
        batch_size: rows per request.
        headers: further headers.

    Raises:
        UserError: an address or token that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        backoff: float = 0.5,
        longest: float = 120.0,
        batch_size: int = 256,
        headers: dict[str, str] | None = None,
    ) -> None:
        check_address(url)
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self.longest, self.batch_size, self.headers = longest, batch_size, dict(headers or {})
        if token := os.environ.get(TOKEN, "").strip():
            if not (token.isascii() and token.isprintable()):
                raise UserError(f"{TOKEN} has characters that no header can hold")
            self.headers["Authorization"] = f"Bearer {token}"
        self.ssl_context = ssl.create_default_context()

    def oracle(self, level: str, journal: str | os.PathLike[str] | None = None, budget: int = 0) -> Oracle:
        """Open the oracle of this server, which is asked for its description.

        Args:
            level: "logits", "probabilities" or "labels".
            journal: folder in which responses are kept, or None.
            budget: most queries in all, if the server has not fewer left; 0 for any number.

        Raises:
            UserError: the server gives no valid description, or its budget is used up.
        """
        if level == "weights":
            raise UserError(
                "a teacher behind an address answers queries; set TEACHER.ACCESS to logits or less"
            )
        try:
            about = self._request(None, MAX_DESCRIPTION_BYTES)
        except OSError as error:
            raise UserError(f"the teacher does not describe itself ({error})") from error
        names, dim, batch = (about.get(name) for name in ("classnames", "dim", "batch"))
        if not isinstance(names, list) or type(dim) is not int or not names or dim < 1:
            raise UserError(f"{self.url}: the server's description lacks 'classnames' or 'dim'")
        names = check_class_names(names, self.url)
        if not isinstance(normalized := about.get("normalized", True), bool):
            raise UserError(f"{self.url}: 'normalized' in the server's description is not true or false")
        return Oracle(
            lambda x: self._answer(x, level, len(names)),
            level,
            names,
            dim,
            normalized=normalized,
            backbone=str(about.get("backbone", "")),
            batch_size=min(self.batch_size, batch) if type(batch) is int and batch > 0 else self.batch_size,
            journal=journal,
            budget=self._affordable(budget, about, journal),
        )

    def _affordable(self, budget: int, about: dict[str, Any], journal: str | os.PathLike[str] | None) -> int:
        """Return the client's budget, or what the server has left, if that is less.

        The plan of a run follows from it: it stays in the journal for a run that resumes.
        """
        path = Path(journal) / "budget.json" if journal is not None else None
        if path and path.exists():
            return int(read_json(path))  # type: ignore[call-overload]
        left = about.get("budget")
        if type(left) is int and left >= 0:
            if left == 0:
                raise UserError(f"{self.url}: the budget that the server gives is used up")
            budget = min(budget, left) if budget else left
        if path and budget:
            write_json(path, budget)
        return budget

    def _answer(self, x: Tensor, level: str, classes: int) -> Tensor:
        """Return the responses to one batch x (n, d)."""
        numbers = len(x) * (1 if level == "labels" else classes)
        query = {"level": level, "features": x.tolist()}
        reply = self._request(query, MAX_ENVELOPE_BYTES + MAX_NUMBER_BYTES * numbers)
        problem = f"{self.url}: the reply holds no array '{level}'"
        try:
            if level != "labels":
                return torch.tensor(reply[level], dtype=torch.float64)
            if not all(type(label) is int for label in reply[level]):  # torch would cut 1.7 down to 1
                raise UserError(f"{problem} of whole numbers")
            return torch.tensor(reply[level], dtype=torch.int64)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(problem) from None

    def _request(self, query: dict[str, Any] | None, max_bytes: int) -> dict[str, Any]:
        """Return the JSON object that answers a POST of `query`, or a GET for None, with retries.

        Raises:
            UserError: a status that no retry mends, or a reply that is longer or no JSON object.
            OSError: the attempts are used up, or the server wants more than `longest` seconds.
        """
        body = None if query is None else json.dumps(query).encode()
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                text = self._read(body, max_bytes)
                break
            except _Busy as error:
                problem = f"{self.url}: {error}"
                wait = max(wait, error.wait)
                if wait > self.longest:
                    raise OSError(f"{problem}; it wants no question for {wait:,.0f} seconds") from None
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
            raise UserError(f"{self.url}: the server did not answer with a JSON object")
        return reply

    def _read(self, body: bytes | None, max_bytes: int) -> bytes:
        """Return the body of the reply to one request."""
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
            raise self._refusal(reply)
        if len(reply.body) > max_bytes:
            raise UserError(f"{self.url}: the reply is longer than any answer ({max_bytes:,} bytes)")
        return reply.body

    def _refusal(self, reply: Reply) -> Exception:
        """Return the error for a status: _Busy if a retry may mend it, else a UserError."""
        status = reply.status
        explanation = _explanation(reply.body) if 400 <= status < 500 else ""
        if status == 429 or status >= 500:
            return _Busy(f"status {status}{explanation}", _retry_after(reply.headers))
        if status == 401:
            state = "is not accepted" if "Authorization" in self.headers else "is not set"
            explanation += f"; the token in the environment variable {TOKEN} {state}"
        return UserError(f"{self.url}: the server refused with status {status}{explanation}")


class _Busy(Exception):
    """A status that asks to try again after `wait` seconds."""

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.wait = wait


def _explanation(body: bytes) -> str:
    """Return ": " and the server's own words on its refusal, without the token, or ""."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(content, dict):
        return ""
    words = content.get("error") or content.get("detail")
    return f": {one_line(words)[:MAX_EXPLANATION]}" if isinstance(words, str) and words.strip() else ""


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that a server asks to wait; 0 if it names none.

    Args:
        headers: of a response, by their names in lower case. `retry-after` is a number of seconds, or a date
            by the server's clock, which is `date`.
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
