from __future__ import annotations

import csv
import io
import json
import random
import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfzsl import report
from dfzsl.errors import UserError
from dfzsl.report import __main__ as command
from dfzsl.report.outcomes import parse_log
from dfzsl.report.tables import Spread, average, published_summaries, tables
from dfzsl.results import harmonic_mean, per_class_mean, read_results


def write(
    root: Path, part: str, method: str, seed: int, accuracy: float, data: str = "animals", **changes
) -> Path:
    """One run's results.json as a trainer writes it, below a protocol's folder."""
    config = changes.pop("config", "vit")
    folder = root / part / data / "shots_16" / method / config / f"seed{seed}"
    folder.mkdir(parents=True)
    results = {
        "schema": 1,
        "backbone": "ViT-B-16",
        "accuracy": accuracy,
        "per_class": [],
        "trained_parameters": 2048,
        "images_used": 16,
        "queries": 0,
        "seconds": {"train": 1.5, "recovery": 0.5},
        "notes": [],
        "versions": {"dfzsl": "0.1.0"},
    }
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


def write_pair(root: Path, method: str, seed: int, base: float, new: float, **changes) -> None:
    write(root, "train_base", method, seed, base, **changes)
    write(root, "test_new", method, seed, new, **changes)


def write_failure(root: Path, method: str, seed: int, text: str, data: str = "animals") -> None:
    folder = root / "train_base" / data / "shots_16" / method / "vit" / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "failed.txt").write_text(text)


def write_world(root: Path, datasets=("animals",), classes: int = 6, names="class {}") -> None:
    """Three methods with three seeds, classes, curves and concentrations."""
    rng = random.Random(0)
    for data in datasets:
        for method, level in (("ZeroshotCLIP", 60), ("CoOp", 50), ("DFZSL", 70)):
            for seed in (1, 2, 3):
                for part in ("train_base", "test_new"):
                    rows = [
                        {"class": names.format(i), "correct": rng.randint(level - 20, 90), "total": 100}
                        | {"new": part == "test_new"}
                        for i in range(classes)
                    ]
                    accuracy = sum(row["correct"] for row in rows) / classes
                    extra = {}
                    if method == "DFZSL" and part == "train_base":
                        extra["curves"] = {"loss": [2 / (1 + epoch) for epoch in range(4 + seed)]}
                        extra["concentration"] = [
                            {"class": row["class"], "true": 1000.0, "recovered": rng.uniform(500, 2000)}
                            for row in rows
                        ]
                    write(root, part, method, seed, accuracy, data, per_class=rows, **extra)


def cells(root: Path) -> list[dict[str, str]]:
    """The first table below `root` as text, a dictionary a row."""
    table = tables(report.sections(report.collect(root))[0])[0]
    return [dict(zip(table.headers, (text.strip() for text in row), strict=True)) for row in table.texts()]


def notes(root: Path) -> list[str]:
    return report.sections(report.collect(root))[-1].notes


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
    assert (row["seeds"], row["trained"], row["images"], row["queries"]) == ("2", "2,048", "16", "0")


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
    assert [section.title for section in sections] == ["x", "y", "Average over 2 data sets"]
    (row,) = sections[-1].summaries
    assert row.h == 50.0
    assert row.mean_h == Spread(18.0, None)


def test_a_method_that_lacks_a_data_set_is_left_out_of_the_average_and_named(tmp_path):
    for data in ("x", "y"):
        write_pair(tmp_path, "CoOp", 1, 80.0, 60.0, data=data)
    write_pair(tmp_path, "DFZSL", 1, 80.0, 60.0, data="x")
    average_section = report.sections(report.collect(tmp_path))[-1]
    assert [row.label for row in average_section.summaries] == ["CoOp"]
    assert "DFZSL: left out of the average, no result on y" in average_section.notes


def test_failed_and_unfinished_and_missing_seeds_are_named(tmp_path):
    for seed in (1, 2, 3):
        write_pair(tmp_path, "DFZSL", seed, 80.0, 70.0)
    write_pair(tmp_path, "CoOp", 1, 80.0, 60.0)
    write_failure(tmp_path, "CoOp", 2, "loss is\nNaN\n")
    write(tmp_path, "train_base", "CoOp", 3, 80.0)
    assert notes(tmp_path) == [
        "CoOp, seed 2: failed and left out: loss is NaN",
        "CoOp, seed 3: not finished and left out, no test_new",
        "CoOp: no result for seed 2, 3; averaged over 1, unlike the others",
    ]
    rows = {row["method"]: row["seeds"] for row in cells(tmp_path)}
    assert rows == {"CoOp": "1", "DFZSL": "3"}


def test_a_folder_where_everything_failed_still_says_why(tmp_path, capsys):
    write_failure(tmp_path, "CoOp", 1, "no such file: images")
    report.show(tmp_path)
    printed = capsys.readouterr().out
    assert "no finished run yet" in printed
    assert "no such file: images" in printed


def test_different_backbones_and_notes_of_runs_are_told(tmp_path):
    write_pair(tmp_path, "CoOp", 1, 80.0, 60.0, backbone="RN50")
    write_pair(tmp_path, "DFZSL", 1, 80.0, 60.0, notes=["FLPT left out"])
    assert notes(tmp_path) == [
        "CoOp: backbone RN50",
        "DFZSL: backbone ViT-B-16",
        "DFZSL: FLPT left out",
    ]


def test_methods_are_told_apart_by_config_only_where_they_must_be(tmp_path):
    write_pair(tmp_path, "CoOp", 1, 80.0, 60.0, config="ep50")
    write_pair(tmp_path, "CoOp", 1, 80.0, 65.0, config="ep100")
    write_pair(tmp_path, "CoOp@virtual", 1, 80.0, 70.0)
    assert [row["method"] for row in cells(tmp_path)] == ["CoOp (virtual)", "CoOp [ep100]", "CoOp [ep50]"]


def test_the_best_comes_first(tmp_path):
    for method, new in (("CoOp", 40.0), ("DFZSL", 70.0), ("ZeroshotCLIP", 60.0)):
        write_pair(tmp_path, method, 1, 80.0, new)
    assert [row["method"] for row in cells(tmp_path)] == ["DFZSL", "ZeroshotCLIP", "CoOp"]


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
    assert targets.texts() == [["dtd", "40.0"], ["eurosat", "50.0"], ["imagenet_a", "20.0"]]


def test_a_transfer_run_that_lacks_a_target_is_left_out(tmp_path):
    root = tmp_path / "xd"
    for seed, targets in ((1, ("dtd", "eurosat")), (2, ("dtd",))):
        write(root, "train_all", "CoOp", seed, 70.0, data="imagenet")
        for data in targets:
            write(root, "test_all", "CoOp", seed, 40.0, data=data)
    assert notes(tmp_path) == ["CoOp, seed 2: not finished and left out, no eurosat"]


def test_published_figures_agree_with_the_published_averages():
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


def test_published_figures_stand_beside_measured_ones_and_are_marked(tmp_path):
    write_pair(tmp_path, "CoOp", 1, 80.0, 60.0, data="dtd", backbone="ViT-B-32")
    parts = report.sections(report.collect(tmp_path), published=True)
    text = report.FORMATS["terminal"](parts)
    assert re.search(r"^CoCoOp \(published\) +77.0 +56.0 +64.8", text, re.MULTILINE)
    assert "CoCoOp (published), base-to-new: Zhou et al." in text
    assert "KgCoOp (published)" not in text  # only its average over all data sets is known
    assert "Published figures are of ViT-B/16, runs here of ViT-B-32" in text
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


@given(st.text())
def test_no_text_breaks_the_reader_of_logs(text):
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
        r"^CoCoOp \(log\) +76.5 +76.5 +76.5 +76.5 +16 +1 +86,462 +– +1,600 +–", printed, re.MULTILINE
    )
    assert "CoCoOp (log), seed 2: failed and left out: log.txt ends before a test result" in printed
    command.main(["--logs", str(theirs)])
    assert "queries" not in capsys.readouterr().out.split("Accuracies")[0]


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
def test_a_broken_results_file_is_named_with_its_field(tmp_path, change, field):
    write(tmp_path, "train_base", "CoOp", 1, **({"accuracy": 50.0} | change))
    with pytest.raises(UserError, match=rf"results\.json: a broken results file, see {field}"):
        report.collect(tmp_path)


@pytest.mark.parametrize("where", [".", "nowhere"])
def test_a_folder_without_results_says_what_to_give(tmp_path, where):
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match=r"give an output folder, such as output or output/base2new"):
        report.collect(tmp_path / where)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_command_line_tells_a_mistake_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("dfzsl.report", run_name="__main__")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: no results here; give an output folder, such as output or output/base2new\n"
    )


def test_two_sources_in_one_transfer_folder_are_refused(tmp_path):
    for data in ("imagenet", "sun397"):
        write(tmp_path / "xd", "train_all", "CoOp", 1, 70.0, data=data)
    with pytest.raises(UserError, match="runs of several sources"):
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


def test_latex_and_markdown_hold_every_number_of_the_terminal(tmp_path):
    write_world(tmp_path)
    write_failure(tmp_path, "Co_Op", 1, "50% & more")
    parts = report.sections(report.collect(tmp_path))
    terminal, markdown, latex = (report.FORMATS[name](parts) for name in ("terminal", "markdown", "latex"))
    numbers = re.findall(r"\d+\.\d ± \d+\.\d", terminal)
    assert len(numbers) == 9
    for number in numbers:
        assert number in markdown
        assert number.replace("±", r"$\pm$") in latex
    outside_comments = [line for line in latex.splitlines() if not line.startswith("%")]
    assert all("%" not in line and "±" not in line for line in outside_comments)
    assert "50% & more" in latex


class TestPage:
    @pytest.fixture(scope="class")
    @staticmethod
    def html(tmp_path_factory) -> str:
        root = tmp_path_factory.mktemp("output")
        write_world(root / "base2new", datasets=("x", "y"), classes=30, names="<b>$class$ 犬 {} & co")
        write_failure(root / "base2new", "CoOp", 4, "<script>alert(1)</script>", data="x")
        file = root / "page.html"
        command.main([str(root), "--published", "--html", str(file)])
        return file.read_text(encoding="utf-8")

    def test_needs_nothing_but_itself(self, html):
        assert not re.search(r"https?:|<link|<script|<img|<iframe|@import|url\((?!#)", html)
        assert "prefers-color-scheme: dark" in html

    def test_every_plot_is_there_and_well_formed(self, html):
        titles = re.findall(r"<h3>(.*?)</h3>", html)
        single = [
            "H",
            "base against new",
            "Change per class",
            "Recovered concentration",
            "Learning curves: loss",
        ]
        assert titles == ["H", "base against new", "H on each data set", *single, *single]
        drawn = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
        assert len(drawn) == len(titles)
        for svg in drawn:
            ElementTree.fromstring(svg.replace("xlink:", ""))
        assert "The 24 of 60 classes that change most" in html

    def test_colours_are_left_to_the_style(self, html):
        used = set(re.findall(r"var\((--[a-z0-9]+)\)", html))
        light, dark = html.split("prefers-color-scheme")[:2]
        assert used <= set(re.findall(r"(--[a-z0-9]+):", light))
        assert used - {"--band"} <= set(re.findall(r"(--[a-z0-9]+):", dark)) | {"--band"}
        assert "#fe0" not in html

    def test_text_from_files_is_escaped(self, html):
        assert "<b>" not in html
        assert "&lt;script&gt;alert(1)" in html
        assert "$class$ 犬" in html

    def test_same_results_give_the_same_bytes(self, tmp_path):
        write_world(tmp_path)
        pages = []
        for name in ("a.html", "b.html"):
            command.main([str(tmp_path), "--html", str(tmp_path / name)])
            pages.append((tmp_path / name).read_bytes())
        assert pages[0] == pages[1]

    def test_matplotlib_is_asked_for_when_it_is_missing(self, tmp_path, monkeypatch):
        write_world(tmp_path)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        for module in ("page", "figures"):
            monkeypatch.delitem(sys.modules, f"dfzsl.report.{module}", raising=False)
        with pytest.raises(UserError, match="the HTML page needs matplotlib: pip install matplotlib"):
            command.main([str(tmp_path), "--html", str(tmp_path / "page.html")])
        assert not (tmp_path / "page.html").exists()
