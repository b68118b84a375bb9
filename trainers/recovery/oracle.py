"""Define the oracle: a teacher behind an access level, with its queries counted, checked and journaled.

    weights         the rows themselves; no query is needed
    logits          (n, C) scores
    probabilities   (n, C), the softmax of the logits
    labels          (n,), the index of the top class

The responses come from any callable. `open_oracle.py` makes oracles of teachers, teacher files and servers.
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

from .responses import step_of
from .teacher_card import TeacherCard

LEVELS = ("weights", "logits", "probabilities", "labels")


class Oracle:
    """A teacher behind an access level: calling it with features (n, d) returns the level's responses.

    Probabilities may be rounded, and 0 for classes that the teacher leaves out (all but the k largest).

    Args:
        answer: maps float32 features (n, d), n <= batch_size, to responses. It may raise OSError where it
            cannot answer.
        level: one of `LEVELS`.
        classnames: C names in the order of the responses.
        dim: d.
        normalized: whether the teacher is a cosine classifier, or else a linear one.
        backbone: id of the image encoder whose features the teacher reads, or "".
        batch_size: rows per call of `answer`.
        journal: folder in which every response is kept. After a failure the same queries are answered from
            there, and none is paid for twice.
        weight: (C, d) the rows; required at level "weights", where `answer` returns their logits.
        bias: (C,) intercepts at level "weights", or None for none.
        budget: most queries in all; 0 for any number.
        card: the teacher's model card, or None.

    Attributes:
        queries: rows answered so far, each of which had to be paid for once; 0 at level "weights".
        replayed: those of them that came from the journal.

    Raises:
        UserError: on a call, for features or responses of a wrong shape, values that are not finite,
            probabilities that do not sum to 1 as far as they are disclosed, labels out of range, queries
            beyond the budget, and where `answer` gives up.
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
            raise ValueError("`weight` is given at level 'weights' and at no other")
        self.answer, self.level, self.classnames, self.dim = answer, level, list(classnames), dim
        self.normalized, self.backbone, self.batch_size = normalized, backbone, batch_size
        self.weight, self.bias, self.budget, self.card = weight, bias, budget, card
        self.journal = Path(journal) if journal is not None else None
        self.queries = 0
        self.replayed = 0

    def __repr__(self) -> str:
        teacher = f"{self.level} of {len(self.classnames)} classes, d = {self.dim}"
        return f"Oracle({teacher}, {self.queries:,} queries so far, {self.backbone or 'an unknown encoder'})"

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
        """Return the responses to one batch, from the journal if they are there."""
        if self.journal is None:
            answers = self._checked(x, self._answer(x))
        else:
            # With the names: a server that lists its classes in another order responds otherwise.
            about = json.dumps([self.level, self.classnames, self.normalized]).encode()
            digest = hashlib.sha256(about + x.cpu().contiguous().numpy().tobytes()).hexdigest()
            path = self.journal / f"{digest}.safetensors"
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
        except OSError as error:
            resume = f"; run again: the answers are kept in {self.journal}" if self.journal else ""
            raise UserError(
                f"the teacher stopped answering after {self.queries} queries ({error}){resume}"
            ) from error

    def _checked(self, x: Tensor, answers: Tensor | None) -> Tensor:
        """Return the responses to queries x (n, d), after checks of shape, type and range."""
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
            total, incomplete = answers.sum(1), (answers == 0).any(1)
            slack = 1e-3 + 0.5 * classes * step_of(answers)
            faulty = (total > 1 + slack) | ((total < 1 - slack) & ~incomplete) | (answers.amax(1) <= 0)
            if (answers < 0).any() or faulty.any():
                raise UserError("the teacher's probabilities must be at least 0 and sum to 1 for each query")
        return answers
