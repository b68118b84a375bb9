"""Batches of features."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfzsl.datasets.loader import FeatureLoader


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 30),
    size=st.integers(1, 12),
    shuffle=st.booleans(),
    drop=st.booleans(),
    seed=st.integers(0, 9),
)
def test_loader_serves_each_row_once(n, size, shuffle, drop, seed):
    x, y = torch.randn(n, 3), torch.arange(n)
    loader = FeatureLoader(x, y, size, shuffle, torch.Generator().manual_seed(seed), drop)
    batches = list(loader)
    assert len(batches) == len(loader) == (n // size if drop else -(-n // size))
    for batch in batches:
        assert set(batch) == {"img", "label", "domain", "impath", "index"}
        assert torch.equal(batch["img"], x[batch["index"]]) and torch.equal(batch["label"], batch["index"])
        assert len(batch["impath"]) == len(batch["img"]) == len(batch["domain"])
    served = Counter(i for batch in batches for i in batch["index"].tolist())
    assert sum(served.values()) == (n // size * size if drop else n) and set(served.values()) <= {1}


def test_loader_shuffles_anew_and_repeats_by_seed():
    x, y = torch.randn(50, 2), torch.arange(50)

    def passes(seed: int) -> list[list[int]]:
        loader = FeatureLoader(x, y, 50, True, torch.Generator().manual_seed(seed))
        return [next(iter(loader))["index"].tolist() for _ in range(2)]

    assert passes(1) == passes(1) != passes(2)
    assert passes(1)[0] != passes(1)[1]


@pytest.mark.parametrize(("x", "y", "size"), [(0, 0, 1), (2, 3, 1), (2, 2, 0)])
def test_loader_refuses_nonsense(x, y, size):
    with pytest.raises(ValueError):
        FeatureLoader(torch.zeros(x, 2), torch.zeros(y, dtype=torch.long), size)
