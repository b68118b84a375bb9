"""The states of all global random generators, as plain numbers and tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["get_random_state", "set_random_state"]


def get_random_state() -> dict[str, Any]:
    """The states of Python's random, numpy's global generator and torch's on the CPU and every CUDA device.

    Loads with torch.load(weights_only=True) when saved.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `get_random_state` gave; CUDA's only where there are as many devices now.

    Raises ValueError or TypeError for what is no such state.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), None if gauss is None else float(gauss)))
    kind, keys, position, has_gauss, cached = state["numpy"]
    if len(keys) != 624 or not 0 <= position <= 624:
        # numpy would read memory from there.
        raise ValueError(f"numpy's generator has no place {position} in {len(keys)} words")
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
