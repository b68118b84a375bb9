"""Running averages for the log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["AverageMeter", "MetricMeter"]


class AverageMeter:
    """The last value `val` and the average `avg` so far: the mean, or with `ema` 0.9 avg + 0.1 val."""

    def __init__(self, ema: bool = False) -> None:
        self.ema = ema
        self.reset()

    def reset(self) -> None:
        self.val: float = 0
        self.avg: float = 0
        self.sum: float = 0
        self.count: float = 0

    def update(self, val: Any, n: int = 1) -> None:
        """Add a value (a number or a one-element tensor) that stands for `n` items."""
        if isinstance(val, torch.Tensor):
            val = val.item()
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.avg * 0.9 + self.val * 0.1 if self.ema else self.sum / self.count


class MetricMeter:
    """One AverageMeter a name; `str` gives "name val (avg)" for each, four decimals.

    >>> meter = MetricMeter()
    >>> meter.update({"loss": 2.0, "acc": 50.0})
    >>> print(meter)
    loss 2.0000 (2.0000) acc 50.0000 (50.0000)
    """

    def __init__(self, delimiter: str = " ") -> None:
        self.meters: defaultdict[str, AverageMeter] = defaultdict(AverageMeter)
        self.delimiter = delimiter

    def update(self, input_dict: Mapping[str, Any] | None) -> None:
        """Add one value a name; None adds nothing."""
        if input_dict is None:
            return
        if not isinstance(input_dict, Mapping):
            raise TypeError("Input to MetricMeter.update() must be a dictionary")
        for name, value in input_dict.items():
            self.meters[name].update(value)

    def __str__(self) -> str:
        return self.delimiter.join(f"{n} {m.val:.4f} ({m.avg:.4f})" for n, m in self.meters.items())
