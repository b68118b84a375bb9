"""The owner's server: a teacher behind HTTP that answers so much, so exactly, and so often.

The protocol is that of docs/black_box.md. What the server keeps, it keeps in one SQLite file: hashes of
tokens, what each has spent, and digests of the questions it has paid for.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import math
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from dfzsl.trainers.recovery.oracle import LEVELS
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import UNPRINTABLE, UserError, unknown

EXHAUSTED = 86_400  # seconds of Retry-After when a budget is used up: not before the owner raises it
LARGEST = 1e6  # absolute value of a feature

log = logging.getLogger("dfzsl.owner.server.app")


@dataclass(frozen=True)
class Terms:
    """What the owner answers.

    Attributes:
        access: the most that is told: "logits", "probabilities" or "labels"; what tells less is answered too.
        decimals: places that scores are rounded to; None for all.
        top: probabilities of so many classes of each query are told, 0 for the others; 0: of all classes.
        noise: standard deviation of what is added to the logits, whatever is answered. Equal features get
            equal noise: asking again does not average it out.
        budget: queries that all clients may ask together; token_budget: that each token may, unless it has
            one of its own; 0 for any number. rate: queries a second of each token; 0 for any number.
        batch: queries in a request; body: bytes of a request.
    """

    access: str = "labels"
    decimals: int | None = None
    top: int = 0
    noise: float = 0.0
    budget: int = 0
    token_budget: int = 0
    rate: float = 0.0
    batch: int = 4096
    body: int = 64 << 20

    def __post_init__(self) -> None:
        if self.access not in LEVELS[1:]:
            raise unknown("access level of a server (--access)", self.access, LEVELS[1:])
        if self.decimals is not None and not 0 <= self.decimals <= 12:
            raise UserError(f"--decimals must be 0 to 12, got {self.decimals}")
        if self.top and self.access == "logits":
            raise UserError(
                "--top leaves out probabilities; a server that answers logits would tell them all"
            )
        if not 0 <= self.noise < math.inf:
            raise UserError(f"--noise must be at least 0, got {self.noise}")
        for name in ("top", "budget", "token_budget", "rate"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        for name in ("batch", "body"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")

    @property
    def levels(self) -> tuple[str, ...]:
        return LEVELS[LEVELS.index(self.access) :]


class Refused(Exception):
    """A question that is not answered: a status, a sentence, and seconds to wait or None."""

    def __init__(self, status: int, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.status, self.wait = status, wait


class Ledger:
    """Tokens and what has been asked, in an SQLite file that outlives a killed server.

    Of a token its SHA-256 is kept, of a question its digest. What is spent is on disk before it is answered.
    Raises UserError for a file that is none of these.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._lock = Path(path), threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            with self._transaction() as db:
                for table in (
                    "tokens (hash BLOB PRIMARY KEY, name TEXT UNIQUE NOT NULL, budget INTEGER)",
                    "spent (name TEXT PRIMARY KEY, queries INTEGER NOT NULL)",
                    "paid (name TEXT, question BLOB, PRIMARY KEY (name, question)) WITHOUT ROWID",
                    "secret (noise BLOB)",
                ):
                    db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
                if not db.execute("SELECT 1 FROM secret").fetchone():
                    db.execute("INSERT INTO secret VALUES (?)", (secrets.token_bytes(32),))
                self.secret: bytes = db.execute("SELECT noise FROM secret").fetchone()[0]
            os.chmod(self.path, 0o600)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{os.fspath(path)}: no ledger of a server can be kept there ({error})") from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, also where another process serves from the same file."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def issue(self, name: str, budget: int | None = None) -> str:
        """A new token of a client, shown this once; `budget` in the place of the server's for each token."""
        if not name or UNPRINTABLE.search(name):
            raise UserError("a client's name has at least one character, and none that cannot be shown")
        token = secrets.token_urlsafe(32)
        try:
            with self._transaction() as db:
                db.execute("INSERT INTO tokens VALUES (?, ?, ?)", (_digest(token), name, budget))
        except sqlite3.IntegrityError:
            raise UserError(f"{self.path}: '{name}' has a token already") from None
        return token

    def revoke(self, name: str) -> None:
        """A client's token is refused from now on; what it has spent stays. Raises UserError without one."""
        with self._transaction() as db:
            if not db.execute("DELETE FROM tokens WHERE name = ?", (name,)).rowcount:
                raise UserError(f"{self.path}: '{name}' has no token")

    def client(self, authorization: str) -> tuple[str, int | None]:
        """Who asks, and its own budget. Where no token was ever issued, everybody is one client, ''."""
        with self._lock:
            known = self._db.execute("SELECT hash, name, budget FROM tokens").fetchall()
        if not known:
            return "", None
        scheme, _, token = authorization.partition(" ")
        given = _digest(token.strip() if scheme.lower() == "bearer" else "")
        # Every hash is compared, each in constant time.
        found = [(name, budget) for kept, name, budget in known if hmac.compare_digest(kept, given)]
        if not found:
            raise Refused(401, "a token is needed, and none that is known was given")
        return found[0]

    def left(self, name: str, own: int | None, terms: Terms) -> int | None:
        """Queries that a client may still ask; None for any number."""
        with self._lock:
            return self._left(self._db, name, own, terms)

    @staticmethod
    def _left(db: sqlite3.Connection, name: str, own: int | None, terms: Terms) -> int | None:
        spent = dict(db.execute("SELECT name, queries FROM spent"))
        own = terms.token_budget if own is None else own
        bounds = [own - spent.get(name, 0)] if own else []
        bounds += [terms.budget - sum(spent.values())] if terms.budget else []
        return max(min(bounds), 0) if bounds else None

    def pay(self, name: str, own: int | None, question: bytes, queries: int, terms: Terms) -> bool:
        """Book a question on a client; False if it has paid for the same before. Raises Refused beyond."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM paid WHERE name = ? AND question = ?", (name, question)).fetchone():
                return False
            left = self._left(db, name, own, terms)
            if left is not None and queries > left:
                raise Refused(429, f"the budget has {left} queries left, {queries} were asked", EXHAUSTED)
            db.execute("INSERT INTO paid VALUES (?, ?)", (name, question))
            db.execute(
                "INSERT INTO spent VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET queries = queries + ?",
                (name, queries, queries),
            )
            return True


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class Answers:
    """A teacher's answers on the owner's terms."""

    def __init__(self, teacher: Teacher, terms: Terms, secret: bytes) -> None:
        self.teacher, self.terms, self.secret = teacher, terms, secret

    def __call__(self, level: str, x: np.ndarray) -> list:
        """Answers to features (n, d) float32, as JSON has them."""
        logits = self.teacher.logits(torch.from_numpy(x.astype(np.float64)))
        if self.terms.noise:
            logits = logits + self.terms.noise * torch.from_numpy(np.stack([self._noise(row) for row in x]))
        if level == "labels":
            return logits.argmax(1).tolist()
        scores = logits.softmax(1) if level == "probabilities" else logits
        if self.terms.top and self.terms.top < scores.shape[1]:
            told = scores.topk(self.terms.top, dim=1)
            scores = torch.zeros_like(scores).scatter(1, told.indices, told.values)
        if self.terms.decimals is not None:
            scores = scores.round(decimals=self.terms.decimals)
        return scores.tolist()

    def _noise(self, row: np.ndarray) -> np.ndarray:
        """Normal numbers (C,) that follow from a question, and that nobody can tell without the secret."""
        key = hmac.digest(self.secret, (row + np.float32(0.0)).tobytes(), "sha256")  # -0 asks what 0 asks
        stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        return stream.standard_normal(len(self.teacher.classnames))


class _Rates:
    """A bucket of queries for each client, which refills at `rate` a second and holds one batch or second."""

    def __init__(self, terms: Terms) -> None:
        self.rate, self.size = terms.rate, max(terms.rate, terms.batch)
        self._filled: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def take(self, name: str, queries: int) -> None:
        if not self.rate:
            return
        with self._lock:
            now = time.monotonic()
            level, then = self._filled.get(name, (self.size, now))
            level = min(self.size, level + self.rate * (now - then))
            if queries > level:
                self._filled[name] = level, now
                raise Refused(429, "too many queries at a time", math.ceil((queries - level) / self.rate))
            self._filled[name] = level - queries, now


def application(teacher: Teacher, ledger: Ledger, terms: Terms | None = None) -> Starlette:
    """The server as an ASGI application: GET / describes the teacher, POST / answers, /docs says how to ask.

    Raises UserError where the terms do not fit the teacher.
    """
    terms = terms or Terms()
    if terms.top > len(teacher.classnames):
        raise UserError(f"--top {terms.top} is more than the teacher's {len(teacher.classnames)} classes")
    answers, rates, dim = Answers(teacher, terms, ledger.secret), _Rates(terms), teacher.weight.shape[1]

    async def describe(request: Request) -> Response:
        name, own = await run_in_threadpool(ledger.client, request.headers.get("authorization", ""))
        request.state.client = name
        about = {
            "classnames": teacher.classnames,
            "dim": dim,
            "normalized": teacher.normalized,
            "backbone": teacher.backbone,
            "levels": terms.levels,
            "batch": terms.batch,
        }
        left = await run_in_threadpool(ledger.left, name, own, terms)
        return JSONResponse(about if left is None else {**about, "budget": left})

    async def answer(request: Request) -> Response:
        name, own = await run_in_threadpool(ledger.client, request.headers.get("authorization", ""))
        request.state.client = name
        level, x = _question(await _body(request, terms.body), terms, dim)
        request.state.level, request.state.queries = level, len(x)
        question = hashlib.sha256(level.encode() + b"\n" + x.tobytes()).digest()
        rates.take(name, len(x))
        request.state.billed = await run_in_threadpool(ledger.pay, name, own, question, len(x), terms)
        return JSONResponse({level: await run_in_threadpool(answers, level, x)})

    async def openapi(_: Request) -> Response:
        return JSONResponse(schema(terms, dim))

    async def docs(_: Request) -> Response:
        return HTMLResponse(_page(schema(terms, dim)))

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        headers = {} if error.wait is None else {"Retry-After": str(math.ceil(error.wait))}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": str(error)}, error.status, headers)

    async def unknown_path(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    app: Any = Starlette(
        routes=[
            Route("/", describe, methods=["GET"]),
            Route("/", answer, methods=["POST"]),
            Route("/openapi.json", openapi),
            Route("/docs", docs),
        ],
        exception_handlers={Refused: refused, HTTPException: unknown_path},
    )
    app.add_middleware(_AccessLog)
    return app


async def _body(request: Request, most: int) -> bytes:
    """The body, of which no more than `most` bytes are ever held."""
    said = request.headers.get("content-length", "")
    if said.isascii() and said.isdigit() and int(said[:19]) > most:
        raise Refused(413, f"a request has at most {most} bytes")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise Refused(413, f"a request has at most {most} bytes")
        parts.append(part)
    return b"".join(parts)


def _question(body: bytes, terms: Terms, dim: int) -> tuple[str, np.ndarray]:
    """The level and the features (n, dim) float32 of a request. Raises Refused for what is not a question."""
    try:
        question = json.loads(body)
    except (ValueError, RecursionError):
        question = None
    if not isinstance(question, dict) or not isinstance(question.get("features"), list):
        raise Refused(400, 'a question is {"level": ..., "features": [[...], ...]}')
    level, features = question.get("level"), question["features"]
    if level not in LEVELS[1:]:
        raise Refused(400, f"'level' is one of {', '.join(terms.levels)}")
    if level not in terms.levels:
        raise Refused(403, f"this server answers {', '.join(terms.levels)}")
    if len(features) > terms.batch:
        raise Refused(413, f"a request has at most {terms.batch} queries")
    if not all(
        isinstance(row, list) and len(row) == dim and all(type(v) in (int, float) for v in row)
        for row in features
    ):
        raise Refused(400, f"'features' is a list of rows of {dim} numbers")
    try:
        x = np.array(features, dtype=np.float64).reshape(-1, dim)
    except (ValueError, OverflowError):
        x = np.full((1, dim), np.nan)
    if not len(x) or not (np.abs(x) <= LARGEST).all():
        raise Refused(400, f"'features' has at least one row, and no number beyond {LARGEST:g}")
    return level, x.astype(np.float32)


class _AccessLog:
    """One line of JSON a request: who, what, how many, how long; no feature, no token, no query string."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, started, status = time.time(), time.perf_counter(), 500

        async def watched(message: Mapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            state = scope.get("state", {})
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
                "client": state.get("client"),
                "method": scope["method"],
                "path": scope["path"][:100],
                "status": status,
                "seconds": round(time.perf_counter() - started, 4),
            }
            line |= {key: state[key] for key in ("level", "queries", "billed") if key in state}
            log.info(json.dumps(line))


def schema(terms: Terms, dim: int) -> dict[str, Any]:
    """The protocol as OpenAPI 3.1 describes it."""

    def content(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
        shape = {"type": "object", "properties": properties, "required": required}
        return {"content": {"application/json": {"schema": shape}}}

    number = {"type": "number"}
    scores = {"type": "array", "items": {"type": "array", "items": number}}
    told = {
        level: {"type": "array", "items": {"type": "integer", "minimum": 0}} if level == "labels" else scores
        for level in terms.levels
    }
    row = {"type": "array", "items": number, "minItems": dim, "maxItems": dim}
    asked = {
        "level": {"type": "string", "enum": list(terms.levels)},
        "features": {"type": "array", "items": row, "minItems": 1, "maxItems": terms.batch},
    }
    about = {
        "classnames": {"type": "array", "items": {"type": "string"}},
        "dim": {"type": "integer"},
        "normalized": {"type": "boolean", "description": "a cosine classifier, or a linear one"},
        "backbone": {"type": "string", "description": "whose features it reads"},
        "levels": {"type": "array", "items": {"type": "string"}},
        "batch": {"type": "integer", "description": "queries in a request, at most"},
        "budget": {"type": "integer", "description": "queries that this client may still ask"},
    }
    wait = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    refusals = {
        "400": {"description": "not a question"},
        "401": {"description": "no token, or one that is not known"},
        "403": {"description": "a level that tells more than this server does"},
        "413": {"description": "more bytes or queries than a request may have"},
        "429": {"description": "too fast, or the budget is used up", "headers": wait},
    }
    described = {"description": "the teacher", **content(about, ["classnames", "dim"])}
    answered = {"description": "answers in the order of the features", **content(told, [])}
    return {
        "openapi": "3.1.0",
        "info": {"title": "A teacher behind glass", "version": "1"},
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}, {}],
        "paths": {
            "/": {
                "get": {
                    "summary": "What the teacher is",
                    "responses": {"200": described, "401": refusals["401"]},
                },
                "post": {
                    "summary": "Its answers to image features; an equal question is billed once",
                    "requestBody": {"required": True, **content(asked, ["level", "features"])},
                    "responses": {"200": answered, **refusals},
                },
            }
        },
    }


def _page(described: dict[str, Any]) -> str:
    """The description for people, without a script or anything from elsewhere."""
    parts = []
    for path, methods in described["paths"].items():
        for method, what in methods.items():
            statuses = "".join(
                f"<tr><td>{code}</td><td>{reply['description']}</td></tr>"
                for code, reply in what["responses"].items()
            )
            bodies = [what.get("requestBody"), what["responses"]["200"]]
            shown = "".join(
                f"<pre>{json.dumps(body['content']['application/json']['schema'], indent=1)}</pre>"
                for body in bodies
                if body
            )
            parts.append(
                f"<h2>{method.upper()} {path}</h2><p>{what['summary']}.</p>{shown}<table>{statuses}</table>"
            )
    style = "body{font:16px sans-serif;max-width:50em;margin:2em auto}pre{background:#eee;padding:1em}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{described['info']['title']}</title>"
        f"<style>{style}</style><h1>{described['info']['title']}</h1>{''.join(parts)}"
        "<p><a href=openapi.json>openapi.json</a></p></html>"
    )


def serve(
    teacher: str | os.PathLike[str],
    *,
    access: str = "labels",
    decimals: int | None = None,
    top: int = 0,
    noise: float = 0.0,
    budget: int = 0,
    token_budget: int = 0,
    rate: float = 0.0,
    batch: int = 4096,
    body: int = 64 << 20,
    ledger: str | os.PathLike[str] = "",
    log_file: str | os.PathLike[str] = "",
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Serve a teacher file until interrupted. The settings are those of `Terms`.

    Args:
        ledger: the SQLite file of tokens and budgets; by default the teacher's name with .ledger.
        log_file: where the access log goes; by default to stderr.

    Raises UserError for what is wrong with the file, the terms or the address.
    """
    import uvicorn

    app = application(
        Teacher.load(teacher),
        Ledger(ledger or default_ledger(teacher)),
        Terms(access, decimals, top, noise, budget, token_budget, rate, batch, body),
    )
    try:
        handler = logging.FileHandler(log_file, encoding="utf-8") if log_file else logging.StreamHandler()
    except OSError as error:
        raise UserError(
            f"{os.fspath(log_file)}: the log cannot be written there ({error.strerror})"
        ) from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        uvicorn.run(app, host=host, port=port, access_log=False, log_level="warning", server_header=False)
    except SystemExit as error:  # what uvicorn makes of an address that is taken
        if error.code:
            raise UserError(f"{host}:{port} cannot be served from; choose another host or port") from None
    finally:
        log.removeHandler(handler)
        handler.close()


def default_ledger(teacher: str | os.PathLike[str]) -> Path:
    """Where the ledger of a teacher file lies unless told otherwise."""
    return Path(teacher).with_suffix(".ledger")
