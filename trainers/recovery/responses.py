"""Define what recovery from responses works with: the query function, the recovered rows, their rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Maps unit queries (n, d) to a teacher's responses: scores (n, C) or labels (n,).
Ask = Callable[[Tensor], Tensor]

MAX_DECIMALS = 6  # responses with more decimals count as not rounded
MIN_NONZERO_RESPONSES = 20  # with fewer, rounding is not looked for


@dataclass(frozen=True)
class Extracted:
    """Rows of a teacher as far as its responses determine them.

    Attributes:
        weight: (C, d) rows.
        bias: (C,) intercepts, or None; `argmax_c x.weight_c + bias_c` decides as the teacher does.
        error: expected relative error of the rows, without what all rows share; None where it cannot be
            estimated because there were fewer responses than unknowns.
    """

    weight: Tensor
    bias: Tensor | None
    error: float | None


def step_of(answers: Tensor) -> float:
    """Find the unit of the last decimal that responses are rounded to.

    Args:
        answers: responses of any shape.

    Returns:
        The unit, e.g. 0.01 for two decimals; 0 where responses are not rounded.
    """
    values = answers[answers != 0].double()
    if len(values) < MIN_NONZERO_RESPONSES:
        return 0.0
    for decimals in range(MAX_DECIMALS + 1):
        residual = (values - values.round(decimals=decimals)).abs()
        if (residual <= 1e-7 * values.abs().clamp(min=1)).all():
            return 10.0**-decimals
    return 0.0
