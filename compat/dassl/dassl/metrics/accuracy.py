"""Top-k accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def compute_accuracy(
    output: Tensor | Sequence[Tensor], target: Tensor, topk: Sequence[int] = (1,)
) -> list[Tensor]:
    """Top-k accuracies in percent.

    output: logits (B, C), or a tuple or list whose first element they are; target: labels (B,).
    Returns one tensor (1,) for each k.
    """
    logits = output if isinstance(output, Tensor) else output[0]
    top = logits.topk(max(topk), dim=1).indices
    correct = (top == target.view(-1, 1)).float()
    return [correct[:, :k].sum().reshape(1) * (100.0 / target.size(0)) for k in topk]
