"""Serve a teacher over HTTP by the protocol of docs/black_box.md."""

# Without `from __future__ import annotations`: FastAPI reads the annotations of nested functions.
import hashlib
import logging
import math
import os
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import UserError

from . import access_log
from .answers import LimitedTeacher
from .config import ServerConfig
from .ledger import Client, Ledger, default_ledger
from .protocol import ErrorResponse, QueryRequest, QueryResponse, TeacherDescription, parse_queries
from .rate_limit import RateLimiter
from .refusal import Refusal

RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not a valid request."},
    401: {"model": ErrorResponse, "description": "The token is missing or not known."},
    403: {"model": ErrorResponse, "description": "The server does not answer this access level."},
    413: {"model": ErrorResponse, "description": "The request has too many bytes or queries."},
    429: {
        "model": ErrorResponse,
        "description": "The client exceeds its rate limit, or its budget is exhausted.",
        "headers": RETRY_AFTER,
    },
}


def create_app(teacher: Teacher, ledger: Ledger, config: ServerConfig | None = None) -> FastAPI:
    """Create the server as an ASGI application.

    GET / describes the teacher, POST / answers queries. /docs and /openapi.json describe the protocol; they
    load nothing from other hosts.

    Args:
        teacher: the teacher that answers.
        ledger: tokens and budgets of the clients.
        config: access level and limits; by default labels for every client, without a limit.

    Returns:
        The application.

    Raises:
        UserError: the config does not fit the teacher.
    """
    config = config or ServerConfig()
    limited_teacher = LimitedTeacher(teacher, config, ledger.secret)
    limiter = RateLimiter(config.rate, config.batch)
    dim = teacher.weight.shape[1]
    budgets = {"budget": config.budget, "token_budget": config.token_budget}
    bearer = HTTPBearer(auto_error=False, description="The token that the owner issued, if there are tokens.")

    def authenticate(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
    ) -> Client:
        client = ledger.authenticate(credentials.credentials if credentials else "")
        request.state.client = client.name
        return client

    # A request is read only after these checks, so that a refused one costs neither memory nor parsing.
    async def read_body(request: Request, client: Annotated[Client, Depends(authenticate)]) -> bytes:
        limiter.check(client.name)
        return await _read_body(request, config.max_body_bytes(dim))

    app = FastAPIOffline(
        title="Black-box teacher",
        version="1",
        description="A classifier on image features that answers a limited number of queries.",
        redoc_url=None,
        # Otherwise Swagger UI sends the description to a public validation service.
        swagger_ui_parameters={"validatorUrl": None},
        exception_handlers={Refusal: _refusal_response, HTTPException: _http_error_response},
    )
    app.add_middleware(access_log.AccessLog)

    @app.get(
        "/",
        summary="Describe the teacher",
        response_model_exclude_none=True,
        responses={401: REFUSALS[401]},
    )
    def describe(client: Annotated[Client, Depends(authenticate)]) -> TeacherDescription:
        return TeacherDescription(
            classnames=teacher.classnames,
            dim=dim,
            normalized=teacher.normalized,
            backbone=teacher.backbone,
            levels=list(config.levels),
            batch=config.batch,
            budget=ledger.remaining(client, **budgets),
        )

    # The body is not a parameter, because FastAPI would read all of it, and before the token.
    request_body = {"content": {"application/json": {"schema": QueryRequest.model_json_schema()}}}

    @app.post(
        "/",
        summary="Answer queries",
        description="A repeated request of the same client is billed once.",
        response_model_exclude_none=True,
        responses=REFUSALS,
        openapi_extra={"requestBody": {"required": True, **request_body}},
    )
    def answer(
        request: Request,
        client: Annotated[Client, Depends(authenticate)],
        body: Annotated[bytes, Depends(read_body)],
    ) -> QueryResponse:
        level, features = parse_queries(body, config, dim)
        request.state.level, request.state.queries = level, len(features)
        limiter.take(client.name, len(features))
        question = hashlib.sha256(level.encode() + b"\n" + features.tobytes()).digest()
        request.state.billed = ledger.charge(client, question, len(features), **budgets)
        return QueryResponse(**{level: limited_teacher.answer(level, features)})

    return app


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Read a body of at most `max_bytes` bytes. Raises Refusal (413) before more is in memory."""
    refusal = Refusal(413, f"a request has at most {max_bytes} bytes")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:19]) > max_bytes:
        raise refusal
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > max_bytes:
            raise refusal
        body += chunk
    return bytes(body)


def _refusal_response(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": str(error)}, error.status, headers)


def _http_error_response(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


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
    body: int = 0,
    ledger: str | os.PathLike[str] = "",
    log_file: str | os.PathLike[str] = "",
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Serve a teacher file until interrupted.

    Args:
        teacher: the teacher file.
        access, decimals, top, noise, budget, token_budget, rate, batch, body: as in `ServerConfig`.
        ledger: SQLite file of tokens and budgets; by default the teacher's name with the suffix .ledger.
        log_file: file of the access log; by default stderr.
        host: address to listen on.
        port: port to listen on.

    Raises:
        UserError: the teacher, an option, a file or the address cannot be used.
    """
    app = create_app(
        Teacher.load(teacher),
        Ledger(ledger or default_ledger(teacher)),
        ServerConfig(access, decimals, top, noise, budget, token_budget, rate, batch, body),
    )
    try:
        handler = logging.FileHandler(log_file, encoding="utf-8") if log_file else logging.StreamHandler()
    except OSError as error:
        raise UserError(f"{os.fspath(log_file)}: the log file cannot be written ({error.strerror})") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.log.setLevel(logging.INFO)
    access_log.log.propagate = False
    access_log.log.addHandler(handler)
    try:
        uvicorn.run(app, host=host, port=port, access_log=False, log_level="warning", server_header=False)
    except SystemExit as error:  # uvicorn exits where an address is taken
        if error.code:
            raise UserError(f"cannot listen on {host}:{port}; choose another host or port") from None
    finally:
        access_log.log.removeHandler(handler)
        handler.close()
