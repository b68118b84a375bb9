"""Recover a teacher's class weights by the method for its access level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .boundary_search import weights_from_labels
from .responses import QueryFunction, RecoveredWeights
from .score_recovery import weights_from_scores


def recover_class_weights(
    query: QueryFunction,
    level: str,
    classnames: Sequence[str],
    text: Tensor,
    *,
    rays: float = 1.5,
    bisections: int = 14,
    tolerance: float = 0.02,
    budget: int = 0,
    generator: torch.Generator | None = None,
) -> RecoveredWeights:
    """Recover class weights and intercepts as far as an access level determines them.

    Args:
        query: returns the responses to unit queries (n, d).
        level: "logits", "probabilities" or "labels".
        classnames: C names, for messages.
        text: (C, d) L2-normalized text embeddings, the first queries at level labels.
        rays: search directions at level labels, see `weights_from_labels`.
        bisections: queries per search direction, see `weights_from_labels`.
        tolerance: relative error of the weights at which no more scores are queried.
        budget: most queries; 0 for any number.
        generator: of random queries.

    Returns:
        Class weights and intercepts: exact from logits; with sum zero from probabilities; with sum zero and
        mean squared length 1 from labels.

    Raises:
        UserError: the responses are not those of a linear or cosine classifier, or do not determine it.
    """
    generator = generator or torch.Generator().manual_seed(0)
    if level == "labels":
        return weights_from_labels(
            query, classnames, text, rays=rays, bisections=bisections, budget=budget, generator=generator
        )
    return weights_from_scores(
        query,
        classnames,
        text.shape[1],
        logarithms=level == "probabilities",
        tolerance=tolerance,
        budget=budget,
        generator=generator,
    )
