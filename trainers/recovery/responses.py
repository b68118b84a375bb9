"""Provide types for recovery from responses: query functions and recovered class weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Maps unit queries (n, d) to a teacher's responses: scores (n, C) or labels (n,).
QueryFunction = Callable[[Tensor], Tensor]

MAX_DECIMALS = 6  # responses with more decimals count as not rounded
MIN_NONZERO_RESPONSES = 20  # fewer do not show rounding


@dataclass(frozen=True)
class RecoveredWeights:
    """Class weights of a teacher as far as its responses determine them.

    `argmax_c x.weight_c + bias_c` decides as the teacher does.

    Attributes:
        weight: (C, d) class weights.
        bias: (C,) intercepts, or None for none.
        error: estimated relative error of the weights, apart from their mean over classes; None with fewer
            responses than unknowns.
    """

    weight: Tensor
    bias: Tensor | None
    error: float | None


def detect_rounding_step(responses: Tensor) -> float:
    """Detect the decimal to which responses are rounded.

    Args:
        responses: values of any shape.

    Returns:
        The rounding step, e.g. 0.01 for two decimals; 0 if responses are not rounded.
    """
    values = responses[responses != 0].double()
    if len(values) < MIN_NONZERO_RESPONSES:
        return 0.0
    for decimals in range(MAX_DECIMALS + 1):
        residual = (values - values.round(decimals=decimals)).abs()
        if (residual <= 1e-7 * values.abs().clamp(min=1)).all():
            return 10.0**-decimals
    return 0.0
