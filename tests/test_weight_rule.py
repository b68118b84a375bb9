"""benchmarks/weight_rule.py: the regression behind the teacher's weight finds a rule that is known."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def rule(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import weight_rule

    return weight_rule


def cells_of(rule, truth, count=120, seed=0):
    """Cells whose best ln g follows `truth` (1 + k,) exactly; H falls off as a parabola around it."""
    rng = np.random.default_rng(seed)
    seen = rng.uniform(0, 1, (count, len(truth) - 1))
    best = truth[0] + seen @ truth[1:]
    h = 80 - 2 * (rule.GRID[None] - best[:, None]) ** 2
    names = [f"set{index % 3}" for index in range(count)]
    free = np.full(len(rule.BASELINES), 70.0)
    return [rule.Cell(*parts, free) for parts in zip(names, map(tuple, seen), h, strict=True)]


@pytest.mark.parametrize("truth", [(-2.0, 1.5, -1.0), (-3.0, 1.0, 2.0, 0.5)])
def test_the_regression_finds_the_rule_that_the_best_weights_follow(rule, truth):
    cells = cells_of(rule, np.array(truth))
    h, seen = np.stack([cell.h for cell in cells]), np.array([cell.seen for cell in cells])
    found = rule.fit(h, seen, np.ones(len(cells)))
    np.testing.assert_allclose(found, truth, atol=0.1)
    loss = 80 - rule.value(h, found[0] + seen @ found[1:]).mean()
    assert loss < 0.15


def test_values_between_weights_of_the_grid_are_interpolated_and_outside_held(rule):
    h = np.tile(np.arange(len(rule.GRID), dtype=float), (3, 1))
    middle = (rule.GRID[4] + rule.GRID[5]) / 2
    np.testing.assert_allclose(
        rule.value(h, np.array([middle, -99.0, 99.0])), [4.5, 0.0, len(rule.GRID) - 1], atol=2e-3
    )


def test_a_set_is_tried_with_numbers_that_it_had_no_part_in(rule):
    cells = cells_of(rule, np.array([-2.0, 1.0, 1.0]))
    odd = [rule.Cell("odd", cell.seen, cell.h[::-1].copy(), cell.free) for cell in cells]
    lines = [line.split("|") for line in rule.table(cells + odd).splitlines()]
    left_out, fitted, _, best = next(
        [float(v) for v in line[2:6]] for line in lines if "odd" in str(line[1:2])
    )
    assert left_out < fitted < best


@pytest.mark.slow
def test_the_command_prints_the_rule_with_and_without_a_geometry(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for name in ("one", "two"):
        means = rng.normal(size=(12, 16))
        labels = np.repeat(np.arange(12), 8)
        features = {"text": means + 0.5 * rng.normal(size=means.shape)}
        for part in ("val", "test"):
            features[f"x_{part}"] = means[labels] + rng.normal(size=(96, 16))
            features[f"y_{part}"] = labels
        files.append(tmp_path / f"{name}.npz")
        np.savez(files[-1], classnames=np.array([f"c{i}" for i in range(12)]), **features)
    other = tmp_path / "other.npz"
    np.savez(other, x=rng.normal(size=(200, 16)))
    command = [sys.executable, str(BENCHMARKS / "weight_rule.py"), *map(str, files), "--splits", "1"]
    ran = subprocess.run([*command, "--geometry", str(other)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(" left out |") == 2 and ran.stdout.count("| two ") == 2
    alone = subprocess.run([*command[:3]], capture_output=True, text=True)
    assert alone.returncode == 2 and "name two or more" in alone.stderr
