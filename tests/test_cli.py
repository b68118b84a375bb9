"""Test the command `dfzsl` and its functions with the built-in model, on images of colored squares."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import fake_data
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image

import dfzsl
from dfzsl import train
from dfzsl.cli import experiments
from dfzsl.cli import main as cli
from dfzsl.configs import CONFIGS
from dfzsl.datasets.labeled_images import LabeledFeatures
from dfzsl.io.class_names import read_classnames
from dfzsl.launch.runs import PROTOCOLS
from dfzsl.report import FORMATS
from dfzsl.trainers.clip.loading import load_backbone, parse_identity
from dfzsl.trainers.dfzsl import DFZSL
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.oracle import Oracle
from dfzsl.trainers.recovery.teacher import Teacher

BASE = ["red star", "blue circle", "green square", "striped red circle", "dotted blue star"]
NEW = ["yellow ring", "black cross"]
SMALL = ("OPTIM.MAX_EPOCH", "1", "RECOVERY.NUM_PER_CLASS", "16", "DATALOADER.TRAIN_X.BATCH_SIZE", "16")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("shapes")


@pytest.fixture(scope="module")
def teacher(backbone, tmp_path_factory) -> Path:
    rows = backbone.class_features(BASE, ["a photo of a {}."])
    rows = rows - rows.mean(0) + 0.02 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("owner") / "teacher.safetensors"
    Teacher(rows, BASE, backbone.identity).save(path)
    return path


@pytest.fixture(scope="module")
def built(teacher, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("client") / "classifier.safetensors"
    dfzsl.build(teacher, NEW, settings=SMALL).save(output)
    return output


@pytest.fixture
def run(monkeypatch, capfd):
    """run(words...) -> (exit code, stdout, stderr) of the console command, in this process."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dfzsl", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.entry()
        out, err = capfd.readouterr()
        code = stopped.value.code
        return int(code or 0), out, err

    return call


def pictures(folder: Path, names: list[str], count: int = 2) -> Path:
    for label, name in enumerate(names):
        for number in range(count):
            path = folder / name.replace(" ", "_") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng((label, number)).integers(0, 256, (64, 64, 3), dtype="uint8")
            Image.fromarray(pixels).save(path)
    return folder


class TestImports:
    @pytest.mark.parametrize("module", ["dfzsl", "dfzsl.cli.main", "dfzsl.io.file_summary"])
    def test_light_modules_import_no_torch(self, module):
        program = f"import {module}, sys; sys.exit('torch' in sys.modules or 'dassl' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program]).returncode == 0

    def test_every_public_name_is_there_and_listed(self):
        assert set(dfzsl.__all__) <= set(dir(dfzsl))
        for name in dfzsl.__all__:
            assert callable(getattr(dfzsl, name)) and getattr(dfzsl, name).__doc__
        with pytest.raises(AttributeError, match="no attribute 'unheard_of'"):
            dfzsl.unheard_of  # noqa: B018

    def test_the_stub_names_what_the_package_gives(self):
        stub = (ROOT / "dfzsl/__init__.pyi").read_text(encoding="utf-8")
        assert all(f" as {name}" in stub or f"\n{name} = " in stub for name in dfzsl.__all__)


def commands(group: click.Group, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command below a group by its words."""
    found = {}
    for name, command in group.commands.items():
        found[(*words, name)] = command
        if isinstance(command, click.Group):
            found |= commands(command, (*words, name))
    return found


COMMANDS = {(): cli.main, **commands(cli.main)}
MODULES = {
    "dfzsl.cli.main": cli.main,
    "dfzsl.launch": experiments.launch,
    "dfzsl.report": experiments.report,
    "dfzsl.prepare": experiments.prepare,
    "dfzsl": cli.main,
}
SCRIPTS = {"data/prepare.py": "DATASET", "dfzsl/pictures.py": "RUN", "dfzsl/predict.py": "IMAGE"}
SCRIPTS |= {f"shapes/{name}.py": "OPTIONS" for name in ("measure", "train_clip", "train_vit")}


class TestHelp:
    @pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
    def test_names_the_command_and_gives_an_example(self, words):
        for flag in ("-h", "--help"):
            out = (
                CliRunner().invoke(cli.main, [*words, flag], prog_name="dfzsl", catch_exceptions=False).output
            )
            assert out.split()[: len(words) + 2] == ["Usage:", "dfzsl", *words]
        if not isinstance(COMMANDS[words], click.Group):
            assert f"Example:\n    dfzsl {' '.join(words)} " in out

    @pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
    def test_every_argument_of_the_usage_is_explained(self, words):
        command = COMMANDS[words]
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        for argument in arguments:
            for name in re.findall("[A-Z]{4,}", argument.make_metavar(click.Context(command))):
                assert name in command.help or name in ("NAME", "FILE", "CLASSIFIER"), name

    @pytest.mark.parametrize("module", MODULES)
    def test_modules_name_themselves(self, module):
        words = [sys.executable, "-m", module, "--help"]
        out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert out.startswith(f"Usage: python -m {module} ")

    def test_the_module_and_the_command_are_the_same(self):
        assert all(
            cli.main.commands[name] is command for name, command in experiments.launch.commands.items()
        )
        for module in ("report", "prepare", "extract"):
            assert cli.main.commands[module] is getattr(experiments, module)

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_scripts_name_themselves(self, script):
        words = [sys.executable, ROOT / "scripts" / script, "--help"]
        out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert out.startswith(f"Usage: {Path(script).name} ") and SCRIPTS[script] in out.splitlines()[0]

    def test_completion_needs_no_torch(self):
        environment = {**os.environ, "_DFZSL_COMPLETE": "bash_complete"}
        for words, expected in (("dfzsl teach", "teacher"), ("dfzsl base2new --meth", "--methods")):
            line = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
            program = "import sys; sys.argv[0] = 'dfzsl'; from dfzsl.cli.main import entry\ntry: entry()\n"
            program += "finally: assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
            done = subprocess.run(
                [sys.executable, "-c", program], env={**environment, **line}, capture_output=True, text=True
            )
            assert done.returncode == 0 and expected in done.stdout, done.stderr

    def test_a_reader_that_stops_early_gets_no_traceback(self):
        words = [sys.executable, "-m", "dfzsl.report", "--glossary"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            assert process.stderr.read() == b""

    def test_choices_are_those_of_the_library(self):
        assert set(experiments.PROTOCOL_SUMMARIES) == set(PROTOCOLS)
        (choice,) = [p.type for p in experiments.report.params if p.name == "table_format"]
        assert list(choice.choices) == list(FORMATS)


class TestBuild:
    def test_is_the_trainers_classifier_byte_for_byte(self, teacher, tmp_path, run):
        """train.py with a data set of the same names and `dfzsl build` without any."""
        names = [*BASE, *NEW]
        x = F.normalize(torch.randn(len(names), 128), dim=1).numpy()
        np.savez(tmp_path / "names.npz", x_test=x, y_test=np.arange(7), classnames=names, new=[5, 6])
        words = ["--trainer", "DFZSL", "--root", str(tmp_path / "names.npz"), "--seed", "3"]
        words += ["--config-file", str(CONFIGS / "trainers/DFZSL/dfzsl.yaml"), "--backbone", "shapes"]
        words += ["--dataset-config-file", str(CONFIGS / "datasets/features.yaml")]
        words += ["--output-dir", str(tmp_path / "run"), "DATASET.SUBSAMPLE_CLASSES", "base"]
        train.main([*words, "TEACHER.FILE", str(teacher), "GEOMETRY.FILE", "shapes", *SMALL])
        (tmp_path / "new.txt").write_text("yellow ring\n\nblack cross\n")
        output = tmp_path / "c.safetensors"
        code, out, _ = run(
            "build", "--teacher", teacher, "--new", tmp_path / "new.txt", "--seed", 3, "-o", output, *SMALL
        )
        assert code == 0
        assert output.read_bytes() == (tmp_path / "run/classifier.safetensors").read_bytes()
        for said in ("131 queries", "5 base + 2 new classes", "FLPT, 1 epochs", "teacher weight"):
            assert said in out
        assert sorted(path.name for path in tmp_path.glob("*c.safetensors*")) == ["c.safetensors"]

    def test_goes_on_where_it_stopped(self, teacher, tmp_path, run, monkeypatch):
        """What a killed build has asked and tuned is not done again, and the result is the same."""
        words = ("build", "--teacher", teacher, "--new", ",".join(NEW), *SMALL)
        assert run(*words, "-o", tmp_path / "whole.safetensors")[0] == 0

        def stop(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(DFZSL, "generate", stop)
            code, _, err = run(*words, "-o", tmp_path / "again.safetensors")
        assert code == 130 and "interrupted" in err
        assert not (tmp_path / "again.safetensors").exists()
        monkeypatch.setattr(Oracle, "__call__", lambda *_: pytest.fail("asked again"))
        assert run(*words, "-o", tmp_path / "again.safetensors")[0] == 0
        whole, again = (tmp_path / f"{name}.safetensors" for name in ("whole", "again"))
        assert whole.read_bytes() == again.read_bytes()
        assert not list(tmp_path.glob(".*.build"))

    def test_a_teacher_in_memory(self, teacher, built):
        made = dfzsl.build(dfzsl.load_teacher(teacher), NEW, settings=SMALL)
        assert torch.equal(made.weight, Classifier.load(built).weight)

    def test_the_backbone_is_the_teachers_own(self):
        assert parse_identity("shapes (bc07)") == ("shapes", "openai")
        assert parse_identity("ViT-B-16 (laion2b_s34b_b88k)") == ("ViT-B-16", "laion2b_s34b_b88k")

    def test_names_of_classes(self, tmp_path):
        (tmp_path / "a.json").write_text('["one", "two words"]')
        (tmp_path / "a.txt").write_text("one\n two words \n\n")
        for source in (tmp_path / "a.json", tmp_path / "a.txt", "one,  two words"):
            assert read_classnames(str(source)) == ["one", "two words"]


class TestAdd:
    def test_old_rows_stay_and_the_new_one_is_its_text_in_the_tuned_context(self, built, tmp_path, run):
        more = tmp_path / "more.safetensors"
        code, out, _ = run("add", built, "--new", "white arrow", "-o", more)
        assert code == 0 and "5 base + 3 new classes" in out
        old, new = Classifier.load(built), Classifier.load(more)
        assert torch.equal(new.weight[:7], old.weight) and torch.equal(new.bias[:7], old.bias)
        assert new.classnames == [*BASE, *NEW, "white arrow"]
        assert float(new.bias[7]) == pytest.approx(old.new_bias)
        assert torch.equal(new.prompts.context, old.prompts.context)

    def test_equals_a_name_that_was_there_from_the_start(self, teacher, backbone):
        """Without a generator and bias a new class's row is its text, whether it came first or last."""
        plain = (*SMALL, "GENERATOR.NAME", "none", "GENERATOR.CALIBRATE", "False")
        whole = dfzsl.build(teacher, NEW, settings=plain)
        later = dfzsl.build(teacher, NEW[:1], settings=plain).add(NEW[1:], backbone)
        assert torch.allclose(whole.weight[5:], later.weight[5:], atol=1e-5)


def test_an_export_keeps_a_file_that_is_not_its_own(built, tmp_path, run):
    (tmp_path / "names.txt").write_text("mine")
    code, _, errors = run("export", built, "-o", tmp_path / "names.pt")
    assert code == 2 and "names.txt" in errors and (tmp_path / "names.txt").read_text() == "mine"
    for _ in range(2):
        assert run("export", built, "-o", tmp_path / "matrix.pt")[0] == 0


def test_a_mistake_does_not_block_the_corrected_command(teacher, tmp_path, run):
    words = ("build", "--teacher", teacher, "--new", ",".join(NEW), "-o", tmp_path / "c.safetensors", *SMALL)
    code, _, errors = run(*words, "GENERATOR.NAME", "nosuch")
    assert code == 2 and "nosuch" in errors
    assert run(*words)[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "folder", "--confusion", "c.txt"),
        ("build", "--teacher", "t", "--new", "a", "-o", "."),
        ("teacher", "fit", "folder", "-o", "."),
        ("extract", "dtd", "--output", "."),
        ("base2new", "shapes", "--workers", "-1"),
        ("base2new", "shapes", "--gpus-per-run", "0"),
        ("build", "--teacher", "t", "--new", "a", "--seed", "4294967296"),
    ],
)
def test_values_out_of_range_are_one_line(words, run):
    code, _, errors = run(*words)
    assert code == 2 and errors.count("\n") == 1


class TestPredict:
    def test_files_folders_and_globs_each_once(self, built, tmp_path, run):
        folder = pictures(tmp_path / "p", BASE[:3])
        (folder / "notes.txt").write_text("no picture")
        code, out, _ = run("predict", "-c", built, folder / "red_star/0.png", f"{folder}/**/*.png", folder)
        assert code == 0
        assert sum(line.startswith(str(folder)) for line in out.splitlines()) == 6

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_bad_file_is_named_and_left_out(self, built, tmp_path, run, workers):
        folder = pictures(tmp_path / "p", BASE[:2])
        (folder / "broken.png").write_bytes(b"none")
        words = (
            "predict",
            folder,
            tmp_path / "gone.jpg",
            "-c",
            built,
            "--workers",
            workers,
            "--batch-size",
            2,
        )
        code, out, err = run(*words, "--format", "jsonl")
        assert code == 1
        assert len(out.splitlines()) == 4
        lines = [line for line in err.splitlines() if line]
        assert "broken.png" in lines[0] and "gone.jpg" in lines[1] and lines[2].startswith("2 of 6 files")

    def test_the_formats_say_the_same(self, built, tmp_path, run, backbone):
        path = pictures(tmp_path / "p", BASE[:1], 1) / "red_star/0.png"
        words = ("predict", path, "-c", built, "--top", 3)
        rows = list(csv.DictReader(io.StringIO(run(*words, "--format", "csv")[1])))
        told = json.loads(run(*words, "--format", "jsonl")[1])
        table = run(*words)[1]
        x = backbone.encode_image(backbone.transform(Image.open(path))[None])
        chances = Classifier.load(built).logits(x).softmax(1)[0].topk(3)
        names = [[*BASE, *NEW][place] for place in chances.indices.tolist()]
        assert [row["class"] for row in rows] == [row["class"] for row in told["classes"]] == names
        assert [float(row["probability"]) for row in rows] == pytest.approx(chances.values.tolist(), abs=1e-5)
        assert [row["rank"] for row in rows] == ["1", "2", "3"] and told["image"] == rows[0]["image"] == str(
            path
        )
        assert all(name in table for name in names)

    def test_more_classes_than_there_are(self, built, tmp_path, run):
        folder = pictures(tmp_path / "p", BASE[:1], 1)
        assert (
            len(
                json.loads(run("predict", folder, "-c", built, "--top", 99, "--format", "jsonl")[1])[
                    "classes"
                ]
            )
            == 7
        )


class TestEvaluate:
    def test_a_folder_by_class(self, built, tmp_path, run, backbone):
        folder = pictures(tmp_path / "p", [*BASE, *NEW], 3)
        (folder / "red_star" / "broken.png").write_bytes(b"none")
        known = Classifier.load(built)
        result = dfzsl.evaluate(known, folder, num_workers=0)
        files = sorted(path for path in folder.glob("*/*.png") if path.name != "broken.png")
        x = backbone.encode_image(torch.stack([backbone.transform(Image.open(path)) for path in files]))
        names = [path.parent.name.replace("_", " ") for path in files]
        for part, joint, own in ((result.base, result.joint_base, BASE), (result.new, result.joint_new, NEW)):
            mine = [row for row, name in enumerate(names) if name in own]
            within = [own[c] for c in known.logits(x[mine], own).argmax(1).tolist()]
            among = [known.classnames[c] for c in known.logits(x[mine]).argmax(1).tolist()]
            truth = [names[row] for row in mine]
            assert part == pytest.approx(100 * np.mean(np.array(within) == truth))
            assert joint == pytest.approx(100 * np.mean(np.array(among) == truth))
        assert result.confusion.sum() == 21 and len(result.wrong) == 1
        code, out, err = run("evaluate", folder, "-c", built, "--confusion", tmp_path / "c.png")
        assert code == 1 and "broken.png" in err and f"{result.joint_h:.1f}" in out
        assert Image.open(tmp_path / "c.png").size[0] > 300

    def test_a_feature_file(self, built, tmp_path):
        known = Classifier.load(built)
        x = known.weight[[0, 0, 5, 6]] - (0 if known.shift is None else known.shift)
        labels, names = np.array([2, 2, 0, 1]), [*NEW, "red star"]
        np.savez(tmp_path / "f.npz", x_test=x.numpy(), y_test=labels, classnames=names)
        result = dfzsl.evaluate(known, tmp_path / "f.npz")
        assert (result.base, result.new, result.h) == (100, 100, 100)
        only = dfzsl.evaluate(
            known, LabeledFeatures(x[:2], torch.zeros(2, dtype=torch.long), ["red star"], "", [])
        )
        assert only.base == 100 and np.isnan(only.new) and "-" in only.table()


def test_fit_is_fit_teacher(tmp_path, run):
    data = np.load(fake_data.make("Features", tmp_path))
    code, out, err = run(
        "teacher", "fit", tmp_path / "features.npz", "-o", tmp_path / "t.safetensors", "--linear"
    )
    assert code == 0 and "Teacher(linear, 5 classes" in out and err == ""  # no bar where no terminal is
    x = F.normalize(torch.from_numpy(np.concatenate([data["x_train"], data["x_val"]])).float(), dim=1)
    y = torch.from_numpy(np.concatenate([data["y_train"], data["y_val"]]))
    text = F.normalize(torch.from_numpy(data["text"]).float(), dim=1)
    expected = dfzsl.fit_teacher(x, y, list(fake_data.NAMES), text=text, prompts="'a photo of a {}.'")
    found = Teacher.load(tmp_path / "t.safetensors")
    assert torch.allclose(found.weight, expected.weight, atol=1e-5)
    assert found.card == expected.card and found.card.text == "'a photo of a {}.'"
    words = (
        "teacher",
        "fit",
        tmp_path / "features.npz",
        "--classes",
        "goldfish, tench",
        "-o",
        tmp_path / "two",
    )
    assert run(*words)[0] == 0
    assert Teacher.load(tmp_path / "two").classnames == ["goldfish", "tench"]
    np.savez(tmp_path / "bare.npz", **{name: array for name, array in data.items() if name != "text"})
    _, out, _ = run("teacher", "fit", tmp_path / "bare.npz", "-o", tmp_path / "bare.safetensors")
    assert "no model card" in out
    assert Teacher.load(tmp_path / "bare.safetensors").card is None


def test_a_client_with_another_text_is_told(tmp_path, run):
    """The weight on an owner's card belongs to the text that it was measured beside."""
    folder = pictures(tmp_path / "base", BASE, 6)
    fitted = ("teacher", "fit", folder, "--backbone", "shapes", "-o", tmp_path / "t", "--text", "a drawn {}")
    code, _, errors = run(*fitted)
    assert code == 0, errors
    assert "a drawn {}" in run("show", tmp_path / "t")[1]
    words = ("build", "--teacher", tmp_path / "t", "--new", "yellow ring", "-o", tmp_path / "c")
    for text, warned in (("a drawn {}", False), ("ensemble", True)):
        code, out, errors = run(*words, "--text", text, *SMALL)
        assert code == 0, errors
        assert ("with the prompts 'a drawn {}'" in " ".join(out.split())) == warned, out


def test_show_tells_what_a_file_is(teacher, built, tmp_path, run):
    dfzsl.recover(open_oracle(teacher, "logits"), torch.eye(5, 128), BASE).save(
        tmp_path / "virtual.safetensors"
    )
    for path, said in (
        (teacher, ("teacher: the owner", "5: red star, blue circle", "shapes (")),
        (built, ("base classes", "2: yellow ring, black cross", "a photo of a {}.")),
        (tmp_path / "virtual.safetensors", ("virtual classes", "closed_form", "131")),
    ):
        code, out, _ = run("show", path)
        assert code == 0 and all(word in out for word in said), out


def test_every_public_object_says_what_it_is_in_a_line(teacher, built, backbone):
    oracle = open_oracle(teacher, "logits")
    virtual = dfzsl.recover(oracle, torch.eye(5, 128), BASE)
    for thing in (Teacher.load(teacher), Classifier.load(built), oracle, virtual, backbone):
        said = repr(thing)
        assert said.startswith(type(thing).__name__) and "\n" not in said and len(said) < 140
        assert "128" in said


MISTAKES = {
    "no such command": ("bild",),
    "no such option": ("build", "--techer", "x"),
    "a missing option": ("build", "--new", "a"),
    "no such teacher": ("build", "--teacher", "none.safetensors", "--new", "a"),
    "no such names": ("build", "--teacher", "{teacher}", "--new", "none.txt"),
    "a name that is a base class": ("build", "--teacher", "{teacher}", "--new", "red star"),
    "an unknown key": ("build", "--teacher", "{teacher}", "--new", "a", "RECOVERY.NONE", "1"),
    "an option after a pair": ("build", "RECOVERY.THETA", "-1", "--techer", "x"),
    "a mistyped option of a sweep": ("base2new", "--metods", "CoOp", "shapes"),
    "shots that are none": ("base2new", "--shots", "0", "shapes"),
    "no input of a report": ("report",),
    "an unknown data set": ("prepare", "imagnet"),
    "half a pair": ("build", "--teacher", "{teacher}", "--new", "a", "RECOVERY.THETA"),
    "an unknown level": ("build", "--teacher", "{teacher}", "--new", "a", "--access", "all"),
    "another backbone": (
        "build",
        "--teacher",
        "{teacher}",
        "--new",
        "a",
        "--backbone",
        "shapes",
        "--weights",
        "random",
    ),
    "a name that is there": ("add", "{built}", "--new", "yellow ring"),
    "a classifier that is a teacher": ("add", "{teacher}", "--new", "a"),
    "an empty folder": ("predict", "{empty}", "-c", "{built}"),
    "a glob of nothing": ("predict", "{empty}/*.png", "-c", "{built}"),
    "no such device": ("predict", "{picture}", "-c", "{built}", "--device", "quantum"),
    "a class that it does not know": ("evaluate", "{unknown}", "-c", "{built}"),
    "no data": ("evaluate", "{empty}", "-c", "{built}"),
    "a file of nobody's": ("show", "{picture}"),
    "a class that is not there": ("teacher", "fit", "{unknown}", "--classes", "x", "--backbone", "shapes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, teacher, built, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    unknown = pictures(tmp_path / "unknown", ["zebra", "yak"], 1)
    places = {"teacher": teacher, "built": built, "empty": tmp_path / "empty", "unknown": unknown}
    places["picture"] = unknown / "yak/0.png"
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*(word.format(**places) for word in MISTAKES[mistake]))
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line and "img/s" not in line and "encode:" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    if mistake not in ("another backbone", "an unknown level"):
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "suggested"),
    [(("bild",), "build"), (("build", "--techer", "x"), "--teacher"), (("xd", "--metods", "A"), "--methods")],
)
def test_a_mistyped_word_gets_a_suggestion(words, suggested, run):
    _, _, err = run(*words)
    assert f"'{suggested}'" in err


class TestExport:
    @pytest.mark.parametrize("encoder", [False, True])
    def test_onnx_says_what_the_classifier_says(self, built, tmp_path, run, backbone, encoder):
        import onnxruntime

        path = tmp_path / "c.onnx"
        code, out, _ = run("export", built, "-o", path, *["--with-encoder"] * encoder)
        assert code == 0 and "onnxruntime differs by at most" in out
        session = onnxruntime.InferenceSession(str(path))
        about = session.get_modelmeta().custom_metadata_map
        assert json.loads(about["classnames"]) == [*BASE, *NEW]
        for n in (1, 5):
            x = torch.rand(n, *((3, 64, 64) if encoder else (128,)))
            features = backbone.encode_image(x) if encoder else x
            made = session.run(["logits"], {"pictures" if encoder else "features": x.numpy()})[0]
            assert made == pytest.approx(Classifier.load(built).logits(features).numpy(), abs=1e-2)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["c.onnx"]

    def test_a_matrix_for_open_clip(self, built, tmp_path, run):
        code, out, _ = run("export", built, "-o", tmp_path / "m.pt")
        assert code == 0 and "without the shift of image features" in out
        matrix = torch.load(tmp_path / "m.pt", weights_only=True)
        assert torch.equal(matrix.T, Classifier.load(built).weight)
        assert (tmp_path / "m.txt").read_text().splitlines() == [*BASE, *NEW]

    def test_mistakes_are_one_line(self, built, tmp_path, run):
        for words in (("-o", tmp_path / "c.tflite"), ("-o", tmp_path / "m.pt", "--with-encoder")):
            code, out, err = run("export", built, *words)
            assert (code, out, err.count("\n")) == (2, "", 1)


def test_import_takes_over_a_linear_layer(backbone, tmp_path, run):
    layer = torch.nn.Linear(128, 3)
    torch.save(layer.state_dict(), tmp_path / "head.pt")
    output = tmp_path / "t.safetensors"
    words = (
        "teacher",
        "import",
        tmp_path / "head.pt",
        "--classes",
        "a, b, c",
        "--backbone",
        "shapes",
        "-o",
        output,
    )
    code, out, _ = run(*words)
    assert code == 0 and "Teacher(linear with intercepts, 3 classes" in out
    made, x = Teacher.load(output), torch.randn(4, 128)
    assert made.backbone == backbone.identity
    assert torch.allclose(made.logits(x), layer(x), atol=1e-5)


def test_a_token_is_shown_once_and_revoked(teacher, tmp_path, run):
    ledger = ("--ledger", tmp_path / "l.ledger")
    code, token, _ = run("teacher", "token", teacher, "client", *ledger)
    assert code == 0 and len(token.strip()) > 30
    assert token.strip().encode() not in (tmp_path / "l.ledger").read_bytes()
    assert run("teacher", "token", teacher, "client", *ledger)[0] == 2
    assert run("teacher", "token", teacher, "client", "--revoke", *ledger)[1] == "client: revoked\n"
    assert run("teacher", "token", teacher, "client", *ledger)[0] == 0
