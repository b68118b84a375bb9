"""Maximum mean discrepancy (Gretton et al., JMLR 2012)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...metrics import euclidean_squared_distance

SIGMAS = (1, 5, 10)


class MaximumMeanDiscrepancy(nn.Module):
    """k(x, x') + k(y, y') - 2 k(x, y), averaged over pairs of different rows of x (m, d) and y (n, d).

    kernel_type: rbf (the sum of Gaussians of width 1, 5 and 10), poly ((x.y + 2)^2) or linear. normalize:
    rows to unit length first. Raises NotImplementedError for another kernel.
    """

    def __init__(self, kernel_type: str = "rbf", normalize: bool = False) -> None:
        super().__init__()
        self.kernel_type = kernel_type
        self.normalize = normalize

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.normalize:
            x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        within = self._kernel(x, x), self._kernel(y, y)
        apart = [
            kernel[~torch.eye(len(kernel), dtype=torch.bool, device=x.device)].mean() for kernel in within
        ]
        return apart[0] + apart[1] - 2 * self._kernel(x, y).mean()

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kernel_type == "linear":
            return x @ y.t()
        if self.kernel_type == "poly":
            return (x @ y.t() + 2) ** 2
        if self.kernel_type == "rbf":
            squared = euclidean_squared_distance(x, y)
            return sum((-squared / (2 * sigma**2)).exp() for sigma in SIGMAS)  # type: ignore[return-value]
        raise NotImplementedError(f"kernel_type must be rbf, poly or linear, got {self.kernel_type}")
