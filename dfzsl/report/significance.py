"""Compute confidence intervals of differences between methods by a paired bootstrap over seeds and classes.

Each draw resamples seeds and classes with replacement, with the same resample for every method, so that the
difficulty of classes cancels in differences (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from .read_runs import PAIRED, TRANSFER, Outcome, transfer_scores

NUM_DRAWS = 2000
TAIL_PERCENT = 2.5  # of the draws, on either side of a 95 % interval

# label -> name of a score, "H" or target -> (NUM_DRAWS,) in percent
Draws = dict[str, dict[str, np.ndarray]]


def bootstrap(outcomes: dict[str, list[Outcome]]) -> Draws:
    """Return bootstrap draws of every score of every method on one data set.

    Args:
        outcomes: finished runs of each method, by label.

    Returns:
        Draws by label and score. Methods without results of single classes (logs) are missing. Empty if the
        methods share no seed, were tested on different classes, or have only one seed and one class.
    """
    comparable = {
        label: runs for label, runs in outcomes.items() if all(all(run.classes().values()) for run in runs)
    }
    seeds_by_method = [{run.seed for run in runs} for runs in comparable.values()]
    seeds = set.intersection(*seeds_by_method) if seeds_by_method else set()
    if not seeds:
        return {}
    runs = {
        label: [run for run in sorted(all_runs, key=lambda run: run.seed) if run.seed in seeds]
        for label, all_runs in comparable.items()
    }
    dataset = next(iter(runs.values()))[0].dataset
    rng = np.random.default_rng(zlib.crc32(dataset.encode()))  # different draws for each data set
    seed_weights = _resample(rng, len(seeds))
    result: Draws = {label: {} for label in runs}
    for name in next(iter(runs.values()))[0].classes():
        counts = {label: [_counts(run, name) for run in method_runs] for label, method_runs in runs.items()}
        classes = sorted(next(iter(counts.values()))[0])
        same = all(sorted(table) == classes for tables in counts.values() for table in tables)
        if not same or not classes or len(seeds) * len(classes) < 2:
            return {}
        class_weights = _resample(rng, len(classes))
        for label, tables in counts.items():
            array = np.array([[table[key] for key in classes] for table in tables])  # (seeds, classes, 2)
            correct, total = np.einsum("ds,sck,dc->kd", seed_weights, array, class_weights, optimize=True)
            result[label][name] = 100 * correct / total
    protocol = next(iter(runs.values()))[0].protocol
    return {label: _with_means(protocol, dataset, scores) for label, scores in result.items()}


def _resample(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return (NUM_DRAWS, n): how often each draw has each of n items."""
    return rng.multinomial(n, np.full(n, 1 / n), NUM_DRAWS)


def _counts(run: Outcome, name: str) -> dict[str, tuple[float, float]]:
    """Return (correct, total) by class; for GZSL, whose scores are means over classes, (accuracy, 1)."""
    rows = [row for row in run.classes()[name] if row["total"]]
    by_class = run.protocol == "gzsl"
    return {
        row["class"]: (row["correct"] / row["total"], 1) if by_class else (row["correct"], row["total"])
        for row in rows
    }


def _with_means(protocol: str, dataset: str, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the scores with those that are computed from others."""
    if protocol in TRANSFER:
        targets = {name: values for name, values in scores.items() if name != "source"}
        return scores | transfer_scores(dataset, scores["source"], targets)
    if protocol not in PAIRED:
        return scores
    first, second = scores.values()
    return scores | {"H": 2 * first * second / np.maximum(first + second, 1e-9)}


def average_draws(protocol: str, by_dataset: Sequence[Draws]) -> Draws:
    """Return draws of the averages over data sets, for methods that have draws on each of them."""
    result = {}
    for label in [label for label in by_dataset[0] if all(label in draws for draws in by_dataset)]:
        names = [name for name in by_dataset[0][label] if name != "H"]
        means = {name: np.mean([draws[label][name] for draws in by_dataset], axis=0) for name in names}
        result[label] = _with_means(protocol, "", means)
    return result


def difference_interval(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of `one` - `other`, both (NUM_DRAWS,) in percent."""
    low, high = np.percentile(one - other, [TAIL_PERCENT, 100 - TAIL_PERCENT])
    return float(low), float(high)
