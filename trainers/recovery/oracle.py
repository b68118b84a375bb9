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
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from dfzsl.io.files import checked_names, read_json, write_json
from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import TOKEN, UNPRINTABLE, UserError, unknown

from .responses import step_of
from .teacher import Teacher
from .teacher_card import Card

LEVELS = ("weights", "logits", "probabilities", "labels")
# Bytes of the longest replies: a server's description, a reply without its numbers, a number.
DESCRIPTION, ENVELOPE, NUMBER = 1 << 26, 1 << 16, 40


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
        budget: rows that may be asked in all; 0 for any number.
        weight, bias: the rows (C, d), required at level "weights", where `answer` is its classifier's logits,
            and the intercepts (C,) or None.
        card: what the owner says of the teacher, or None.

    Attributes: `queries`, the rows answered so far, each of which had to be paid for once; `replayed`, those
    of them that came from the journal. At level "weights" nothing is counted.

    Probabilities may be rounded, and 0 for classes that the teacher leaves out (all but the k largest).

    Raises UserError for answers of a wrong shape, NaN, rows of probabilities that do not sum to 1 as far as
    they are told, labels out of range, questions beyond the budget, and where `answer` gives up.
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
        bias: Tensor | None = None,
        budget: int = 0,
        card: Card | None = None,
    ) -> None:
        if level not in LEVELS:
            raise unknown("access level (TEACHER.ACCESS)", level, LEVELS)
        if (weight is None) == (level == "weights"):
            raise ValueError("`weight` is given at level 'weights' and at no other")
        self.answer, self.level, self.classnames, self.dim = answer, level, list(classnames), dim
        self.normalized, self.backbone, self.batch_size = normalized, backbone, batch_size
        self.weight, self.bias, self.budget, self.card = weight, bias, budget, card
        self.journal = Path(journal) if journal is not None else None
        self.queries = 0
        self.replayed = 0

    def __repr__(self) -> str:
        asked = f"{self.queries:,} queries so far"
        said = f"{self.level} of {len(self.classnames)} classes, d = {self.dim}, {asked}"
        return f"Oracle({said}, {self.backbone or 'an unknown encoder'})"

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise UserError(f"the teacher reads features of shape (n, {self.dim}), got {tuple(x.shape)}")
        if self.level == "weights":
            return self.answer(x)
        if self.budget and self.queries + len(x) > self.budget:
            raise UserError(
                f"after {self.queries:,} questions to the teacher {len(x):,} more would pass TEACHER.BUDGET "
                f"{self.budget:,}"
            )
        with torch.no_grad():
            answers = [self._ask(part.float()) for part in x.detach().split(self.batch_size)]
        return torch.cat(answers).to(x.device)

    def _ask(self, x: Tensor) -> Tensor:
        if self.journal is None:
            answers = self._checked(x, self._answer(x))
        else:
            # With the names: a server that lists its classes in another order gives other answers.
            about = json.dumps([self.level, self.classnames, self.normalized]).encode()
            question = hashlib.sha256(about + x.cpu().contiguous().numpy().tobytes())
            path = self.journal / f"{question.hexdigest()}.safetensors"
            if path.exists():
                answers = self._checked(x, load_tensors(path, "answers")[0].get("answers"))
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

    def _checked(self, x: Tensor, answers: Tensor | None) -> Tensor:
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
        if self.level == "probabilities":
            total, left_out = answers.sum(1), (answers == 0).any(1)
            slack = 1e-3 + 0.5 * classes * step_of(answers)
            faulty = (total > 1 + slack) | ((total < 1 - slack) & ~left_out) | (answers.amax(1) <= 0)
            if (answers < 0).any() or faulty.any():
                raise UserError("the teacher's probabilities must be at least 0 and sum to 1 for each query")
        return answers


def open_oracle(
    source: Teacher | str | os.PathLike[str],
    level: str,
    journal: str | os.PathLike[str] | None = None,
    budget: int = 0,
) -> Oracle:
    """The oracle of a Teacher, of a teacher file, or of a model server (http:// or https:// address)."""
    if level not in LEVELS:
        raise unknown("access level (TEACHER.ACCESS)", level, LEVELS)
    if isinstance(source, (str, os.PathLike)):
        if is_address(str(source)):
            return HTTPTeacher(str(source)).oracle(level, journal, budget)
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
        budget=budget,
        weight=source.weight if level == "weights" else None,
        bias=source.bias if level == "weights" else None,
        card=source.card,
    )


def is_address(source: str) -> bool:
    """Whether a teacher is a server's address and not a file."""
    return source.lower().startswith(("http://", "https://"))


def check_address(url: str) -> None:
    """Raise UserError for an address that cannot be, or holds a secret: it is kept in logs and results."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        fine = False
    if not fine or UNPRINTABLE.search(url) or " " in url:
        raise UserError("a teacher's address starts with http:// or https:// and names a host")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{parts.scheme}://{parts.hostname}: a teacher's address stands in logs and results: leave user, "
            f"password and what follows ? or # out of it; a secret belongs into the environment as {TOKEN}"
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could carry questions and token to another host, or to a file: it is a refusal."""

    def redirect_request(self, *_: Any) -> None:
        return None


class HTTPTeacher:
    """A model server. GET url describes it, POST url answers.

    GET returns {"classnames": [...], "dim": d, "normalized": bool, "backbone": str} and may add "budget", the
    queries that it will still answer, and "batch", those that a request may have. POST takes
    {"level": "logits" | "probabilities" | "labels", "features": [[...], ...]} and returns
    {LEVEL: answers}. A request carries its body's SHA-256 as `Idempotency-Key`, so that a server that bills
    by the query can tell a retry from a new question, and the environment variable DFZSL_TEACHER_TOKEN, where
    set, as `Authorization: Bearer`. Redirects are not followed.

    Args:
        timeout: seconds in which a whole reply must arrive; retries: further tries after a time-out, a lost
            connection, or a status 429 or 5xx, the k-th after backoff * 2^k seconds, or after the server's
            `Retry-After`; longest: seconds of `Retry-After` to put up with; batch_size: rows per request.

    Raises UserError for any other status and for replies that are not what is said above; OSError when the
    tries are used up, or the server wants more than `longest` seconds.
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
        self.open = urllib.request.build_opener(_NoRedirect).open

    def oracle(self, level: str, journal: str | os.PathLike[str] | None = None, budget: int = 0) -> Oracle:
        """The oracle of this server; asks it for its class names."""
        if level == "weights":
            raise UserError(
                "a teacher behind an address answers queries; set TEACHER.ACCESS to logits or less"
            )
        try:
            about = self._request(None, DESCRIPTION)
        except OSError as error:
            raise UserError(f"the teacher does not describe itself ({error})") from error
        names, dim, batch = (about.get(name) for name in ("classnames", "dim", "batch"))
        if not isinstance(names, list) or type(dim) is not int or not names or dim < 1:
            raise UserError(f"{self.url}: the server's description lacks 'classnames' or 'dim'")
        names = checked_names(names, self.url)
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
        """The client's budget, or what the server says is left of its own, if that is less.

        What a run plans follows from it: it stays in the journal, for a run that goes on.
        """
        kept = Path(journal) / "budget.json" if journal is not None else None
        if kept and kept.exists():
            return int(read_json(kept))  # type: ignore[call-overload]
        left = about.get("budget")
        if type(left) is int and left >= 0:
            if left == 0:
                raise UserError(f"{self.url}: the budget that the server gives is used up")
            budget = min(budget, left) if budget else left
        if kept and budget:
            write_json(kept, budget)
        return budget

    def _answer(self, x: Tensor, level: str, classes: int) -> Tensor:
        numbers = len(x) * (1 if level == "labels" else classes)
        reply = self._request({"level": level, "features": x.tolist()}, ENVELOPE + NUMBER * numbers)
        wrong = f"{self.url}: the reply holds no array '{level}'"
        try:
            if level != "labels":
                return torch.tensor(reply[level], dtype=torch.float64)
            if not all(type(label) is int for label in reply[level]):  # torch would cut 1.7 down to 1
                raise UserError(f"{wrong} of whole numbers")
            return torch.tensor(reply[level], dtype=torch.int64)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(wrong) from None

    def _request(self, question: dict[str, Any] | None, most: int) -> dict[str, Any]:
        """The reply to a question, of at most `most` bytes."""
        body = None if question is None else json.dumps(question).encode()
        headers = {"Accept": "application/json", **self.headers}
        if body is not None:
            headers |= {
                "Content-Type": "application/json",
                "Idempotency-Key": hashlib.sha256(body).hexdigest(),
            }
        request = urllib.request.Request(self.url, data=body, headers=headers)
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                text = _within(self.timeout, lambda: self._read(request, most))
                break
            # What a server says of its fault is left out: it could be anything, our token too.
            except urllib.error.HTTPError as error:
                if error.code != 429 and error.code < 500:
                    raise UserError(f"{self.url}: the server refused with status {error.code}") from None
                said = f"{self.url}: status {error.code}"
                wait = max(wait, _retry_after(error.headers))
                if wait > self.longest:
                    raise OSError(f"{said}; it wants no question for {wait:,.0f} seconds") from None
            # A connection that breaks while the reply is read raises HTTPException, which is no OSError.
            except http.client.HTTPException as error:
                said = f"{self.url}: a reply that is not HTTP's ({type(error).__name__})"
            except OSError as error:
                said = f"{self.url}: {error}"
            if attempt == self.retries:
                raise OSError(said)
            time.sleep(wait)
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise UserError(f"{self.url}: the server did not answer with a JSON object")
        return reply

    def _read(self, request: urllib.request.Request, most: int) -> bytes:
        with self.open(request, timeout=self.timeout) as response:
            text = response.read(most + 1)
            if len(text) > most:
                raise UserError(f"{self.url}: the reply is longer than any answer ({most:,} bytes)")
            if response.length:  # bytes that were announced and did not come
                raise http.client.IncompleteRead(text, response.length)
            return text


def _within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """The result of `work`, or TimeoutError. A socket's own time-out starts anew with every byte."""
    done: queue.Queue[tuple[bytes, Exception | None]] = queue.Queue(1)

    def run() -> None:
        try:
            done.put((work(), None))
        except Exception as error:
            done.put((b"", error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole reply within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return result


def _retry_after(headers: Message) -> float:
    """Seconds that a server asks to wait, a number or a date by its clock; 0 if it does not say."""
    said = headers.get("Retry-After", "").strip()
    if said.isascii() and said.isdigit():
        return float(said[:9])
    try:
        now = parsedate_to_datetime(headers["Date"]).timestamp() if headers["Date"] else time.time()
        return max(parsedate_to_datetime(said).timestamp() - now, 0.0)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
