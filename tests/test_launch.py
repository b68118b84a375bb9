from __future__ import annotations

import re
import subprocess
import sys

import click
import pytest
from dassl.engine import TRAINER_REGISTRY
from sweeps import planned_jobs, sweep_options
from tqdm import tqdm

from dfzsl import train
from dfzsl.io.files import write_json
from dfzsl.launch import workers
from dfzsl.launch.forecast import forecast, longest_first
from dfzsl.launch.runs import Data, Job, Method
from dfzsl.launch.workers import locked
from dfzsl.trainers.base import CLIPTrainer
from dfzsl.trainers.generation.training import GenerationSettings
from dfzsl.trainers.recovery.settings import RecoverySettings
from dfzsl.utils.errors import UserError


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The default --output must not be the checkout's."""
    monkeypatch.chdir(tmp_path)


def jobs(*words: str):
    return planned_jobs(["base2new", *words])


def test_folders_are_laid_out_as_coop_lays_them_out(tmp_path):
    (job,) = jobs("--methods", "CoOp", "--output", str(tmp_path), "imagenet", "2")
    folders = [folder.relative_to(tmp_path).as_posix() for folder, _ in job.parts()]
    config = job.config_file.stem
    assert folders == [
        f"base2new/train_base/imagenet/shots_16/CoOp/{config}/seed2",
        f"base2new/test_new/imagenet/shots_16/CoOp/{config}/seed2",
    ]


def test_a_folder_name_has_the_number_of_images_per_class(tmp_path):
    planned = jobs("--methods", "CoOp,DFZSL,ZeroshotCLIP", "--output", str(tmp_path), "imagenet", "2")
    seen = [folder.parts[-4] for job in planned for folder, _ in job.parts()[:1]]
    assert seen == ["shots_16", "shots_all", "shots_0"]
    with pytest.raises(click.BadParameter):
        jobs("--shots", "0", "imagenet")


def test_options_and_settings_may_come_in_any_order():
    words = [
        "--methods",
        "A",
        "imagenet",
        "1",
        "2",
        "OPTIM.LR",
        "0.1",
        "--dry-run",
        "DATASET.NUM_SHOTS",
        "-1",
    ]
    options = sweep_options(["base2new", *words, "TEXT.PROMPTS", "- a {}", "--shots=2,-1", "--workers", "3"])
    assert (options.methods, options.dataset, options.seeds) == ("A", "imagenet", (1, 2))
    assert options.settings == ("OPTIM.LR", "0.1", "DATASET.NUM_SHOTS", "-1", "TEXT.PROMPTS", "- a {}")
    assert (options.shots, options.workers) == ((2, -1), 3)
    with pytest.raises(click.NoSuchOption) as error:
        sweep_options(["base2new", "imagenet", "DATASET.NUM_SHOTS", "-1", "--dryrun"])
    assert "--dry-run" in error.value.possibilities


def test_an_option_after_half_a_pair_stays_an_option():
    options = sweep_options(["gzsl", "awa2", "OPTIM.LR", "--workers", "2"])
    assert options.settings == ("OPTIM.LR",) and options.workers == 2


def test_without_a_data_set_a_sweep_compares_more_methods():
    few, many = ({job.method.name for job in jobs(*words)} for words in (["shapes"], []))
    assert "DFZSL" in few and many - few == {"CoOp", "CoCoOp"}


def test_the_new_classes_are_tested_with_the_model_of_the_base_classes(tmp_path):
    (job,) = jobs("--methods", "CoOp", "--output", str(tmp_path), "imagenet", "1")
    (train_folder, train_words), (_, test_words) = job.parts()
    assert "--eval-only" not in train_words
    assert train_words[train_words.index("DATASET.SUBSAMPLE_CLASSES") + 1] == "base"
    assert test_words[test_words.index("DATASET.SUBSAMPLE_CLASSES") + 1] == "new"
    assert test_words[test_words.index("--model-dir") + 1] == str(train_folder)


def test_data_free_methods_read_the_owners_teacher_of_the_same_seed(tmp_path):
    (job,) = jobs("--methods", "dfzsl", "--output", str(tmp_path), "shapes", "3")
    words = job.parts()[0][1]
    teacher = words[words.index("TEACHER.FILE") + 1]
    assert teacher == str(job.teacher.parts()[0][0] / "teacher.safetensors")
    assert "TeacherZeroshot" in teacher
    assert "seed3" in teacher


def test_a_trainer_that_is_registered_is_compared(monkeypatch):
    class Mine(CLIPTrainer):
        recipe = "none"

    monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "Mine", Mine)
    planned = jobs("--methods", "all", "shapes", "1")
    assert {"Mine", "CoOp", "DFZSL", "TeacherZeroshot"} <= {job.method.name for job in planned}
    assert planned[0].method.name == "TeacherZeroshot"


@pytest.mark.parametrize("variant", Method("DFZSL").variants)
def test_every_variant_is_a_run_of_its_own_with_settings_that_exist(variant, tmp_path):
    (job,) = jobs("--methods", f"DFZSL+{variant}", "--output", str(tmp_path), "shapes", "1")
    folder, arguments = job.parts()[0]
    assert f"+{variant}" in str(folder)
    cfg = train.setup_cfg(train.parser().parse_args(arguments))
    RecoverySettings(**{key.lower(): value for key, value in cfg.RECOVERY.items()})
    GenerationSettings(**{key.lower(): value for key, value in cfg.GENERATOR.items()})


def test_a_data_set_that_brings_its_backbone_keeps_it():
    assert Data("shapes", "data").overrides()[:2] == ["MODEL.BACKBONE.NAME", "shapes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "cocopp", "shapes"], "'cocopp'; known: CoCoOp"),
        (["--methods", "DFZSL+no_flpd", "shapes"], "'no_flpd'; known: no_flpt"),
        (["--methods", "CoOp", "imagnet"], "'imagnet'; known: imagenet"),
        (["--methods", "CoOp", "shapes", "one"], "KEY VALUE.* one"),
        (["--methods", "CoOp", "shapes", "one", "two"], "KEY VALUE.* one two"),
        (["--methods", "CoOp", "features:/nowhere.npz"], "/nowhere.npz"),
        (["--methods", "CoOp:nope", "shapes"], "CoOp for shapes 'nope'"),
        (["--methods", "CoOp", "shapes", "OPTIM.LRR", "1"], "OPTIM.LRR"),
    ],
)
def test_an_error_is_reported_in_one_line(words, message):
    with pytest.raises(UserError, match=message):
        jobs(*words)


def test_one_output_folder_holds_cross_dataset_runs_from_one_source(tmp_path):
    def planned(*words):
        return planned_jobs(["xd", "--output", str(tmp_path), *words])

    (job, *_) = planned("imagenet", "1")
    job.parts()[0][0].mkdir(parents=True)
    assert planned("imagenet", "2")
    with pytest.raises(UserError, match=r"caltech101, imagenet.* --output"):
        planned("caltech101", "1")
    with pytest.raises(UserError, match="--output"):
        planned("all", "1")


def test_a_folder_keeps_the_settings_it_was_run_with(tmp_path):
    words = ["--methods", "CoOp", "--output", str(tmp_path), "shapes", "1", "OPTIM.MAX_EPOCH"]
    (job,) = jobs(*words, "10")
    job.settings.parent.mkdir(parents=True)
    job.settings.write_text("OPTIM.MAX_EPOCH 10")
    assert jobs(*words, "10") == [job]
    with pytest.raises(UserError, match=r"'OPTIM\.MAX_EPOCH 10'.* 'OPTIM\.MAX_EPOCH 20'"):
        jobs(*words, "20")
    with pytest.raises(UserError, match=r"'OPTIM\.MAX_EPOCH 10'.* without settings"):
        jobs(*words[:-1])


def finished(job: Job, seconds: float, **changes: object) -> None:
    """Results of a job's parts, as far as the launcher reads them."""
    for folder, _ in job.parts():
        write_json(folder / "results.json", {"schema": 1, "elapsed": seconds / 2, **changes})


def test_the_forecast_uses_finished_runs_of_the_same_method_and_data(tmp_path):
    words = ["--methods", "CoOp,KgCoOp", "--output", str(tmp_path), "shapes", "1", "2", "3", "4"]
    planned = jobs(*words)
    assert "Estimated time: unknown" in forecast(planned, 2)
    coop = [job for job in planned if job.method.name == "CoOp"]
    for job, seconds in zip(coop, (60, 70, 600), strict=False):
        finished(job, seconds)
    todo = [job for job in planned if not job.finished]
    said = forecast(todo, 2)
    assert sorted(line.split() for line in said.splitlines()[2:4]) == [
        ["CoOp", "(shapes)", "shapes", "1", "0:01:10"],
        ["KgCoOp", "(shapes)", "shapes", "4", "unknown"],
    ]
    assert "About 0:01:10 on 2 workers for 1 of 5 runs, the others unknown" in said
    finished(planned[1], 100)
    todo = [job for job in planned if not job.finished]
    assert "About 0:03:05 on 2 workers; by" in forecast(todo, 2)  # 70 and three times 100, on two


def test_workers_run_the_longest_jobs_first(tmp_path):
    words = ["--methods", "CoOp,KgCoOp,ProGrad", "--output", str(tmp_path), "shapes", "1", "2", "3"]
    order = longest_first(jobs(*words))

    def taken(seconds: float = 0.0) -> tuple[str, int]:
        job = next(order)
        if seconds:
            finished(job, seconds)
        return job.method.name, job.seed

    assert taken(10) == ("CoOp", 1) and taken() == ("KgCoOp", 1)  # which is still running
    assert taken(50) == ("ProGrad", 1)
    assert taken(90) == ("KgCoOp", 2) and taken() == ("KgCoOp", 3)
    assert [taken() for _ in range(4)] == [("ProGrad", 2), ("ProGrad", 3), ("CoOp", 2), ("CoOp", 3)]
    assert next(order, None) is None


def test_results_of_another_schema_are_refused_before_any_run(tmp_path):
    words = ["--methods", "CoOp", "--output", str(tmp_path), "shapes", "1"]
    finished(jobs(*words)[0], 1.0, schema=0)
    with pytest.raises(UserError, match=r"results\.json: schema 0"):
        jobs(*words)
    finished(jobs("--output", str(tmp_path / "b"), *words[:2], *words[4:])[0], 1.0, schema=2)
    with pytest.raises(UserError, match="schema 2"):
        jobs("--output", str(tmp_path / "b"), *words[:2], *words[4:])


def test_a_job_is_locked_against_others(tmp_path):
    job = Job("base2new", Method("ZeroshotCLIP"), Data("shapes", "data"), 1, 16, -1, tmp_path)
    with locked(job) as mine:
        assert mine
        code = (
            "import sys; from pathlib import Path; from dfzsl.launch.runs import Data, Job, Method\n"
            "from dfzsl.launch.workers import locked\n"
            f"root = Path({str(tmp_path)!r})\n"
            f"job = Job('base2new', Method('ZeroshotCLIP'), Data('shapes', ''), 1, 16, -1, root)\n"
            "with locked(job) as free: sys.exit(7 if free else 0)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_reports_its_progress_to_the_launcher(tmp_path, monkeypatch):
    job = Job("base2new", Method("ZeroshotCLIP"), Data("shapes", "data"), 1, 16, -1, tmp_path)
    seen = []

    def main(arguments):
        print("** Config **")
        for _ in tqdm(range(2), "recover\x07", unit="epoch", mininterval=0):
            monkeypatch.setattr(workers.time, "monotonic", lambda: 1e9 * len(seen))
            seen.append(list(workers.progress_lines([job])))

    monkeypatch.setattr(workers.train, "main", main)
    workers.run(job)
    assert seen[0] == ["ZeroshotCLIP, shapes, seed 1: ** Config **"]
    assert re.fullmatch(r"ZeroshotCLIP, shapes, seed 1: recover\\x07: 50%\|.*\| 1/2 \[.*epoch.*\]", *seen[1])
    assert not any(workers.progress_lines([job]))
