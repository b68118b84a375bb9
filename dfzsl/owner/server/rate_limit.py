"""Limit how many queries per second each client may ask."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from .refusal import Refusal


@dataclass
class _Bucket:
    queries: float  # available now
    updated: float  # seconds of the monotonic clock
    last_request: int = 1  # queries of the client's latest request


class RateLimiter:
    """A token bucket of queries for each client.

    Args:
        rate: queries per second that a bucket regains; 0: unlimited.
        batch: queries in a request. A bucket holds one batch or one second, whichever is more.
    """

    def __init__(self, rate: float, batch: int) -> None:
        self.rate, self.capacity = rate, max(rate, batch)
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()

    def check(self, client: str) -> None:
        """Refuse a request before its queries are read if the client's bucket holds no query.

        The size of the request is not known yet: `Retry-After` assumes that of the client's latest request.

        Raises:
            Refusal: 429, the bucket is empty.
        """
        if self.rate:
            with self._lock:
                bucket = self._refilled(client)
                if bucket.queries < 1:
                    raise self._refusal(bucket)

    def take(self, client: str, queries: int) -> None:
        """Take the queries of a request from the client's bucket.

        Raises:
            Refusal: 429, the bucket holds fewer queries.
        """
        if self.rate:
            with self._lock:
                bucket = self._refilled(client)
                bucket.last_request = queries
                if queries > bucket.queries:
                    raise self._refusal(bucket)
                bucket.queries -= queries

    def _refilled(self, client: str) -> _Bucket:
        now = time.monotonic()
        bucket = self._buckets.setdefault(client, _Bucket(self.capacity, now))
        bucket.queries = min(self.capacity, bucket.queries + self.rate * (now - bucket.updated))
        bucket.updated = now
        return bucket

    def _refusal(self, bucket: _Bucket) -> Refusal:
        return Refusal(429, "too many queries per second", (bucket.last_request - bucket.queries) / self.rate)
