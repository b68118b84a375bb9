"""Open the oracle of a teacher in memory, in a file, or behind a server."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

from dfzsl.utils.errors import unknown_name

from .oracle import LEVELS, Oracle
from .remote_oracle import HTTPTeacher, is_address
from .teacher import Teacher


def open_oracle(
    source: Teacher | str | os.PathLike[str],
    level: str,
    journal: str | os.PathLike[str] | None = None,
    budget: int = 0,
) -> Oracle:
    """Open the oracle of a Teacher, of a teacher file, or of a server.

    Args:
        source: a teacher, the path of its file, or the http:// or https:// address of a server.
        level: access level, one of `LEVELS`.
        journal: directory in which responses are stored, or None.
        budget: most queries in all; 0 for any number.

    Returns:
        The oracle.

    Raises:
        UserError: unknown level, broken teacher file, or a server that does not describe a teacher.
    """
    if level not in LEVELS:
        raise unknown_name("access level (TEACHER.ACCESS)", level, LEVELS)
    if isinstance(source, (str, os.PathLike)):
        if is_address(str(source)):
            return HTTPTeacher(str(source)).oracle(level, journal, budget)
        source = Teacher.load(source)
    teacher = source
    answer: dict[str, Callable[[Tensor], Tensor]] = {
        "weights": teacher.logits,
        "logits": teacher.logits,
        # In float64 a probability keeps its logarithm down to 1e-300.
        "probabilities": lambda x: teacher.logits(x.double()).softmax(1),
        "labels": lambda x: teacher.logits(x).argmax(1),
    }
    return Oracle(
        answer[level],
        level,
        teacher.classnames,
        teacher.weight.shape[1],
        normalized=teacher.normalized,
        backbone=teacher.backbone,
        journal=journal,
        budget=budget,
        weight=teacher.weight if level == "weights" else None,
        bias=teacher.bias if level == "weights" else None,
        card=teacher.card,
    )
