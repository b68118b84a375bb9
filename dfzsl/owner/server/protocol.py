"""Define and validate the requests and responses of the protocol (docs/black_box.md)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from .config import ServerConfig
from .refusal import Refusal

MAX_FEATURE = 1e6  # absolute value
MAX_EXTRA_VALUES = 64  # of keys that the protocol does not know and ignores

Feature = Annotated[float, Field(ge=-MAX_FEATURE, le=MAX_FEATURE, allow_inf_nan=False)]
Row = Annotated[list[Feature], FailFast()]


class QueryRequest(BaseModel):
    """Queries of a client: image features to classify."""

    model_config = ConfigDict(strict=True)

    level: Literal["logits", "probabilities", "labels"] = Field(description="access level of the response")
    features: Annotated[list[Row], Field(min_length=1), FailFast()] = Field(
        description="one row of `dim` numbers for each query, at most `batch` rows"
    )


class QueryResponse(BaseModel):
    """Answers in the order of the queries, under the name of their access level."""

    logits: list[list[float]] | None = Field(None, description="one score for each class")
    probabilities: list[list[float]] | None = Field(None, description="one probability for each class")
    labels: list[int] | None = Field(None, description="indices into `classnames`")


class TeacherDescription(BaseModel):
    """The teacher and the limits of a request."""

    classnames: list[str]
    dim: int = Field(description="numbers in a row of features")
    normalized: bool = Field(description="true for a cosine classifier, false for a linear one")
    backbone: str = Field(description="image encoder that the features come from")
    levels: list[str] = Field(description="access levels that are answered")
    batch: int = Field(description="queries in a request, at most")
    budget: int | None = Field(None, description="queries that this client may still ask, if limited")


class ErrorResponse(BaseModel):
    """The reason why a request is refused."""

    error: str


def parse_queries(body: bytes, config: ServerConfig, dim: int) -> tuple[str, np.ndarray]:
    """Read a request's body.

    Args:
        body: JSON of a `QueryRequest`.
        config: the server's limits.
        dim: numbers in a row of features.

    Returns:
        The access level, and the features of shape (n, dim) as float32.

    Raises:
        Refusal: 400 for anything but a `QueryRequest`, 403 for a level that is not answered, 413 for more
            than `config.batch` rows.
    """
    # An empty list or object takes two bytes of JSON and hundreds of bytes in memory: count before parsing.
    rows, numbers, objects = body.count(b"["), body.count(b","), body.count(b"{")
    if rows > config.batch + MAX_EXTRA_VALUES or numbers > config.batch * dim + MAX_EXTRA_VALUES:
        raise Refusal(413, f"a request has at most {config.batch} queries of {dim} numbers")
    if objects > MAX_EXTRA_VALUES:
        raise Refusal(400, f"a request is one JSON object, this has {objects}")
    try:
        request = QueryRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise Refusal(400, f"{where}: {first['msg']}") from None
    if request.level not in config.levels:
        raise Refusal(403, f"this server answers {', '.join(config.levels)}")
    if len(request.features) > config.batch:
        raise Refusal(413, f"a request has at most {config.batch} queries")
    if any(len(row) != dim for row in request.features):
        raise Refusal(400, f"features: a row has {dim} numbers")
    return request.level, np.array(request.features, dtype=np.float64).astype(np.float32)
