"""Provide the oracle: a teacher behind an access level, whose responses are counted, checked and stored.

    weights         the class weights; no query is needed
    logits          (n, C) scores
    probabilities   (n, C) softmax of the logits
    labels          (n,) index of the top class

The responses come from any callable. `open_oracle.py` opens oracles of teachers, teacher files and servers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import UserError, unknown_name

from .responses import detect_rounding_step
from .teacher_card import TeacherCard

LEVELS = ("weights", "logits", "probabilities", "labels")


class Oracle:
    """A teacher behind an access level. A call with features (n, d) returns its responses.

    Probabilities may be rounded, or 0 for classes that the teacher omits (e.g. all but the k largest).

    Args:
        answer: maps float32 features (n, d), n <= batch_size, to responses, or raises OSError.
        level: one of `LEVELS`.
        classnames: C names in the order of the responses.
        dim: dimension d of features.
        normalized: whether the teacher is a cosine classifier, or else a linear one.
        backbone: id of the image encoder whose features the teacher reads, or "".
        batch_size: rows per call of `answer`.
        journal: directory in which responses are stored, or None. After a failure, repeated queries are read
            from there, so no query is paid for twice.
        weight: (C, d) class weights; required at level "weights", where `answer` returns their logits.
        bias: (C,) intercepts at level "weights", or None for none.
        budget: limit on the number of queries; 0 for none.
        card: model card of the teacher, or None.

    Attributes:
        queries: number of queries so far, including those of the journal; 0 at level "weights".
        replayed: number of queries that were read from the journal.

    Raises:
        UserError: on a call, if features or responses have a wrong shape, values are not finite, disclosed
            probabilities do not sum to 1, labels are out of range, the budget is exceeded, or `answer` fails.
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
        card: TeacherCard | None = None,
    ) -> None:
        if level not in LEVELS:
            raise unknown_name("access level (TEACHER.ACCESS)", level, LEVELS)
        if (weight is None) == (level == "weights"):
            raise ValueError("`weight` must be given at level 'weights', and only there")
        self.answer, self.level, self.classnames, self.dim = answer, level, list(classnames), dim
        self.normalized, self.backbone, self.batch_size = normalized, backbone, batch_size
        self.weight, self.bias, self.budget, self.card = weight, bias, budget, card
        self.journal = Path(journal) if journal is not None else None
        self.queries = 0
        self.replayed = 0

    def __repr__(self) -> str:
        teacher = f"{self.level} of {len(self.classnames)} classes, d = {self.dim}"
        return f"Oracle({teacher}, {self.queries:,} queries, {self.backbone or 'unknown encoder'})"

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise UserError(f"the teacher expects features of shape (n, {self.dim}), got {tuple(x.shape)}")
        if self.level == "weights":
            return self.answer(x)
        if self.budget and self.queries + len(x) > self.budget:
            raise UserError(
                f"after {self.queries:,} queries to the teacher {len(x):,} more would exceed TEACHER.BUDGET "
                f"{self.budget:,}; raise it"
            )
        with torch.no_grad():
            responses = [self._query_batch(part.float()) for part in x.detach().split(self.batch_size)]
        return torch.cat(responses).to(x.device)

    def _query_batch(self, x: Tensor) -> Tensor:
        """Return the responses to one batch, from the journal if it has them."""
        if self.journal is None:
            responses = self._check_responses(x, self._call_answer(x))
        else:
            # The order of the classes is part of the key, because it is that of the responses.
            key = json.dumps([self.level, self.classnames, self.normalized]).encode()
            digest = hashlib.sha256(key + x.cpu().contiguous().numpy().tobytes()).hexdigest()
            path = self.journal / f"{digest}.safetensors"
            if path.exists():
                responses = self._check_responses(x, load_tensors(path, "answers")[0].get("answers"))
                self.replayed += len(x)
            else:
                responses = self._check_responses(x, self._call_answer(x))
                save_tensors(path, {"answers": responses}, {"kind": "answers"})
        self.queries += len(x)
        return responses

    def _call_answer(self, x: Tensor) -> Tensor:
        """Call `answer`. Raises UserError if it fails."""
        try:
            return self.answer(x)
        except OSError as error:
            resume = f"; run again to resume from the responses in {self.journal}" if self.journal else ""
            raise UserError(
                f"the teacher stopped responding after {self.queries} queries ({error}){resume}"
            ) from error

    def _check_responses(self, x: Tensor, responses: Tensor | None) -> Tensor:
        """Check shape, type and range of the responses to queries x (n, d), and return them."""
        classes = len(self.classnames)
        expected = (len(x),) if self.level == "labels" else (len(x), classes)
        if not isinstance(responses, Tensor) or tuple(responses.shape) != expected:
            got = tuple(responses.shape) if isinstance(responses, Tensor) else type(responses).__name__
            raise UserError(f"the teacher must return {self.level} of shape {expected}, it returned {got}")
        if self.level == "labels":
            if responses.is_floating_point() or ((responses < 0) | (responses >= classes)).any():
                raise UserError(f"the teacher must return labels from 0 to {classes - 1}, as integers")
            return responses.long()
        if not torch.isfinite(responses).all():
            raise UserError(f"the teacher returned {self.level} that are not finite")
        if self.level == "probabilities":
            total, incomplete = responses.sum(1), (responses == 0).any(1)
            tolerance = 1e-3 + 0.5 * classes * detect_rounding_step(responses)
            invalid = (total > 1 + tolerance) | ((total < 1 - tolerance) & ~incomplete)
            invalid |= responses.amax(1) <= 0
            if (responses < 0).any() or invalid.any():
                raise UserError("the teacher's probabilities must be at least 0 and sum to 1 for each query")
        return responses
