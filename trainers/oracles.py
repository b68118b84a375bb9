"""How a client reaches a teacher: one small protocol for four access levels, with the queries counted.

    weights         the rows themselves; no query is needed
    logits          (n, C) scores
    probabilities   (n, C), the softmax of the logits
    labels          (n,), the index of the top class

The answers come from any callable: a Teacher in memory, or a model server behind HTTP.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfzsl.errors import UserError, unknown
from dfzsl.files import load_tensors, save_tensors

from .teacher import Teacher

LEVELS = ("weights", "logits", "probabilities", "labels")


class Oracle:
    """A teacher behind an access level. Calling it with features (n, d) returns the level's answers.

    Args:
        answer: maps float32 features (n, d), n <= batch_size, to the answers. It may raise OSError or
            TimeoutError where it cannot answer.
        level: one of `LEVELS`; classnames: in the order of the answers; dim: d.
        normalized: a cosine teacher (True) or a linear one.
        batch_size: rows per call of `answer`.
        journal: a folder that keeps every answer. After a failure the same questions are answered from
            there, and none is paid for twice.
        weight: the rows (C, d); required at level "weights", where `answer` is its classifier's logits.

    Attributes: `queries`, the rows answered so far, each of which had to be paid for once; `replayed`, those
    of them that came from the journal. At level "weights" nothing is counted.

    Raises UserError for answers of a wrong shape, NaN, rows of probabilities that do not sum to 1, labels out
    of range, and where `answer` gives up.
    """

    def __init__(
        self,
        answer: Callable[[Tensor], Tensor],
        level: str,
        classnames: Sequence[str],
        dim: int,
        *,
        normalized: bool = True,
        backbone: str = "",
        batch_size: int = 65536,
        journal: str | os.PathLike[str] | None = None,
        weight: Tensor | None = None,
    ) -> None:
        if level not in LEVELS:
            raise unknown("access level (TEACHER.ACCESS)", level, LEVELS)
        if (weight is None) == (level == "weights"):
            raise ValueError("`weight` is given at level 'weights' and at no other")
        self.answer, self.level, self.classnames, self.dim = answer, level, list(classnames), dim
        self.normalized, self.backbone, self.batch_size, self.weight = (
            normalized,
            backbone,
            batch_size,
            weight,
        )
        self.journal = Path(journal) if journal is not None else None
        self.queries = 0
        self.replayed = 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise UserError(f"the teacher reads features of shape (n, {self.dim}), got {tuple(x.shape)}")
        if self.level == "weights":
            return self.answer(x)
        with torch.no_grad():
            answers = [self._ask(part.float()) for part in x.detach().split(self.batch_size)]
        return torch.cat(answers).to(x.device)

    def _ask(self, x: Tensor) -> Tensor:
        if self.journal is None:
            answers = self._checked(x, self._answer(x))
        else:
            question = x.cpu().contiguous().numpy().tobytes() + self.level.encode()
            path = self.journal / f"{hashlib.sha256(question).hexdigest()}.safetensors"
            if path.exists():
                answers = self._checked(x, load_tensors(path, "answers")[0]["answers"])
                self.replayed += len(x)
            else:
                answers = self._checked(x, self._answer(x))
                save_tensors(path, {"answers": answers}, {"kind": "answers"})
        self.queries += len(x)
        return answers

    def _answer(self, x: Tensor) -> Tensor:
        try:
            return self.answer(x)
        except (OSError, TimeoutError) as error:
            kept = f"; run again: the answers are kept in {self.journal}" if self.journal else ""
            raise UserError(
                f"the teacher stopped answering after {self.queries} queries ({error}){kept}"
            ) from error

    def _checked(self, x: Tensor, answers: Tensor) -> Tensor:
        classes = len(self.classnames)
        expected = (len(x),) if self.level == "labels" else (len(x), classes)
        if not isinstance(answers, Tensor) or tuple(answers.shape) != expected:
            got = tuple(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
            raise UserError(f"the teacher must answer {self.level} of shape {expected}, it answered {got}")
        if self.level == "labels":
            if answers.is_floating_point() or ((answers < 0) | (answers >= classes)).any():
                raise UserError(f"the teacher must answer labels from 0 to {classes - 1}, as integers")
            return answers.long()
        if not torch.isfinite(answers).all():
            raise UserError(f"the teacher answered {self.level} that are not finite")
        if self.level == "probabilities" and (
            (answers < 0).any() or ((answers.sum(1) - 1).abs() > 1e-3).any()
        ):
            raise UserError("the teacher's probabilities must be at least 0 and sum to 1 for each query")
        return answers


def open_oracle(
    source: Teacher | str | os.PathLike[str], level: str, journal: str | os.PathLike[str] | None = None
) -> Oracle:
    """The oracle of a Teacher, of a teacher file, or of a model server (http:// or https:// address)."""
    if level not in LEVELS:
        raise unknown("access level (TEACHER.ACCESS)", level, LEVELS)
    if isinstance(source, (str, os.PathLike)):
        if str(source).startswith(("http://", "https://")):
            return HTTPTeacher(str(source)).oracle(level, journal)
        source = Teacher.load(source)
    answers: dict[str, Callable[[Tensor], Tensor]] = {
        "weights": source.logits,
        "logits": source.logits,
        # In float64 a probability keeps its logarithm down to 1e-300.
        "probabilities": lambda x: source.logits(x.double()).softmax(1),
        "labels": lambda x: source.logits(x).argmax(1),
    }
    return Oracle(
        answers[level],
        level,
        source.classnames,
        source.weight.shape[1],
        normalized=source.normalized,
        backbone=source.backbone,
        journal=journal,
        weight=source.weight if level == "weights" else None,
    )


class HTTPTeacher:
    """A model server. GET url describes it, POST url answers.

    GET returns {"classnames": [...], "dim": d, "normalized": bool, "backbone": str}. POST takes
    {"level": "logits" | "probabilities" | "labels", "features": [[...], ...]} and returns
    {LEVEL: answers}. A request carries its body's SHA-256 as `Idempotency-Key`, so that a server that bills
    by the query can tell a retry from a new question.

    Args:
        timeout: seconds to wait for a reply; retries: further tries after a time-out, a lost connection, or a
            status 429 or 5xx, the k-th after backoff * 2^k seconds; batch_size: rows per request.

    Raises UserError for any other status and for replies that are not what is said above; OSError when the
    tries are used up.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        backoff: float = 0.5,
        batch_size: int = 256,
        headers: dict[str, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"a teacher's address starts with http:// or https://, got '{url}'")
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self.batch_size, self.headers = batch_size, dict(headers or {})

    def oracle(self, level: str, journal: str | os.PathLike[str] | None = None) -> Oracle:
        """The oracle of this server; asks it for its class names."""
        if level == "weights":
            raise UserError(
                "a teacher behind an address answers queries; set TEACHER.ACCESS to logits or less"
            )
        try:
            about = self._request(None)
        except OSError as error:
            raise UserError(f"the teacher does not describe itself ({error})") from error
        names, dim = about.get("classnames"), about.get("dim")
        if not isinstance(names, list) or not isinstance(dim, int) or not names or dim < 1:
            raise UserError(f"{self.url}: the server's description lacks 'classnames' or 'dim'")
        return Oracle(
            lambda x: self._answer(x, level),
            level,
            [str(name) for name in names],
            dim,
            normalized=bool(about.get("normalized", True)),
            backbone=str(about.get("backbone", "")),
            batch_size=self.batch_size,
            journal=journal,
        )

    def _answer(self, x: Tensor, level: str) -> Tensor:
        reply = self._request({"level": level, "features": x.tolist()})
        try:
            dtype = torch.int64 if level == "labels" else torch.float64
            return torch.tensor(reply[level], dtype=dtype)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.url}: the reply holds no array '{level}'") from None

    def _request(self, question: dict[str, Any] | None) -> dict[str, Any]:
        body = None if question is None else json.dumps(question).encode()
        headers = {"Accept": "application/json", **self.headers}
        if body is not None:
            headers |= {
                "Content-Type": "application/json",
                "Idempotency-Key": hashlib.sha256(body).hexdigest(),
            }
        request = urllib.request.Request(self.url, data=body, headers=headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    text = response.read()
                break
            except urllib.error.HTTPError as error:
                if error.code != 429 and error.code < 500:
                    raise UserError(f"{self.url}: the server refused with status {error.code}") from None
                if attempt == self.retries:
                    raise
            # A connection that breaks while the reply is read raises HTTPException, which is no OSError.
            except (OSError, http.client.HTTPException) as error:
                if attempt == self.retries:
                    raise OSError(f"{self.url}: {error}") from error
            time.sleep(self.backoff * 2**attempt)
        try:
            reply = json.loads(text)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise UserError(f"{self.url}: the server did not answer with a JSON object")
        return reply
