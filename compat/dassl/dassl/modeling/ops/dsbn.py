"""Batch normalisation with statistics for each domain (Chang et al., CVPR 2019)."""

from __future__ import annotations

from torch import Tensor, nn


class _DSBN(nn.Module):
    """`n_domain` normalisations in `bn`; `select_bn` says whose turn it is (the first's, to begin with)."""

    kind: type[nn.Module]

    def __init__(self, num_features: int, n_domain: int) -> None:
        super().__init__()
        self.bn = nn.ModuleList(self.kind(num_features) for _ in range(n_domain))
        self.n_domain = n_domain
        self.domain_idx = 0

    def select_bn(self, domain_idx: int = 0) -> None:
        assert domain_idx in range(self.n_domain), f"there are {self.n_domain} domains, got {domain_idx}"
        self.domain_idx = domain_idx

    def forward(self, x: Tensor) -> Tensor:
        return self.bn[self.domain_idx](x)


class DSBN1d(_DSBN):
    kind = nn.BatchNorm1d


class DSBN2d(_DSBN):
    kind = nn.BatchNorm2d
