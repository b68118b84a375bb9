"""Keep tokens, query budgets and paid questions of a server in an SQLite file."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dfzsl.utils.errors import UNPRINTABLE, UserError

from .refusal import Refusal

# Retry-After of an exhausted budget in seconds. Only the owner can raise the budget.
EXHAUSTED_RETRY_AFTER = 86_400
TABLES = (
    "tokens (hash BLOB PRIMARY KEY, name TEXT UNIQUE NOT NULL, budget INTEGER)",
    "spent (name TEXT PRIMARY KEY, queries INTEGER NOT NULL)",
    "paid (name TEXT, question BLOB, PRIMARY KEY (name, question)) WITHOUT ROWID",
    "secret (noise BLOB)",
)


class Client(NamedTuple):
    """An authenticated client.

    Attributes:
        name: the name that its token was issued to; "" for all clients of a server without tokens.
        budget: queries that its token may ask, or None for the server's `token_budget`.
    """

    name: str
    budget: int | None = None


class Ledger:
    """Tokens of clients and the queries that each has spent.

    The file outlives a killed server: queries are booked on disk before they are answered. It stores the
    SHA-256 of each token and of each question, and neither token nor features.

    A client gets its row in `spent` together with its token, and keeps it. A row with a name therefore shows
    that a token was issued once, also after the last token was revoked.

    Args:
        path: the SQLite file. It is created if it does not exist.

    Attributes:
        secret: 32 random bytes of this server, from which noise is derived.

    Raises:
        UserError: the file is not a ledger or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._lock = Path(path), threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            with self._transaction() as db:
                for table in TABLES:
                    db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
                # Version 0.2 added the row of a client with its first query.
                db.execute("INSERT OR IGNORE INTO spent SELECT name, 0 FROM tokens")
                if not db.execute("SELECT 1 FROM secret").fetchone():
                    db.execute("INSERT INTO secret VALUES (?)", (secrets.token_bytes(32),))
                self.secret: bytes = db.execute("SELECT noise FROM secret").fetchone()[0]
            os.chmod(self.path, 0o600)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{os.fspath(path)}: this file cannot be used as a ledger ({error})") from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit the block's changes, or none of them, also where another process uses the same file."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def issue(self, name: str, budget: int | None = None) -> str:
        """Create the token of a client. From then on, every request needs a token.

        Args:
            name: the client's name.
            budget: queries that this token may ask; None for the server's `token_budget`.

        Returns:
            The token, which cannot be read from the ledger again.

        Raises:
            UserError: the name is empty or unprintable, or has a token already.
        """
        if not name or UNPRINTABLE.search(name):
            raise UserError("a client's name needs at least one character, all of them printable")
        token = secrets.token_urlsafe(32)
        try:
            with self._transaction() as db:
                db.execute("INSERT INTO tokens VALUES (?, ?, ?)", (_digest(token), name, budget))
                db.execute("INSERT OR IGNORE INTO spent VALUES (?, 0)", (name,))
        except sqlite3.IntegrityError:
            raise UserError(f"{self.path}: '{name}' has a token already") from None
        return token

    def revoke(self, name: str) -> None:
        """Refuse a client's token from now on. Its spent queries stay booked.

        Raises:
            UserError: the client has no token.
        """
        with self._transaction() as db:
            if not db.execute("DELETE FROM tokens WHERE name = ?", (name,)).rowcount:
                raise UserError(f"{self.path}: '{name}' has no token")

    def authenticate(self, token: str) -> Client:
        """Return the client that a token belongs to.

        Args:
            token: the token of a request, "" for none. It is ignored if no token was ever issued.

        Raises:
            Refusal: 401, the token is not known.
        """
        with self._lock:
            known = self._db.execute("SELECT hash, name, budget FROM tokens").fetchall()
            if not known and not self._db.execute("SELECT 1 FROM spent WHERE name != ''").fetchone():
                return Client("")
        given = _digest(token)
        # Every hash is compared, each in constant time.
        matches = [
            Client(name, budget) for digest, name, budget in known if hmac.compare_digest(digest, given)
        ]
        if not matches:
            raise Refusal(401, "this server needs a valid token (Authorization: Bearer TOKEN)")
        return matches[0]

    def remaining(self, client: Client, *, budget: int = 0, token_budget: int = 0) -> int | None:
        """Return the queries that a client may still ask.

        Args:
            client: the client.
            budget: queries of all clients together; 0: unlimited.
            token_budget: queries of each client without a budget of its own; 0: unlimited.

        Returns:
            A number of queries, or None for unlimited.
        """
        with self._lock:
            return self._remaining(client, budget, token_budget)

    def _remaining(self, client: Client, budget: int, token_budget: int) -> int | None:
        spent = dict(self._db.execute("SELECT name, queries FROM spent"))
        own_budget = token_budget if client.budget is None else client.budget
        limits = [own_budget - spent.get(client.name, 0)] if own_budget else []
        limits += [budget - sum(spent.values())] if budget else []
        return max(min(limits), 0) if limits else None

    def charge(
        self, client: Client, question: bytes, queries: int, *, budget: int = 0, token_budget: int = 0
    ) -> bool:
        """Book the queries of a question on a client, unless it has paid for the same question before.

        Args:
            client: the client.
            question: digest of the question.
            queries: number of queries in the question.
            budget, token_budget: as in `remaining`.

        Returns:
            Whether the queries were booked.

        Raises:
            Refusal: 429, the budget has fewer queries left.
        """
        with self._transaction() as db:
            paid = (client.name, question)
            if db.execute("SELECT 1 FROM paid WHERE name = ? AND question = ?", paid).fetchone():
                return False
            remaining = self._remaining(client, budget, token_budget)
            if remaining is not None and queries > remaining:
                message = f"the budget has {remaining} queries left, the request has {queries}"
                raise Refusal(429, message, EXHAUSTED_RETRY_AFTER)
            db.execute("INSERT INTO paid VALUES (?, ?)", paid)
            db.execute(
                "INSERT INTO spent VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET queries = queries + ?",
                (client.name, queries, queries),
            )
            return True


def default_ledger(teacher: str | os.PathLike[str]) -> Path:
    """Return the path of the ledger that belongs to a teacher file by default."""
    return Path(teacher).with_suffix(".ledger")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
