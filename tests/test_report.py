from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfzsl import report
from dfzsl.errors import UserError
from dfzsl.results import harmonic_mean, per_class_mean, read_results


def write(root: Path, part: str, method: str, seed: int, accuracy: float, **changes) -> Path:
    folder = root / part / "animals" / "shots_16" / method / "vit" / f"seed{seed}"
    folder.mkdir(parents=True)
    results = {
        "schema": 1,
        "accuracy": accuracy,
        "per_class": [],
        "trained_parameters": 2048,
        "images_used": 16,
        "queries": 0,
        "seconds": {"train": 1.5},
        "notes": [],
    }
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


@given(st.floats(0, 100), st.floats(0, 100))
def test_harmonic_mean_lies_between_its_arguments_and_below_their_mean(a, b):
    h = harmonic_mean(a, b)
    assert min(a, b) - 1e-9 <= h <= (a + b) / 2 + 1e-9


def test_both_averages_of_h(tmp_path):
    for seed, base, new in ((1, 90.0, 10.0), (2, 10.0, 90.0)):
        write(tmp_path, "train_base", "CoOp", seed, base)
        write(tmp_path, "test_new", "CoOp", seed, new)
    headers, (row,), _ = report.table(report.collect(tmp_path), ("base", "new"))
    assert row[headers.index("H")] == "50.0"
    assert row[headers.index("mean of H")] == "18.0 ± 0.0"
    assert row[headers.index("base")] == "50.0 ± 40.0"


def test_gzsl_scores_are_means_over_classes(tmp_path):
    rows = [
        {"class": "a", "correct": 9, "total": 10, "new": False},
        {"class": "b", "correct": 0, "total": 1, "new": False},
        {"class": "c", "correct": 1, "total": 4, "new": True},
    ]
    assert per_class_mean(rows[:2]) == 45.0
    write(tmp_path, "train_base", "CoOp", 1, 0.0)
    write(tmp_path, "test_all", "CoOp", 1, 0.0, per_class=rows)
    (outcome,) = report.collect(tmp_path)
    assert outcome.scores() == (45.0, 25.0)


def test_a_failed_seed_is_named_and_not_averaged_silently(tmp_path, capsys):
    write(tmp_path, "train_base", "CoOp", 1, 80.0)
    write(tmp_path, "test_new", "CoOp", 1, 60.0)
    failed = tmp_path / "train_base" / "animals" / "shots_16" / "CoOp" / "vit" / "seed2"
    failed.mkdir()
    (failed / "failed.txt").write_text("loss is NaN\n")
    report.show(tmp_path)
    printed = capsys.readouterr().out
    assert "CoOp, seed 2: failed and left out: loss is NaN" in printed
    assert "68.6" in printed


def test_rows_are_in_order_of_h(tmp_path):
    for method, new in (("CoOp", 40.0), ("DFZSL", 70.0), ("ZeroshotCLIP", 60.0)):
        write(tmp_path, "train_base", method, 1, 80.0)
        write(tmp_path, "test_new", method, 1, new)
    _, rows, _ = report.table(report.collect(tmp_path), ("base", "new"))
    assert [row[0] for row in rows] == ["CoOp", "ZeroshotCLIP", "DFZSL"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 0}', "schema 0, this version reads 1"),
        ("[]", "not a results file"),
        ("{", "not a JSON file"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_results(tmp_path / "results.json")


def test_an_empty_folder_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="no results here"):
        report.collect(tmp_path)
