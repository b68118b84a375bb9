"""Extract a teacher's rows and intercepts by the method that its access level allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .boundary_search import rows_from_labels
from .responses import Ask, Extracted
from .score_recovery import rows_from_scores


def recover_class_weights(
    ask: Ask,
    level: str,
    classnames: Sequence[str],
    text: Tensor,
    *,
    rays: float = 1.5,
    bisections: int = 14,
    tolerance: float = 0.02,
    budget: int = 0,
    generator: torch.Generator | None = None,
) -> Extracted:
    """Recover a teacher's rows and intercepts as far as an access level determines them.

    Args:
        ask: returns the responses to unit queries (n, d).
        level: "logits", "probabilities" or "labels".
        classnames: C names, for messages.
        text: (C, d) unit text features, which labels are first requested for.
        rays, bisections: precision with labels, see `rows_from_labels`.
        tolerance: relative error of the rows at which no more scores are requested.
        budget: most queries; 0 for any number.
        generator: of random queries.

    Returns:
        The rows that the budget buys: exact from logits; with sum zero from probabilities; with sum zero
        and mean squared row 1 from labels.

    Raises:
        UserError: the responses are not those of a linear or cosine classifier, or do not determine it.
    """
    generator = generator or torch.Generator().manual_seed(0)
    if level == "labels":
        return rows_from_labels(
            ask, classnames, text, rays=rays, bisections=bisections, budget=budget, generator=generator
        )
    return rows_from_scores(
        ask,
        classnames,
        text.shape[1],
        logarithms=level == "probabilities",
        tolerance=tolerance,
        budget=budget,
        generator=generator,
    )
