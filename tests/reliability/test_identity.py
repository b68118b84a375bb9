"""Test that a run folder refuses other data, encoders or teachers of the same name."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import fake_data
import numpy as np
import pytest
import torch
from conftest import ROOT, write_features
from sweeps import planned_jobs

from dfzsl import train
from dfzsl.datasets.encoding import checksum
from dfzsl.datasets.extract import open_dataset
from dfzsl.io.files import lock
from dfzsl.io.run_directory import LOCK_FILE, RunDirectory
from dfzsl.launch import workers
from dfzsl.launch.__main__ import main
from dfzsl.launch.preflight import check
from dfzsl.launch.runs import Data, Job
from dfzsl.launch.workers import launch, work
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import UserError, run_program

SMALL = {"RECOVERY.NUM_PER_CLASS": 8, "GENERATOR.NAME": "vmf", "GENERATOR.CLASSIFIER_STEPS": 5}


def words(trainer: str, data: Path, output: Path, *more: object) -> list[str]:
    given = ["--trainer", trainer, "--root", data, "--seed", 1, "--output-dir", output]
    given += ["--dataset-config-file", ROOT / "configs/datasets/features.yaml"]
    pairs = {"DATASET.SUBSAMPLE_CLASSES": "base", **(SMALL if trainer == "DFZSL" else {})}
    return [str(word) for word in (*given, *more, *(word for pair in pairs.items() for word in pair))]


def test_other_test_data_under_the_same_path_is_refused(tmp_path, tried):
    path = write_features(tmp_path / "x.npz", per_class=8)
    given = words("ZeroshotCLIP", path, tmp_path / "out", "--eval-only")
    train.main(given)
    train.main(given)  # the same again
    write_features(path, seed=1, per_class=8)
    with pytest.raises(UserError, match=r"out .*test data"):
        train.main(given)
    tried("identity", "data overwritten or another of the same name", 1, "refused, both named")


def test_other_training_data_is_refused_where_it_is_read(tmp_path, tried):
    path = write_features(tmp_path / "x.npz", per_class=8)
    arrays = dict(np.load(path))
    train.main(words("TeacherZeroshot", path, tmp_path / "owner"))
    teacher = tmp_path / "owner/teacher.safetensors"
    client = words("DFZSL", path, tmp_path / "client")
    client += ["TEACHER.FILE", str(teacher)]
    train.main(client)
    np.savez(path, **{**arrays, "x_val": arrays["x_val"][::-1].copy(), "y_val": arrays["y_val"][::-1].copy()})
    train.main(client)  # it has not read them
    with pytest.raises(UserError, match="training data"):
        train.main(words("TeacherZeroshot", path, tmp_path / "owner"))
    tried("identity", "data overwritten or another of the same name", 1, "refused, both named")


def test_an_older_folder_without_checksums_resumes(tmp_path, tried):
    path = write_features(tmp_path / "x.npz", per_class=8)
    given = words("ZeroshotCLIP", path, tmp_path / "out", "--eval-only")
    train.main(given)
    config = tmp_path / "out/config.yaml"
    whole = config.read_text(encoding="utf-8")
    assert whole.count("# made of ") == 2
    lines = (line for line in whole.splitlines(True) if not line.startswith("# made"))
    config.write_text("".join(lines), encoding="utf-8")
    train.main(given)
    assert config.read_text(encoding="utf-8") == whole
    tried("identity", "outputs of an older version", 1, "gone on with")


@pytest.mark.parametrize("kind", ["Folder", "Csv", "Features", "OxfordPets", "AWA2"])
def test_data_is_identified_by_content_and_not_by_location(kind, tmp_path, tried):
    config = {"Folder": "folder", "Csv": "csv", "Features": "features", "OxfordPets": "oxford_pets"}

    def sums(root: Path) -> list[str]:
        data = open_dataset(config.get(kind, kind.lower()), str(root))
        return [checksum(data, datums) for datums in (data.test, data.train_x)]

    root = fake_data.make(kind, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = tmp_path / "b" / root.relative_to(tmp_path / "a")
    assert sums(root) == sums(moved)
    if kind not in ("Features", "AWA2"):
        data = open_dataset(config[kind], str(moved))
        picture = Path(data.test[0].impath)
        picture.write_bytes(picture.read_bytes()[:-1] + b"x")  # as long as it was
        (test, training), (other_test, other_training) = sums(root), sums(moved)
        assert test != other_test and training == other_training
    tried("identity", "data moved, and one picture changed", 1, "the same; another")


@pytest.mark.parametrize("wrong", ["of another encoder", "of other classes"])
def test_a_failed_start_leaves_the_folder_free(wrong, tmp_path, tried):
    path = write_features(tmp_path / "x.npz", per_class=8)
    train.main(words("TeacherZeroshot", path, tmp_path / "owner"))
    right = tmp_path / "owner/teacher.safetensors"
    teacher = Teacher.load(right)
    if wrong == "of another encoder":
        teacher.backbone = "ViT-B-32 (openai)"
    else:
        teacher.classnames[0] = "zebra"
    teacher.save(tmp_path / "wrong.safetensors")
    with pytest.raises(UserError):
        train.main(
            [*words("DFZSL", path, tmp_path / "out"), "TEACHER.FILE", str(tmp_path / "wrong.safetensors")]
        )
    assert not (tmp_path / "out/config.yaml").exists()
    train.main([*words("DFZSL", path, tmp_path / "out"), "TEACHER.FILE", str(right)])
    assert (tmp_path / "out/results.json").exists()
    tried("identity", "a wrong teacher, then the right one", 1, "the folder is free")


def test_no_new_class_is_a_legal_task(tmp_path):
    path = write_features(tmp_path / "x.npz", per_class=8, new=np.array([], dtype="int64"))
    train.main(words("TeacherZeroshot", path, tmp_path / "owner"))
    given = words("DFZSL", path, tmp_path / "out")
    train.main([*given, "TEACHER.FILE", str(tmp_path / "owner/teacher.safetensors")])
    assert (tmp_path / "out/classifier.safetensors").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("('a\\x1b[2Jb','x')", r"\\x1b"),
        ("('x','x')", "'x'"),
        ("('ant','x')", "'ant'"),
        ("('','x')", "class 0"),
        ("(1,2)", "class names"),
    ],
)
def test_names_of_new_classes_are_checked_before_any_work(names, said, tmp_path, tried):
    path = write_features(tmp_path / "x.npz", per_class=8)
    Teacher(torch.randn(4, 32), ["ant", "bee", "cat", "dog"]).save(tmp_path / "t.safetensors")
    given = words("DFZSL", path, tmp_path / "out", "TEACHER.FILE", tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=said):
        train.main([*given, "TRAINER.DFZSL.NEW_CLASSES", names])
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    tried("hostile files", "names of new classes, before any work", 1, "refused, one line")


def test_the_owner_has_no_teacher_yet(tmp_path):
    path = write_features(tmp_path / "x.npz", per_class=8)
    with pytest.raises(UserError, match=r"TEACHER\.FILE"):
        train.main([*words("TeacherZeroshot", path, tmp_path / "o"), "TEACHER.FILE", "http://localhost:1/x"])


# ---------------------------------------------------------------- sweeps


def sweep(folder: Path, data: str, *more: str) -> None:
    """`python -m dfzsl.launch` for two free methods; raises what it ends with."""
    jobs = planned_jobs(
        ["base2new", "--methods", "ZeroshotCLIP,TeacherZeroshot", "--output", str(folder), data, *more]
    )
    check(jobs)
    work(jobs, 1)


@pytest.fixture
def images(tmp_path) -> Path:
    """Two folders of images with the same name, classes and files."""
    for place, seed in (("a", 0), ("b", 7)):
        for label, name in enumerate(("ant", "bee", "cat", "dog")):
            for number in range(10):
                fake_data.picture(tmp_path / place / "images" / name / f"{number}.jpg", label, seed + number)
    return tmp_path


def test_another_folder_of_the_same_name_is_refused_and_a_moved_one_is_not(images, monkeypatch, tried):
    keys = ("1", "MODEL.BACKBONE.NAME", "shapes", "DATALOADER.NUM_WORKERS", "0")
    a, b, out = images / "a/images", images / "b/images", images / "out"
    sweep(out, f"folder:{a}", *keys)
    assert len(list(out.rglob("results.json"))) == 4
    with pytest.raises(UserError, match=f"test data .*{a}.*{b}.* --output"):
        sweep(out, f"folder:{b}", *keys)
    with pytest.raises(UserError, match="test data"):  # another seed comes into the same table
        sweep(out, f"folder:{b}", "2", *keys[1:])
    shutil.copytree(images / "a", images / "c")
    sweep(out, f"folder:{images / 'c/images'}", *keys)
    (images / "c/images/ant/0.jpg").rename(images / "c/images/ant/zero.jpg")
    with pytest.raises(UserError, match=r"training data|test data"):
        sweep(out, f"folder:{images / 'c/images'}", *keys)
    tried("identity", "data overwritten or another of the same name", 3, "refused, both named")


def test_an_overwritten_feature_file_is_refused(tmp_path, tried):
    path = write_features(tmp_path / "x.npz", per_class=8)
    arrays = dict(np.load(path))
    sweep(tmp_path / "out", f"features:{path}", "1")
    np.savez(path, **{**arrays, "x_val": arrays["x_val"][::-1].copy(), "y_val": arrays["y_val"][::-1].copy()})
    with pytest.raises(UserError, match=r"TeacherZeroshot.*training data"):
        sweep(tmp_path / "out", f"features:{path}", "1")
    write_features(path, seed=1, per_class=8)
    with pytest.raises(UserError, match="test data"):
        sweep(tmp_path / "out", f"features:{path}", "1")
    tried("identity", "data overwritten or another of the same name", 2, "refused, both named")


def test_an_older_sweep_resumes_with_data_at_the_same_path(tmp_path, tried):
    path = write_features(tmp_path / "x.npz", per_class=8)
    sweep(tmp_path / "out", f"features:{path}", "1")
    for config in (tmp_path / "out").rglob("config.yaml"):
        lines = config.read_text(encoding="utf-8").splitlines(True)
        config.write_text("".join(line for line in lines if line[0] != "#"), encoding="utf-8")
    sweep(tmp_path / "out", f"features:{path}", "1", "2")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="test data"):
        sweep(tmp_path / "out", f"features:{shutil.copy(path, tmp_path / 'other')}", "1")
    tried("identity", "outputs of an older version", 1, "gone on with")


def test_versions_in_a_folders_name_are_part_of_it(tmp_path):
    for name in ("images.v1", "images.v2"):
        (tmp_path / name).mkdir()
        assert Data(f"folder:{tmp_path / name}", "").name == name
    assert Data("features:some/x.v1.npz", "").name == "x.v1"


def test_seeds_given_twice_are_run_once(tmp_path):
    words = ["base2new", "--methods", "ZeroshotCLIP", "--output", str(tmp_path), "shapes", "1", "01", "1"]
    assert [job.seed for job in planned_jobs(words)] == [1]


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["dtd", "--root", "nowhere"], "nowhere/dtd"),
        (["--output", "file/out"], "--output file/out"),
        (["MODEL.BACKBONE.WEIGHTS", "none.pt"], r"none\.pt"),
        (["MODEL.BACKBONE.NAME", "ViT-B-33"], "'ViT-B-33'"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_missing_inputs_are_reported_before_any_output(words, fact, dry, tmp_path, capsys, tried):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    fake_data.make("Folder", tmp_path)
    before = set(tmp_path.rglob("*"))
    data = [] if words[0] == "dtd" else ["folder:own"]
    with pytest.raises(UserError, match=fact):
        main(["base2new", "--methods", "ZeroshotCLIP", *data, *words, *(["--dry-run"] * dry)])
    assert not capsys.readouterr().out
    assert set(tmp_path.rglob("*")) == before
    tried("machine", "sweep without data, weights or an output to write to", 1, "told before any run")


def test_only_partial_files_of_killed_runs_are_removed(tmp_path, tried):
    path = write_features(tmp_path / "x.npz", per_class=8)
    out = tmp_path / "out"
    ours = [".a.json.0123abcd.tmp", "answers/.b.safetensors.00000000.tmp", "model/model.pth.tar-1.partial-77"]
    others = [
        ".notes.tmp",
        "answers/b.tmp",
        "run/.a.json.0123abcd.tmp",
        "run/.running",
        "a/b/.c.0123abcd.tmp",
    ]
    for name in (*ours, *others):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("", encoding="utf-8")
    train.main(words("ZeroshotCLIP", path, out, "--eval-only"))
    assert not [name for name in ours if (out / name).exists()]
    assert all((out / name).exists() for name in others)
    tried("killed", "half-written files of killed runs", len(ours), "removed by the next")


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path, tried):
    path = write_features(tmp_path / "x.npz", per_class=8)
    given = words("ZeroshotCLIP", path, tmp_path / "out", "--eval-only")
    folder = RunDirectory(train.setup_cfg(train.parser().parse_args(given)))
    with folder.locked(), pytest.raises(UserError, match="out"):
        train.main(given)
    train.main(given)
    tried("killed", "two runs in one folder at once", 1, "refused, one line")


def one_run(path: Path, output: Path) -> list[Job]:
    """Plan a sweep of one method and one seed over a feature file."""
    given = ["base2new", "--methods", "ZeroshotCLIP", "--output", str(output), f"features:{path}", "1"]
    return planned_jobs(given)


def test_folders_of_ended_workers_are_removed(tmp_path, monkeypatch):
    """Folders that are locked, of other machines or of slurm jobs stay; process ids are reused."""
    path = write_features(tmp_path / "x.npz", per_class=8)
    host = socket.gethostname()
    kept = [f"local-{host}-held", "local-elsewhere-1", f"slurm-{host}-1"]
    names = [*kept, f"local-{host}-{os.getppid()}"]
    for name in names:
        (tmp_path / "out/.workers" / name).mkdir(parents=True)
        (tmp_path / "out/.workers" / name / f"{os.getpid()}_0_log.err").write_text("", encoding="utf-8")
    with lock(tmp_path / "out/.workers" / kept[0] / LOCK_FILE):
        launch(one_run(path, tmp_path / "out"), "local", 1, 1, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/.workers").iterdir()) == sorted(kept)


def test_the_token_is_in_no_failure_note_and_no_traceback(tmp_path, monkeypatch, capfd, tried):
    monkeypatch.setenv("DFZSL_TEACHER_TOKEN", "S3CRET-t0ken")
    path = write_features(tmp_path / "x.npz", per_class=8)

    def echo(*_: object) -> None:
        raise RuntimeError("BAD Bearer S3CRET-t0ken")

    monkeypatch.setattr(workers, "run", echo)
    work(one_run(path, tmp_path / "out"), 1)
    (note,) = (tmp_path / "out").rglob("failed.txt")
    assert note.read_text(encoding="utf-8") == "RuntimeError: BAD Bearer [token]\n"
    assert "S3CRET" not in str(UserError("BAD Bearer S3CRET-t0ken"))
    with pytest.raises(SystemExit) as left:
        run_program(echo)
    said = capfd.readouterr().err
    assert left.value.code == 1 and "Traceback" in said and "[token]" in said and "S3CRET" not in said
    tried("HTTP teacher", "token echoed in an error, a note, a traceback", 3, "in none of them")


def test_a_second_ctrl_c_leaves_no_worker_running(tmp_path, monkeypatch, tried):
    class Task:
        cancelled = 0

        def done(self) -> bool:
            raise KeyboardInterrupt

        def cancel(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            Task.cancelled += 1

    monkeypatch.setattr("submitit.AutoExecutor.submit", lambda *_: Task())
    jobs = planned_jobs(["base2new", "--methods", "ZeroshotCLIP", "shapes", "1", "2"])
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(jobs, "local", 2, 1, tmp_path / "out")
        assert Task.cancelled == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, was)
    tried("killed", "Ctrl-C twice in a sweep", 1, "every worker ended")
