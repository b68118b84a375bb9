from __future__ import annotations

import csv
import io
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dassl.engine import TRAINER_REGISTRY
from hypothesis import given
from hypothesis import strategies as st
from made_results import ELEVEN, GAINS, write, write_failure, write_pair, write_transfer, write_world

import dfzsl.trainers  # noqa: F401
from dfzsl import report
from dfzsl.io.results import harmonic_mean, per_class_mean, read_results
from dfzsl.report import __main__ as command
from dfzsl.report.method_names import GLOSSARY, describe_method, glossary_markdown
from dfzsl.report.read_runs import MethodKey, Outcome, parse_log
from dfzsl.report.sections import Spread, average, published_summaries
from dfzsl.report.significance import bootstrap, difference_interval
from dfzsl.report.tables import tables
from dfzsl.utils.errors import UserError


def cells(root: Path) -> list[dict[str, str]]:
    """Return the first table below `root` as text, one dictionary per row."""
    table = tables(report.sections(report.collect(root))[0])[0]
    return [dict(zip(table.headers, (text.strip() for text in row), strict=True)) for row in table.texts()]


def notes(root: Path) -> list[str]:
    return report.sections(report.collect(root))[0].notes


@given(st.floats(0, 100), st.floats(0, 100))
def test_harmonic_mean_lies_between_its_arguments_and_below_their_mean(a, b):
    h = harmonic_mean(a, b)
    assert min(a, b) - 1e-9 <= h <= (a + b) / 2 + 1e-9


def test_both_averages_of_h(tmp_path):
    write_pair(tmp_path, "CoOp", 1, 90.0, 10.0)
    write_pair(tmp_path, "CoOp", 2, 10.0, 90.0)
    (row,) = cells(tmp_path)
    assert row["H"] == "50.0"
    assert row["mean of H"] == "18.0 ± 0.0"
    assert row["base"] == "50.0 ± 40.0"
    assert row["seconds"] == "2.0"
    assert (row["seeds"], row["trained parameters"], row["training images"], row["queries"]) == (
        "2",
        "2,048",
        "16",
        "0",
    )


def test_gzsl_scores_are_means_over_classes(tmp_path):
    rows = [
        {"class": "a", "correct": 9, "total": 10, "new": False},
        {"class": "b", "correct": 0, "total": 1, "new": False},
        {"class": "c", "correct": 1, "total": 4, "new": True},
    ]
    assert per_class_mean(rows[:2]) == 45.0
    write(tmp_path, "train_base", "CoOp", 1, 0.0)
    write(tmp_path, "test_all", "CoOp", 1, 0.0, per_class=rows)
    (row,) = cells(tmp_path)
    assert (row["seen S"], row["unseen U"], row["H"]) == ("45.0", "25.0", "32.1")


def test_average_is_of_data_sets_first_and_its_deviation_over_common_seeds():
    values = {("a", 1): 10.0, ("a", 2): 30.0, ("b", 1): 50.0, ("b", 2): 50.0, ("b", 3): 80.0}
    assert average(values) == Spread(mean=(20 + 60) / 2, deviation=5.0)
    assert average({("a", 1): 10.0}) == Spread(10.0, None)


def test_average_over_data_sets_by_both_conventions(tmp_path):
    for data, base, new in (("x", 90.0, 10.0), ("y", 10.0, 90.0)):
        write_pair(tmp_path, "CoOp", 1, base, new, data=data)
    sections = report.sections(report.collect(tmp_path))
    assert [section.title for section in sections] == ["Average over 2 data sets", "x", "y"]
    (row,) = sections[0].summaries
    assert row.h == 50.0
    assert row.mean_h == Spread(18.0, None)


def test_a_method_that_lacks_a_data_set_is_excluded_from_the_average_with_a_note(tmp_path):
    for data in ("x", "y"):
        write_pair(tmp_path, "CoOp", 1, 80.0, 60.0, data=data)
    write_pair(tmp_path, "DFZSL", 1, 80.0, 60.0, data="x")
    average_section = report.sections(report.collect(tmp_path))[0]
    assert [row.label for row in average_section.summaries] == ["CoOp"]
    (note,) = [note for note in average_section.notes if note.startswith("DFZSL: ")]
    assert note.endswith(" y")


def test_failed_unfinished_and_missing_seeds_have_notes(tmp_path):
    for seed in (1, 2, 3):
        write_pair(tmp_path, "DFZSL", seed, 80.0, 70.0)
    write_pair(tmp_path, "CoOp", 1, 80.0, 60.0)
    write_failure(tmp_path, "CoOp", 2, "loss is\nNaN\n")
    write(tmp_path, "train_base", "CoOp", 3, 80.0)
    failed, unfinished, missing = notes(tmp_path)
    assert failed.startswith("CoOp, seed 2") and "loss is NaN" in failed
    assert unfinished.startswith("CoOp, seed 3") and "test_new" in unfinished
    assert missing.startswith("CoOp: ") and "2, 3" in missing
    rows = {row["method"]: row["seeds"] for row in cells(tmp_path)}
    assert rows == {"CoOp": "1", "DFZSL": "3"}


def test_a_folder_with_failed_runs_only_reports_the_reasons(tmp_path, capsys):
    write_failure(tmp_path, "CoOp", 1, "no such file: images")
    command.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "no such file: images" in printed


def test_different_backbones_and_notes_of_runs_are_reported(tmp_path):
    write_pair(tmp_path, "CoOp", 1, 80.0, 60.0, backbone="RN50")
    write_pair(tmp_path, "DFZSL", 1, 80.0, 60.0, notes=["FLPT left out"])
    one, other, note = notes(tmp_path)
    assert one.startswith("CoOp: ") and "RN50" in one
    assert other.startswith("DFZSL: ") and "ViT-B-16" in other
    assert note == "DFZSL: FLPT left out"


def test_labels_contain_the_config_only_where_names_are_ambiguous(tmp_path):
    write_pair(tmp_path, "CoOp", 1, 80.0, 60.0, config="ep50")
    write_pair(tmp_path, "CoOp", 1, 80.0, 65.0, config="ep100")
    write_pair(tmp_path, "CoOp@virtual", 1, 80.0, 70.0)
    assert [row["method"] for row in cells(tmp_path)] == ["CoOp (virtual)", "CoOp [ep100]", "CoOp [ep50]"]


def test_the_best_comes_first(tmp_path):
    for method, new in (("CoOp", 40.0), ("DFZSL", 70.0), ("ZeroshotCLIP", 60.0)):
        write_pair(tmp_path, method, 1, 80.0, new)
    assert [row["method"] for row in cells(tmp_path)] == ["DFZSL", "CLIP", "CoOp"]


def test_transfer_has_a_mean_over_other_data_sets_and_one_over_shifted_sources(tmp_path):
    root = tmp_path / "xd"
    write(root, "train_all", "CoOp", 1, 70.0, data="imagenet")
    for data, accuracy in (("dtd", 40.0), ("eurosat", 50.0), ("imagenet_a", 20.0)):
        write(root, "test_all", "CoOp", 1, accuracy, data=data)
    (section,) = report.sections(report.collect(tmp_path))
    (row,) = section.summaries
    assert {name: score.mean for name, score in row.scores.items()} == {
        "source": 70.0,
        "other data sets": 45.0,
        "shifted source": 20.0,
    }
    summary, targets = tables(section)
    assert "H" not in summary.headers
    assert targets.texts() == [
        ["Average", "45.0"],
        ["DTD", "40.0"],
        ["EuroSAT", "50.0"],
        ["ImageNet-A", "20.0"],
    ]


def test_a_transfer_run_that_lacks_a_target_is_excluded(tmp_path):
    root = tmp_path / "xd"
    for seed, targets in ((1, ("dtd", "eurosat")), (2, ("dtd",))):
        write(root, "train_all", "CoOp", seed, 70.0, data="imagenet")
        for data in targets:
            write(root, "test_all", "CoOp", seed, 40.0, data=data)
    (note,) = notes(tmp_path)
    assert note.startswith("CoOp, seed 2") and "eurosat" in note


def test_published_results_agree_with_the_published_averages():
    """The means of the data sets' figures against the averages that the papers print."""
    ten = ["caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101"]
    ten += ["fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"]
    eleven = ["imagenet", *ten]
    printed = {
        "CLIP": (69.34, 74.22, 71.70),
        "CuPL": (72.56, 74.22, 73.38),
        "ProText": (72.95, 76.98, 74.91),
        "CoOp": (82.69, 63.22, 71.66),
        "CoCoOp": (80.47, 71.69, 75.83),
        "KgCoOp": (80.73, 73.60, 77.00),
        "ProGrad": (82.48, 70.75, 76.16),
        "MaPLe": (82.28, 75.14, 78.55),
        "PromptSRC": (84.26, 76.10, 79.97),
        "TCP": (84.13, 75.36, 79.51),
        "CoPrompt": (84.00, 77.23, 80.48),
    }
    rows = {row.label: row for row in published_summaries("base2new", eleven, set())}
    assert rows.keys() == {f"{name} (published)" for name in printed}
    for name, (base, new, h) in printed.items():
        row = rows[f"{name} (published)"]
        assert [row.scores["base"].mean, row.scores["new"].mean, row.h] == pytest.approx(
            [base, new, h], abs=0.011
        )
        assert row.source
    transfer = {row.label: row for row in published_summaries("xd", ["imagenet"], set(ten))}
    ten_targets = {
        "CLIP": 65.15,
        "CoOp": 63.88,
        "CoCoOp": 65.74,
        "PromptSRC": 65.81,
        "MaPLe": 66.30,
        "ProText": 67.23,
    }
    assert {name: transfer[f"{name} (published)"].headline.mean for name in ten_targets} == pytest.approx(
        ten_targets, abs=0.006
    )


def test_published_results_are_marked(tmp_path):
    write_pair(tmp_path, "CoOp", 1, 80.0, 60.0, data="dtd", backbone="ViT-B-32")
    parts = report.sections(report.collect(tmp_path), published=True)
    text = report.FORMATS["terminal"](parts)
    assert re.search(r"^CoCoOp \(published\) +77.0 +56.0 +64.8", text, re.MULTILINE)
    assert "CoCoOp (published), base-to-new: Zhou et al." in text
    assert "KgCoOp (published)" not in text  # only its average over all data sets is known
    assert "ViT-B/16" in text and "ViT-B-32" in text
    assert (
        "published"
        not in report.FORMATS["terminal"](report.sections(report.collect(tmp_path))).split("H:")[0]
    )


LOG = """***************
** Config **
# train_x  1,600
epoch [1/50] batch [5/25] time 0.1 (0.2) loss 1.2
=> result
* total: 10
* accuracy: 11.0%
{end}
Deploy the last-epoch model
Evaluate on the *test* set
=> result
* total: 1,200
* correct: 918
* accuracy: 76.5%
* macro_f1: 76.0%
Elapsed: 1 day, 0:01:02
"""


@pytest.mark.parametrize("end", ["Finish training", "Finished training"])
def test_a_log_of_training_gives_the_test_after_its_end(end):
    results = parse_log(LOG.format(end=end))
    assert results["accuracy"] == 76.5
    assert results["seconds"] == {"train": 86462}
    assert results["images_used"] == 1600


def test_a_log_that_breaks_off_has_no_result_although_it_holds_validation_accuracies():
    assert parse_log(LOG.split("{end}")[0]) is None
    assert parse_log("") is None
    assert parse_log("=> result\n* accuracy: 61.25%\n* error: 38.75%")["accuracy"] == 61.25


def test_a_log_with_counts_gives_exact_accuracies_and_rows_of_classes():
    counts = "=> result\n* total: 1,201\n* correct: 919\n* accuracy: 76.5%\n=> per-class result\n"
    rows = "* class: 0 (a (big) cat)\ttotal: 1,200\tcorrect: 918\tacc: 76.5%\n* class: 1 (ox)\ttotal: 1"
    results = parse_log(f"{LOG.format(end='Finish training')}{counts}{rows}\tcorrect: 1\tacc: 100.0%\n")
    assert results["accuracy"] == 100 * 919 / 1201
    assert results["per_class"] == [
        {"class": "a (big) cat", "correct": 918, "total": 1200, "new": False},
        {"class": "ox", "correct": 1, "total": 1, "new": False},
    ]
    # Counts that belong to something else do not stand in for what is printed.
    assert parse_log("=> result\n* total: 10\n* correct: 3\n* accuracy: 61.25%")["accuracy"] == 61.25


@given(st.text())
def test_parse_log_accepts_any_text(text):
    parse_log(text)
    parse_log(LOG.format(end=text))


def test_logs_of_coop_go_into_the_same_tables(tmp_path, capsys):
    mine, theirs = tmp_path / "output", tmp_path / "coop" / "output"
    write_pair(mine / "base2new", "DFZSL", 1, 80.0, 70.0)
    for seed in (1, 2):
        for part in ("train_base", "test_new"):
            folder = theirs / "base2new" / part / "animals/shots_16/CoCoOp/vit" / f"seed{seed}"
            folder.mkdir(parents=True)
            (folder / "log.txt").write_text(LOG.split("{end}")[0] if part == "train_base" else LOG)
            if seed == 1:
                (folder / "log.txt-2022-01-01-00-00-00").write_text(LOG.format(end="Finish training"))
    (theirs / "base2new/test_new/animals/shots_16/CoCoOp/vit/seed2/log.txt").write_text("* accuracy: 1.0%")
    command.main([str(mine), "--logs", str(theirs)])
    printed = capsys.readouterr().out
    assert re.search(
        r"^CoCoOp \(log\) +76.5 +76.5 +76.5 +– +76.5 +16 +1 +86,462 +– +1,600 +–", printed, re.MULTILINE
    )
    assert re.search(r"^.*CoCoOp \(log\), seed 2.*log\.txt", printed, re.MULTILINE)
    command.main(["--logs", str(theirs)])
    assert "queries" not in capsys.readouterr().out.split("Accuracies")[0]


@pytest.mark.parametrize(
    ("text", "fact"), [('{"schema": 0}', "schema 0"), ("[]", r"results\.json"), ("{", r"results\.json")]
)
def test_other_files_are_refused(tmp_path, text, fact):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=fact):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"accuracy": "high"}, "accuracy"),
        ({"accuracy": float("nan")}, "accuracy"),
        ({"queries": None}, "queries"),
        ({"per_class": [{"class": "cat"}]}, "per_class"),
        ({"per_class": ["cat"]}, "per_class"),
        ({"seconds": {"train": "long"}}, "seconds"),
    ],
)
def test_an_invalid_results_file_is_reported_with_its_field(tmp_path, change, field):
    write(tmp_path, "train_base", "CoOp", 1, **({"accuracy": 50.0} | change))
    with pytest.raises(UserError, match=rf"results\.json.*{field}"):
        report.collect(tmp_path)


@pytest.mark.parametrize("where", [".", "nowhere"])
def test_a_folder_without_results_is_reported(tmp_path, where):
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match=str(tmp_path)):
        report.collect(tmp_path / where)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_command_line_reports_an_error_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("dfzsl.report", run_name="__main__")
    assert exit_.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line


def test_two_sources_in_one_transfer_folder_are_refused(tmp_path):
    for data in ("imagenet", "sun397"):
        write(tmp_path / "xd", "train_all", "CoOp", 1, 70.0, data=data)
    with pytest.raises(UserError, match="imagenet, sun397"):
        report.collect(tmp_path)


def test_csv_has_plain_numbers(tmp_path):
    write_world(tmp_path / "base2new", datasets=("x", "y"))
    parts = report.sections(report.collect(tmp_path))
    rows = list(csv.DictReader(io.StringIO(report.FORMATS["csv"](parts))))
    assert len(rows) == 9
    for row, summary in zip(rows, (s for part in parts for s in part.summaries), strict=True):
        assert float(row["base"]) == pytest.approx(summary.scores["base"].mean, abs=1e-4)
        assert float(row["base sd"]) == pytest.approx(summary.scores["base"].deviation, abs=1e-4)
        assert float(row["H"]) == pytest.approx(summary.h, abs=1e-4)
        assert row["seeds"] == "1 2 3"


def test_a_narrow_terminal_shows_fewer_columns(tmp_path):
    write_world(tmp_path)
    parts = report.sections(report.collect(tmp_path))
    whole, narrow = (report.FORMATS["terminal"](parts, width=width) for width in (200, 60))
    for column in ("base", "new", "H"):
        assert re.search(rf"\b{column}\b", narrow.split("\n\n")[1])
    assert len(narrow.split("\n\n")[1].splitlines()[0]) <= 60 < len(whole.split("\n\n")[1].splitlines()[0])


def test_latex_and_markdown_hold_every_number_of_the_terminal(tmp_path):
    write_world(tmp_path)
    write_failure(tmp_path, "Co_Op", 1, "50% & more")
    parts = report.sections(report.collect(tmp_path))
    terminal, markdown, latex = (report.FORMATS[name](parts) for name in ("terminal", "markdown", "latex"))
    numbers = re.findall(r"\d+\.\d ± \d+\.\d", terminal)
    assert len(numbers) == 9
    for number in numbers:
        mean, deviation = number.split(" ± ")
        assert number in markdown
        assert re.search(rf"{mean}}}? ?{{\\,\\scriptsize\$\\pm\${deviation}}}", latex)
    outside_comments = [line for line in latex.splitlines() if not line.startswith("%")]
    assert all("%" not in line and "±" not in line for line in outside_comments)
    assert "50% & more" in latex


def test_data_sets_stand_in_the_order_of_papers_after_their_average(tmp_path, capsys):
    write_world(tmp_path / "base2new", datasets=[*ELEVEN, "aardvarks"], classes=4, seeds=(1, 2))
    papers = ["ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "Flowers102", "Food101", "FGVCAircraft"]
    papers += ["SUN397", "DTD", "EuroSAT", "UCF101", "aardvarks"]
    parts = report.sections(report.collect(tmp_path))
    assert [part.title for part in parts] == ["Average over 12 data sets", *papers]
    _, table = tables(parts[0])
    assert table.headers == ["data set", "score", *(row.label for row in parts[0].summaries)]
    assert [row[0] for row in table.rows] == [x for name in ["Average", *papers] for x in (name, "", "")]
    assert [row[1] for row in table.rows[:6]] == ["base", "new", "H"] * 2
    for column, label in enumerate(table.headers[2:], 2):
        for score in ("base", "new", "H"):
            values = [row[column].mean for row in table.rows if row[1] == score]
            of_two = harmonic_mean(table.rows[0][column].mean, table.rows[1][column].mean)
            assert values[0] == pytest.approx(of_two if score == "H" else sum(values[1:]) / 12)
            row = next(row for row in parts[0].summaries if row.label == label)
            assert values[0] == pytest.approx(row.h if score == "H" else row.scores[score].mean)
    command.main([str(tmp_path), "--format", "markdown"])
    assert re.search(r"^\| Average +\| +base", capsys.readouterr().out, re.MULTILINE)


class TestSignificance:
    """The bootstrap against closed forms, and the bold marks that it decides."""

    def one(self, root: Path, **accuracies: list[list[int]]):
        """Write results of methods, given as correct answers per seed and base class out of 100."""
        for method, by_seed in accuracies.items():
            for seed, correct in enumerate(by_seed, 1):
                rows = [
                    {"class": f"c{i}", "correct": c, "total": 100, "new": False}
                    for i, c in enumerate(correct)
                ]
                for part in ("train_base", "test_new"):
                    write(root, part, method, seed, sum(correct) / len(correct), per_class=rows)
        (section,) = report.sections(report.collect(root))
        return section

    def test_the_deviation_is_that_of_a_mean_over_classes(self, tmp_path):
        rng = np.random.default_rng(1)
        correct = rng.integers(20, 90, 200)
        section = self.one(
            tmp_path, CoOp=[correct.tolist()], FLPT=[(correct - rng.integers(0, 9, 200)).tolist()]
        )
        draws = section.draws["CoOp"]["base"]
        assert draws.mean() == pytest.approx(correct.mean(), abs=0.3)
        assert draws.std() == pytest.approx(correct.std() / 200**0.5, rel=0.06)

    def test_seeds_add_variance(self, tmp_path):
        """Two crossed factors without interaction: the variances of their means add up."""
        seeds, classes = np.array([-4, -1, 0, 2, 3]), np.linspace(30, 70, 41).round()
        correct = (classes + seeds[:, None]).astype(int)
        draws = self.one(tmp_path, CoOp=correct.tolist()).draws["CoOp"]["base"]
        expected = classes.var() / 41 + seeds.var() / 5
        assert draws.var() == pytest.approx(expected, rel=0.1)

    def test_class_difficulty_cancels_in_a_difference(self, tmp_path):
        correct = np.random.default_rng(2).integers(10, 90, 30)
        section = self.one(tmp_path, CoOp=[correct.tolist()], FLPT=[(correct - 1).tolist()])
        assert difference_interval(
            section.draws["CoOp"]["base"], section.draws["FLPT"]["base"]
        ) == pytest.approx((1, 1))
        assert tables(section)[0].rows[1][4] == "−1.0 [−1.0, −1.0]"

    def test_intervals_have_their_nominal_coverage(self):
        rng = np.random.default_rng(3)
        covered = 0
        for trial in range(60):
            runs = {}
            for label, gain in (("a", 0), ("b", 5)):
                rows = [
                    {"class": str(i), "correct": int(c), "total": 1000, "new": False}
                    for i, c in enumerate(np.clip(rng.normal(500 + 10 * gain, 80, 60), 0, 1000))
                ]
                parts = {part: {"per_class": rows} for part in ("train_base", "test_new")}
                runs[label] = [Outcome("base2new", f"set {trial}", MethodKey(label, "16", "x"), 1, parts)]
            found = bootstrap(runs)
            low, high = difference_interval(found["b"]["base"], found["a"]["base"])
            covered += low <= 5 <= high
        assert 0.85 <= covered / 60 < 1

    def test_only_a_significant_lead_is_bold(self, tmp_path):
        base = np.random.default_rng(4).integers(30, 60, 40)
        noisy = base + np.random.default_rng(5).integers(-20, 21, 40)
        section = self.one(
            tmp_path, CoOp=[(base + 20).tolist()], FLPT=[base.tolist()], KgCoOp=[noisy.tolist()]
        )
        ranks = {row[0]: row[1].rank for row in tables(section)[0].rows}
        assert ranks.pop("CoOp") == 1 and sorted(ranks.values()) == [0, 2]
        near = self.one(tmp_path / "near", FLPT=[base.tolist()], KgCoOp=[noisy.tolist()])
        assert [row[1].rank for row in tables(near)[0].rows] == [2, 2]

    def test_equal_methods_are_tied(self, tmp_path):
        section = self.one(tmp_path, CoOp=[[50, 60]], FLPT=[[50, 60]], KgCoOp=[[20, 30]])
        assert {row[0]: row[1].rank for row in tables(section)[0].rows} == {"CoOp": 2, "FLPT": 2, "KgCoOp": 0}

    def test_without_classes_or_a_common_seed_nothing_is_bold(self, tmp_path):
        write_pair(tmp_path, "CoOp", 1, 80.0, 60.0)
        write_pair(tmp_path, "FLPT", 2, 70.0, 50.0)
        (section,) = report.sections(report.collect(tmp_path))
        assert section.draws == {}
        assert [row[1].rank for row in tables(section)[0].rows] == [2, 2]
        assert tables(section)[0].rows[1][4] == "−10.2"  # of H

    @pytest.mark.parametrize("style", ["terminal", "markdown", "latex"])
    def test_every_format_marks_alike(self, tmp_path, style):
        section = self.one(tmp_path, CoOp=[[60, 70, 80]], FLPT=[[50, 60, 70]])
        wide = {"width": 200} if style == "terminal" else {}
        text = report.FORMATS[style]([section], **wide)
        bold, underlined = {
            "terminal": ("\x1b[1m70.0", "\x1b[4m60.0"),
            "markdown": ("**70.0", "<ins>60.0"),
            "latex": (r"\bfseries 70.0", r"\underline{60.0}"),
        }[style]
        assert bold in text and underlined in text
        assert "\x1b" not in report.FORMATS["terminal"]([section])


TEX = next(filter(None, map(shutil.which, ("pdflatex", "tectonic"))), None)


@pytest.mark.slow
@pytest.mark.skipif(TEX is None, reason="neither pdflatex nor tectonic is installed")
def test_latex_compiles(tmp_path):
    write_world(tmp_path / "base2new", datasets=("imagenet", "dtd"), methods=list(GAINS))
    write_failure(tmp_path / "base2new", r"A_b&%$#{}~^\x", 1, "50% & more", data="dtd")
    write_transfer(tmp_path / "xd")
    tabulars = report.FORMATS["latex"](report.sections(report.collect(tmp_path), published=True))
    head = r"\documentclass{article}\usepackage{booktabs, siunitx}\begin{document}"
    (tmp_path / "page.tex").write_text(f"{head}\n{tabulars}\n\\end{{document}}\n", encoding="utf-8")
    quiet = ["-halt-on-error", "-interaction=nonstopmode"] if "pdflatex" in Path(TEX).name else []
    ran = subprocess.run([TEX, *quiet, "page.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert (tmp_path / "page.pdf").stat().st_size > 1000


class TestNames:
    def test_every_trainer_has_a_name_of_its_own(self):
        # Dassl registers trainers of its own, which no table here has.
        names = TRAINER_REGISTRY.registered_names()
        ours = {name for name in names if TRAINER_REGISTRY.get(name).__module__.startswith("dfzsl.")}
        assert {"CoOp", "FLPT"} <= ours and ours - {"DFZSL"} <= GLOSSARY["methods"].keys()
        shown = [entry["name"] for entry in GLOSSARY["methods"].values()]
        assert len(shown) == len(set(shown))

    def test_two_trainers_of_one_name_have_different_labels(self, tmp_path):
        write_pair(tmp_path, "ZeroshotCLIP", 1, 80.0, 60.0)
        write_pair(tmp_path, "CLIP", 1, 70.0, 60.0)
        assert [row["method"] for row in cells(tmp_path)] == ["CLIP [ZeroshotCLIP]", "CLIP [CLIP]"]

    def test_the_papers_recipe_has_a_name(self, tmp_path):
        write_pair(tmp_path, "DFZSL", 1, 80.0, 60.0, config="dfzsl")
        write_pair(tmp_path, "DFZSL", 1, 70.0, 60.0, config="paper")
        assert [row["method"] for row in cells(tmp_path)] == ["DFZSL", "DFZSL (paper)"]
        assert "Tang" in describe_method("DFZSL (paper)") and describe_method("DFZSL [x]") == describe_method(
            "DFZSL"
        )

    def test_the_documentation_is_current(self):
        page = Path(__file__).parents[1] / "docs/glossary.md"
        assert page.read_text(encoding="utf-8") == glossary_markdown(), (
            "python -m dfzsl.report --glossary > docs/glossary.md"
        )
