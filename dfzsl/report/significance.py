"""What is noise: differences between methods, bootstrapped over seeds and classes, paired.

One draw takes seeds and classes with replacement, the same for every method: what is hard for all of them
cancels in a difference (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from .read_runs import PAIRED, TRANSFER, Outcome, transfer_scores

DRAWS = 2000
TAIL = 2.5  # percent of the draws on either side of an interval

Draws = dict[str, dict[str, np.ndarray]]  # label -> score, "H", target -> (DRAWS,) in percent


def draws(runs: dict[str, list[Outcome]]) -> Draws:
    """Draws of every score of every method on one data set.

    A method whose results do not tell its classes (a log) is left out. Empty where no noise is known: where
    methods share no seed, were not tested on the same classes, or there is but one seed and one class.
    """
    told = {label: of for label, of in runs.items() if all(all(run.classes().values()) for run in of)}
    shared = set.intersection(*({run.seed for run in found} for found in told.values())) if told else set()
    if not shared:
        return {}
    runs = {
        label: [run for run in sorted(found, key=lambda run: run.seed) if run.seed in shared]
        for label, found in told.items()
    }
    dataset = next(iter(runs.values()))[0].dataset
    rng = np.random.default_rng(zlib.crc32(dataset.encode()))  # no data set's draws repeat another's
    of_seeds = _drawn(rng, len(shared))
    made: Draws = {label: {} for label in runs}
    for name in next(iter(runs.values()))[0].classes():
        counts = {label: [_counts(run, name) for run in found] for label, found in runs.items()}
        classes = sorted(next(iter(counts.values()))[0])
        same = all(sorted(table) == classes for tables in counts.values() for table in tables)
        if not same or not classes or len(shared) * len(classes) < 2:
            return {}
        of_classes = _drawn(rng, len(classes))
        for label, tables in counts.items():
            array = np.array([[table[key] for key in classes] for table in tables])  # (seeds, classes, 2)
            correct, total = np.einsum("ds,sck,dc->kd", of_seeds, array, of_classes, optimize=True)
            made[label][name] = 100 * correct / total
    protocol = next(iter(runs.values()))[0].protocol
    return {label: _with_means(protocol, dataset, scores) for label, scores in made.items()}


def _drawn(rng: np.random.Generator, n: int) -> np.ndarray:
    """(DRAWS, n): how often each draw has each of n things."""
    return rng.multinomial(n, np.full(n, 1 / n), DRAWS)


def _counts(run: Outcome, name: str) -> dict[str, tuple[float, float]]:
    """(correct, total) by class; of GZSL, whose scores are means over classes, (accuracy, 1)."""
    rows = [row for row in run.classes()[name] if row["total"]]
    by_class = run.protocol == "gzsl"
    return {
        row["class"]: (row["correct"] / row["total"], 1) if by_class else (row["correct"], row["total"])
        for row in rows
    }


def _with_means(protocol: str, dataset: str, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The scores that are means of others, beside them."""
    if protocol in TRANSFER:
        targets = {name: drawn for name, drawn in scores.items() if name != "source"}
        return scores | transfer_scores(dataset, scores["source"], targets)
    if protocol not in PAIRED:
        return scores
    first, second = scores.values()
    return scores | {"H": 2 * first * second / np.maximum(first + second, 1e-9)}


def averaged(protocol: str, of: Sequence[Draws]) -> Draws:
    """Draws of the averages over data sets, of the methods that have them for each."""
    made = {}
    for label in [label for label in of[0] if all(label in found for found in of)]:
        names = [name for name in of[0][label] if name != "H"]
        means = {name: np.mean([found[label][name] for found in of], axis=0) for name in names}
        made[label] = _with_means(protocol, "", means)
    return made


def interval(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """What holds all draws of `one` - `other` but TAIL percent on either side."""
    low, high = np.percentile(one - other, [TAIL, 100 - TAIL])
    return float(low), float(high)
