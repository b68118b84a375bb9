"""Test checkouts as methods, with stand-ins (tests/standins) in the layout of CoOp and MaPLe."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_data
import pytest
from conftest import ROOT
from dassl.data import data_manager
from sweeps import planned_jobs, start_sweep

from dfzsl.io.files import digest
from dfzsl.io.results import VOLATILE_KEYS, read_results
from dfzsl.launch import host
from dfzsl.launch.checkouts import RECIPES, Checkout, CodeVersion
from dfzsl.launch.sweep import choose
from dfzsl.launch.workers import work
from dfzsl.trainers.clip.loading import copy_to_clip_cache
from dfzsl.utils.errors import UserError

STANDINS = Path(__file__).parent / "standins"
ON_SHAPES = ["oxford_pets", "1", "MODEL.BACKBONE.NAME", "shapes", "OPTIM.MAX_EPOCH", "3"]


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True
    ).stdout


def checkout(kind: str, folder: Path, commit: bool = True) -> Path:
    """A stand-in, under git or not."""
    for part in ("common", kind):
        shutil.copytree(
            STANDINS / part, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    clip = folder / "clip" / "clip.py"
    clip.write_text(clip.read_text().replace("CHECKSUM", digest(ROOT / "datasets/shapes/clip.safetensors")))
    if commit:
        git(folder, "init", "-q")
        git(folder, "remote", "add", "origin", "https://me:secret@example.org/them/theirs")
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "as published")
    return folder


def jobs(*words: str, protocol: str = "base2new"):
    return planned_jobs([protocol, *words])


@pytest.fixture
def world(tmp_path: Path, monkeypatch) -> Path:
    fake_data.make("OxfordPets", tmp_path / "data")
    checkout("coop", tmp_path / "theirs")
    checkout("maple", tmp_path / "maple-code", commit=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder: Path, methods: str, *words: str) -> subprocess.Popen:
    given = ["base2new", "--methods", methods, "--root", "data", "--workers", "2"]
    return start_sweep(folder, *given, *(words or ON_SHAPES))


def outcome(folder: Path) -> dict[str, dict]:
    """Return every result without fields that depend on the clock."""
    found = {}
    for path in (folder / "output").rglob("results.json"):
        results = json.loads(path.read_text())
        for key in VOLATILE_KEYS:
            results.pop(key, None)
        del results["versions"]["revision"]
        # Results must not depend on the folder of the run.
        found[str(path.relative_to(folder))] = json.loads(json.dumps(results).replace(str(folder), ""))
    return found


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_makes_a_command_line_in_every_protocol(name, world):
    made = Checkout(name, world / "theirs", "", CodeVersion.of(world / "theirs"))
    for protocol, dataset in itertools.product(
        ("base2new", "xd", "dg", "fewshot"), ("oxford_pets", "imagenet")
    ):
        recipe = made.recipe(protocol, dataset, 16)
        assert recipe.config.endswith(".yaml") and "{" not in recipe.config
        assert all(key.isupper() or key.startswith("TRAINER.") for key in {**recipe.opts, **recipe.cpu})
    (address,) = re.findall(r"^# (https://github\.com/[\w./-]+)", (RECIPES / f"{name}.yaml").read_text())
    page = (ROOT / "docs/checkouts.md").read_text()
    assert any(f"`{name}`" in line and f"({address})" in line for line in page.splitlines())


def test_a_case_of_a_recipe_applies_where_all_its_labels_match(world):
    mmrl = Checkout("MMRL", world / "theirs", "", CodeVersion.of(world / "theirs"))
    configs = {
        case: mmrl.recipe(*case, 16)
        for case in (("base2new", "dtd"), ("base2new", "imagenet"), ("xd", "imagenet"))
    }
    assert [Path(recipe.config).stem for recipe in configs.values()] == [
        "vit_b16",
        "vit_b16_imagenet",
        "vit_b16_cross_datasets",
    ]
    assert [recipe.opts["TASK"] for recipe in configs.values()] == ["B2N", "B2N", "CD"]
    protext = Checkout("ProText", world / "theirs", "", CodeVersion.of(world / "theirs")).recipe(
        "base2new", "dtd", 16
    )
    assert (protext.config, protext.dassl) == (
        "configs/trainers/ProText/base2novel/dtd.yaml",
        "Dassl.pytorch",
    )
    coop = Checkout("CoOp", world / "theirs", "", CodeVersion.of(world / "theirs"))
    assert [Path(coop.recipe("fewshot", "dtd", shots).config).stem for shots in (1, 2, 16)] == [
        "rn50_ep50",
        "rn50_ep100",
        "rn50",
    ]


def test_checkouts_combine_with_all_methods(world):
    methods = choose("all,CoOp@theirs")
    assert methods[0].trainer == "TeacherZeroshot"
    assert [method.name for method in methods][-1].startswith("CoOp@theirs-") and len(methods) > 5


def test_runs_have_coops_folders_and_the_version_of_the_code(world):
    (job,) = jobs("--methods", "coop@theirs", "--root", "data", *ON_SHAPES)
    commit = git(world / "theirs", "rev-parse", "HEAD").strip()
    (trained, words), (_, test_words) = job.parts()
    assert trained.as_posix() == (
        f"output/base2new/train_base/oxford_pets/shots_16/CoOp@theirs-{commit[:7]}/vit_b16_ep50_ctxv1/seed1"
    )
    assert words[words.index("--config-file") + 1].startswith(str(world / "theirs/configs/trainers"))
    assert words[words.index("--dataset-config-file") + 1].startswith(str(world / "theirs/configs/datasets"))
    assert words[-4:] == ON_SHAPES[2:]
    assert words[words.index("--root") + 1] == str(world / "data")  # it runs elsewhere
    assert test_words[test_words.index("--model-dir") + 1] == str(trained.absolute())
    assert job.method.provenance == f"the code of https://example.org/them/theirs, commit {commit[:12]}"
    assert Checkout.parse("MaPLe@maple-code").name == "MaPLe@maple-code-no-git"


def test_few_shots_are_runs_of_the_whole_data_set_by_the_recipes_configs(world):
    for config in ("rn50_ep50", "rn50_ep100", "rn50"):
        (world / f"theirs/configs/trainers/CoOp/{config}.yaml").touch()
    planned = jobs("--methods", "CoOp@theirs", "--root", "data", *ON_SHAPES, protocol="fewshot")
    told = [
        (job.shots, folder.parts[-2], "--eval-only" in words)
        for job in planned
        for folder, words in job.parts()
    ]
    assert told == [
        (1, "rn50_ep50", False),
        (2, "rn50_ep100", False),
        (4, "rn50_ep100", False),
        (8, "rn50", False),
        (16, "rn50", False),
    ]


def test_a_changed_checkout_has_its_own_folder_and_further_changes_are_refused(world):
    words = ["--root", "data", *ON_SHAPES]
    (before,) = jobs("--methods", "CoOp@theirs", *words)
    with open(world / "theirs/trainers/method.py", "a") as file:
        file.write("# mine\n")
    (after,) = jobs("--methods", "CoOp@theirs", *words)
    assert after.method.name == before.method.name + "-modified"
    assert after.method.provenance.endswith(", modified")
    after.settings.parent.mkdir(parents=True)
    after.settings.write_text(after.identity)
    jobs("--methods", "CoOp@theirs", *words)
    with open(world / "theirs/trainers/method.py", "a") as file:
        file.write("# and more\n")
    with pytest.raises(UserError, match=r"theirs .*--output"):
        jobs("--methods", "CoOp@theirs", *words)
    (world / "theirs/configs/datasets/oxford_pets.yaml").write_text("DATASET: {NAME: OxfordPets}\n# other\n")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("MaPLe@/nowhere/at/all", "/nowhere/at/all"),
        ("MaPLe@data", r"train\.py.*data"),
        ("MaPLe@.", r"train\.py.*maple-code, theirs"),
        (
            "Mine@theirs",
            r"'Mine'.*MaPLe.*theirs/dfzsl\.yaml",
        ),
        ("MaPLe@theirs", "configs/trainers/MaPLe/"),
        ("CoOp@theirs:rn51", r"rn51\.yaml.*vit_b16_ep50_ctxv1"),
        ("CoOp@virtul", "'CoOp@virtul'"),
    ],
)
def test_an_error_is_reported_in_one_line(method, message, world):
    with pytest.raises(UserError, match=message):
        jobs("--methods", method, "--root", "data", *ON_SHAPES)


def test_an_unsupported_data_set_or_protocol_is_refused(world):
    with pytest.raises(UserError, match=r"configs/datasets/dtd\.yaml.*oxford_pets"):
        jobs("--methods", "CoOp@theirs", "dtd", "1")
    with pytest.raises(UserError, match="gzsl"):
        jobs("--methods", "CoOp@theirs", "oxford_pets", "1", protocol="gzsl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: Mine", "trainer.*config"),
        ("- trainer", "trainer.*config"),
        ("{trainer: Mine, config: a.yaml, epochs: 3}", "'epochs'"),
        ("{trainer: Mine, config: a.yaml, opts: A}", "opts.*'A'"),
        ("{trainer: Mine, config: a.yaml, when: {xd: 3}}", "trainer.*config"),
        ("{trainer: Mine, config: a.yaml, when: [xd]}", "trainer.*config"),
    ],
)
def test_an_invalid_recipe_is_reported(text, message, world):
    (world / "theirs/dfzsl.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        choose("Mine@theirs")


def test_a_checkouts_own_recipe_takes_precedence(world):
    (world / "theirs/dfzsl.yaml").write_text(
        "{trainer: CoOp, config: configs/trainers/CoOp/vit_b16_ep50_ctxv1.yaml, "
        "opts: {TRAINER.COOP.N_CTX: 4}}"
    )
    (job,) = jobs("--methods", "Mine@theirs", "--root", "data", *ON_SHAPES, "RECOVERY.THETA", "2")
    words = job.parts()[0][1]
    assert words[words.index("TRAINER.COOP.N_CTX") + 1] == "4"
    assert "RECOVERY.THETA" not in words  # a key that is ours alone
    assert job.method.name.startswith("Mine@theirs-")


def test_a_failed_run_reports_its_last_lines(world):
    (world / "maple-code/dfzsl.yaml").write_text(
        "{trainer: MaPLe, config: configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml}"  # half on a CPU
    )
    (job,) = jobs("--methods", "MaPLe@maple-code", "--root", "data", *ON_SHAPES)
    work([job], threads=1)
    assert re.search(r"train\.py.* 1.*'Half'", job.failure.read_text())
    assert not job.settings.exists()


def test_weights_are_placed_in_clips_cache_and_others_are_refused(world):
    copy_to_clip_cache("shapes", "openai")
    offered = world / "home/.cache/clip/shapes.pt"
    assert digest(offered) == digest(ROOT / "datasets/shapes/clip.safetensors")
    (world / "mine.pt").write_bytes(b"not OpenAI's")
    with pytest.raises(UserError, match=r"OpenAI.*ViT-B-16"):
        copy_to_clip_cache("ViT-B/16", str(world / "mine.pt"))
    with pytest.raises(UserError, match=r"OpenAI.*ViT-B-16"):
        copy_to_clip_cache("ViT-B/16", "random")
    assert [path.name for path in offered.parent.iterdir()] == ["shapes.pt"]


HOSTED = """
import json, sys
from filelock import FileLock, Timeout
from dassl.data.data_manager import build_dataset
try:
    FileLock(sys.argv[1] + "/.running", timeout=0).acquire()
    held = False
except Timeout:
    held = True
seen = [__name__, sys.argv, held, sys.path[1], build_dataset.__module__]
open("seen.json", "w").write(json.dumps(seen))
"""


@pytest.mark.parametrize("checkpoint_freq", [0, 10])
def test_the_process_of_a_checkout_locks_its_folder_and_starts_again_without_checkpoints(
    checkpoint_freq, world, monkeypatch
):
    folder = world / "output/base2new/train_base/oxford_pets/shots_16/CoOp@theirs/c/seed1"
    (folder / "prompt_learner").mkdir(parents=True)
    for name in ("settings.txt", "log.txt"):
        (folder / name).touch()
    (world / "train.py").write_text(HOSTED)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(data_manager, "build_dataset", data_manager.build_dataset)
    host.main(str(folder), "/a/fork", str(checkpoint_freq), str(folder), "--seed", "1")
    name, argv, held, fork, place = json.loads((world / "seen.json").read_text())
    assert (name, argv) == ("__main__", ["train.py", str(folder), "--seed", "1"])
    assert held and fork == "/a/fork" and place == "dfzsl.launch.host"
    assert (folder / "prompt_learner").exists() == (folder / "log.txt").exists() == bool(checkpoint_freq)
    assert (folder / "settings.txt").exists()


LOG = """** Config **
************
TRAINER: theirs
Collecting env info ...
# train_x  12
Finish training
=> result
* total: 9
* correct: 3
* accuracy: 33.3%
* class: 0 (a cat)\ttotal: 9\tcorrect: 3\tacc: 33.3%
Elapsed: 0:00:02
"""


def test_an_interrupted_checkout_repeats_no_finished_part_and_its_test_loads_the_last_epoch(
    world, monkeypatch
):
    ran = []

    def process(self, folder, words, recipe):
        ran.append(words)
        if len(ran) == 2:
            raise KeyboardInterrupt
        (folder / "prompt_learner").mkdir(parents=True)
        (folder / "prompt_learner/checkpoint").write_text("model.pth.tar-3\n")
        (folder / "log.txt").write_text(LOG)

    monkeypatch.setattr(Checkout, "_process", process)
    (job,) = jobs("--methods", "CoOp@theirs", "--root", "data", *ON_SHAPES)
    with pytest.raises(KeyboardInterrupt):
        work([job], threads=1)
    assert not job.finished and job.settings.read_text() == job.identity
    work([job], threads=1)
    assert job.finished and ["--eval-only" in words for words in ran] == [False, True, True]
    assert ran[2][ran[2].index("--load-epoch") + 1] == "3" and "--load-epoch" not in ran[0]
    trained, tested = (read_results(folder / "results.json") for folder, _ in job.parts())
    assert trained["accuracy"] == tested["accuracy"] == 100 / 3 and trained["config"] == "TRAINER: theirs\n"
    assert (trained["images_used"], tested["images_used"]) == (12, 0)
    assert [run["per_class"][0]["new"] for run in (trained, tested)] == [False, True]
    assert (trained["classes"], tested["classes"], tested["shots"]) == ("base", "new", 16)
    assert trained["notes"][0] == job.method.provenance


@pytest.mark.slow
def test_two_checkouts_and_two_trainers_in_one_killed_and_resumed_sweep(world):
    methods = "CoOp,DFZSL,CoOp@theirs,MaPLe@maple-code"
    quiet, killed = world, world / "killed"
    killed.mkdir()
    for name in ("data", "theirs", "maple-code"):
        shutil.copytree(world / name, killed / name)
    sweep = start(quiet, methods)
    shown, errors = sweep.communicate()
    assert sweep.returncode == 0, errors[-3000:]
    git_name = CodeVersion.of(world / "theirs").short
    for label in ("CoOp ", "DFZSL ", f"CoOp (theirs-{git_name})", "MaPLe (maple-code-no-git)"):
        assert re.search(rf"^{re.escape(label)}", shown, re.MULTILINE), shown
    assert "the code of https://example.org/them/theirs, commit" in shown and "secret" not in shown
    assert "without a GPU, so TRAINER.MAPLE.PREC fp32" in shown

    sweep = start(killed, methods)
    while not list((killed / "output").glob("base2new/train_base/*/*/CoOp@*/*/*/prompt_learner")):
        assert sweep.poll() is None
        time.sleep(0.02)
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.communicate()
    before = len(outcome(killed))
    sweep = start(killed, methods)
    _, errors = sweep.communicate()
    assert sweep.returncode == 0, errors[-3000:]
    assert before < len(outcome(quiet)) == 2 * 5  # with the owner's
    assert outcome(killed) == outcome(quiet)
    theirs = json.loads(
        next((quiet / "output").glob("base2new/test_new/*/*/CoOp@*/*/*/results.json")).read_text()
    )
    assert [row["total"] for row in theirs["per_class"]] == [3, 3] and all(
        row["new"] for row in theirs["per_class"]
    )
    assert theirs["accuracy"] == pytest.approx(100 * sum(row["correct"] for row in theirs["per_class"]) / 6)
    assert "TRAINER:" in theirs["config"] and theirs["backbone"] == "shapes"
