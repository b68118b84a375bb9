"""Test every protocol from its runs to its table, few-shot and domain generalization in particular."""

from __future__ import annotations

import re

import fake_data
import pytest
from conftest import write_features
from sweeps import planned_jobs

from dfzsl import report
from dfzsl.io.files import write_json
from dfzsl.io.results import read_results
from dfzsl.launch.__main__ import main
from dfzsl.launch.runs import PROTOCOLS, SHIFTED_DATASETS, Job
from dfzsl.report.figures import plots
from dfzsl.report.formats import FORMATS
from dfzsl.report.tables import tables
from dfzsl.utils.errors import UserError


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The default --output must not be the checkout's."""
    monkeypatch.chdir(tmp_path)


def jobs(*words: str) -> list[Job]:
    return planned_jobs(words)


def finished(job: Job, accuracy: float, part: int, images: int) -> None:
    """Results of one part of a job, as a trainer writes them."""
    rows = [
        {"class": f"{side} {name}", "correct": round(accuracy / 10), "total": 10, "new": side == "new"}
        for side in ("old", "new")
        for name in "ab"
    ]
    results = {"schema": 1, "accuracy": accuracy, "per_class": rows, "trained_parameters": 8, "notes": []}
    results |= {"images_used": images, "queries": 0, "seconds": {"train": 1.0}}
    write_json(job.parts()[part][0] / "results.json", results)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_table_has_the_runs_of_the_launcher(protocol, tmp_path):
    planned = jobs(protocol, "--output", str(tmp_path), PROTOCOLS[protocol].default, "1", "2")
    for job in planned:
        for part in range(len(job.parts())):
            seen = max(job.shots_seen, 0)
            finished(job, 50.0 + part + seen + len(job.method.name), part, seen)
    (section,) = report.sections(report.collect(tmp_path))
    assert section.protocol == protocol
    assert not section.notes
    assert len(section.summaries) == 4
    assert all(row.seeds == (1, 2) for row in section.summaries)
    assert plots(section, details=False)
    for form in FORMATS.values():
        assert "Linear probe + CLIP" in form([section])


def test_few_shots_are_one_run_for_each_number_of_images(tmp_path):
    planned = jobs(
        "fewshot", "--methods", "ZeroshotCLIP,CoOp,DFZSL", "--output", str(tmp_path), "shapes", "1"
    )
    folders = [job.parts()[0][0].relative_to(tmp_path).parts[3:5] for job in planned]
    numbers = ("shots_1", "shots_2", "shots_4", "shots_8", "shots_16")
    expected = [(shots, name) for shots in numbers for name in ("CoOp", "DFZSL")]
    assert sorted(folders) == sorted([("shots_0", "ZeroshotCLIP"), *expected])
    for job in planned:
        ((_, words),) = job.parts()
        assert words[words.index("DATASET.SUBSAMPLE_CLASSES") + 1] == "all"
        if job.method.name == "DFZSL":  # its teacher has as many images as the others
            assert f"shots_{job.shots}/TeacherZeroshot" in words[words.index("TEACHER.FILE") + 1]
    assert {job.shots for job in jobs("fewshot", "--shots", "2,-1", "--methods", "CoOp", "shapes")} == {2, -1}
    with pytest.raises(UserError, match="--teacher-shots"):
        jobs("fewshot", "--teacher-shots", "16", "shapes")


def few(tmp_path, lines: dict[str, dict[int, float]], data: str = "shapes", seed: str = "1") -> None:
    for trainer, line in lines.items():
        for shots, accuracy in line.items():
            words = ["--methods", trainer, "--shots", str(shots or 1), "--output", str(tmp_path), data, seed]
            (job,) = jobs("fewshot", *words)
            finished(job, accuracy, 0, 120 * shots)


def test_the_few_shot_table_has_a_column_per_number_of_images(tmp_path):
    few(tmp_path, {"ZeroshotCLIP": {0: 50.0}, "CoOp": {1: 40.0, 4: 60.0, 16: 70.0}})
    few(tmp_path, {"KgCoOp": {1: 55.0, 16: 65.0}})
    (section,) = report.sections(report.collect(tmp_path))
    (table,) = tables(section)
    assert table.headers[:4] == ["method", "1 shot", "4 shots", "16 shots"]
    assert [[text.strip() for text in row[:4]] for row in table.texts()] == [
        ["CoOp", "40.0", "60.0", "70.0"],
        ["CLIP", "50.0", "50.0", "50.0"],  # it sees none, however many there are
    ]
    assert "shots" not in table.headers
    assert table.rows[0][table.headers.index("training images")] == 120 * 16
    (note,) = section.notes
    assert note.startswith("KgCoOp, seed 1") and note.endswith("4 shots")
    assert section.headline == "16 shots"
    (curve,) = [plot for plot in plots(section, details=False) if plot.title.startswith("Accuracy by")]
    ticks = re.findall(r">(\d+)</text>", curve.svg)
    assert {"1", "4", "16"} <= set(ticks)


def test_few_shots_of_several_data_sets_are_averaged(tmp_path):
    for data, add in (("dtd", 0.0), ("eurosat", 10.0)):
        few(tmp_path, {"ZeroshotCLIP": {0: 50.0 + add}, "CoOp": {1: 40.0 + add, 16: 70.0 + add}}, data)
    average, *single = report.sections(report.collect(tmp_path))
    assert [section.title for section in single] == ["DTD", "EuroSAT"]
    assert {row.label: [score.mean for score in row.scores.values()] for row in average.summaries} == {
        "CoOp": [45.0, 75.0],
        "CLIP": [55.0, 55.0],
    }
    _, by_dataset = tables(average)
    assert [row[:2] for row in by_dataset.rows[:3]] == [
        ["Average", "1 shot"],
        ["", "16 shots"],
        ["DTD", "1 shot"],
    ]


@pytest.mark.parametrize("source", SHIFTED_DATASETS)
def test_domain_generalization_tests_the_variants_of_its_source(source, tmp_path):
    (job,) = jobs("dg", "--methods", "CoOp", "--output", str(tmp_path), source, "1")
    (trained, _), *tests = job.parts()
    assert [folder.parts[-5] for folder, _ in tests] == list(SHIFTED_DATASETS[source])
    for _, words in tests:
        assert words[words.index("--model-dir") + 1] == str(trained)
    for part, accuracy in enumerate((70.0, 60.0, 40.0, 30.0, 50.0)):
        finished(job, accuracy, part, 1920)
    (section,) = report.sections(report.collect(tmp_path))
    (table,) = tables(section)
    assert table.headers[1] == "source"
    assert table.headers[6] == "shifted source"
    assert [text.strip() for text in table.texts()[0][1:7]] == [
        "70.0",
        "60.0",
        "40.0",
        "30.0",
        "50.0",
        "45.0",
    ]
    assert section.headline == "shifted source"


def test_domain_generalization_needs_a_data_set_with_variants():
    with pytest.raises(UserError, match="dg 'dtd'; known: imagenet, shapes"):
        jobs("dg", "dtd")


def test_published_results_of_domain_generalization(tmp_path):
    (job,) = jobs("dg", "--methods", "CoOp", "--output", str(tmp_path), "imagenet", "1")
    for part in range(5):
        finished(job, 60.0, part, 16000)
    (section,) = report.sections(report.collect(tmp_path), published=True)
    coop = next(row for row in section.summaries if row.label == "CoOp (published)")
    assert coop.scores["shifted source"].mean == pytest.approx((64.20 + 47.99 + 49.71 + 75.21) / 4)


def test_few_shots_run_to_a_table(tmp_path, capsys):
    """A whole sweep on a feature file: the owner's probe, zero-shot and DFZSL, on all classes."""
    path = write_features(tmp_path / "animals.npz")
    words = [
        "--methods",
        "ZeroshotCLIP,TeacherZeroshot,DFZSL",
        "--shots",
        "1,4",
        "--output",
        str(tmp_path / "out"),
    ]
    main(["fewshot", *words, f"features:{path}", "1", "RECOVERY.NUM_PER_CLASS", "20", "--workers", "1"])
    shown = capsys.readouterr().out
    assert "few-shot classification" in shown
    assert re.search(r"method +1 shot +4 shots", shown)
    of = {job: read_results(job) for job in (tmp_path / "out").rglob("results.json")}
    assert len(of) == 5
    images = {path.parts[-4]: run["images_used"] for path, run in of.items() if path.parts[-5] == "shots_4"}
    assert images == {"TeacherZeroshot": 32, "DFZSL": 0}
    assert all(len(run["per_class"]) == 8 for run in of.values())


@pytest.mark.slow
def test_domain_generalization_runs_from_imagenet_to_its_variants(tmp_path, capsys):
    """On miniature copies in the true layout; two variants lack classes of ImageNet's, as the true ones."""
    for name in ("ImageNet", "ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR"):
        fake_data.make(name, tmp_path / "data")
    where = ["--root", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--shots", "2"]
    settings = ["MODEL.BACKBONE.NAME", "shapes", "OPTIM.MAX_EPOCH", "2", "DATALOADER.NUM_WORKERS", "0"]
    main(["dg", "--methods", "ZeroshotCLIP,TeacherZeroshot,CoOp", *where, "imagenet", "1", *settings])
    assert "shifted source" in capsys.readouterr().out
    (section,) = report.sections(report.collect(tmp_path / "out"))
    assert len(section.summaries) == 3
    assert not section.notes


@pytest.mark.slow
def test_domain_generalization_runs_on_shapes(tmp_path):
    where = ["--root", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    main(["dg", "--methods", "ZeroshotCLIP,CoOp", *where, "shapes", "1", "OPTIM.MAX_EPOCH", "1"])
    (section,) = report.sections(report.collect(tmp_path / "out"))
    zero_shot = next(row for row in section.summaries if row.label == "CLIP")
    assert all(score.mean > 10 for score in zero_shot.targets.values())  # chance is 0.8
