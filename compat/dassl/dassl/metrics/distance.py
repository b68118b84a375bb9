"""Distance matrices between two sets of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def euclidean_squared_distance(input1: Tensor, input2: Tensor) -> Tensor:
    """|a_i - b_j|^2 as (m, n), for a (m, d) and b (n, d)."""
    squares1 = input1.pow(2).sum(dim=1, keepdim=True)
    squares2 = input2.pow(2).sum(dim=1)
    return torch.addmm(squares1 + squares2, input1, input2.t(), beta=1, alpha=-2)


def cosine_distance(input1: Tensor, input2: Tensor) -> Tensor:
    """1 - cos(a_i, b_j) as (m, n), for a (m, d) and b (n, d)."""
    return 1 - F.normalize(input1, dim=1) @ F.normalize(input2, dim=1).t()


def compute_distance_matrix(input1: Tensor, input2: Tensor, metric: str = "euclidean") -> Tensor:
    """The (m, n) matrix of distances; metric "euclidean" (squared) or "cosine". ValueError for another."""
    if input1.dim() != 2 or input2.dim() != 2 or input1.size(1) != input2.size(1):
        raise ValueError(f"expected (m, d) and (n, d), got {tuple(input1.shape)} and {tuple(input2.shape)}")
    if metric == "euclidean":
        return euclidean_squared_distance(input1, input2)
    if metric == "cosine":
        return cosine_distance(input1, input2)
    raise ValueError(f"Unknown distance metric: {metric}. Please choose either 'euclidean' or 'cosine'")
