"""Test runs under torchrun: the same steps as in one process, one writer, and an end if a rank dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fake_data import picture

from dfzsl import train
from dfzsl.io.results import VOLATILE_KEYS, read_results
from dfzsl.launch import workers
from dfzsl.launch.runs import Data, Job, Method
from dfzsl.utils.errors import UserError

# Three base classes on two ranks, and batches of three: neither is divisible.
NAMES = [
    "striped red star",
    "dotted blue circle",
    "plain green square",
    "striped blue star",
    "dotted red ring",
]
CASES = {
    "CoOp": (),
    "CoOp-CSC": ("TRAINER.COOP.CSC", "True"),
    "CoCoOp": (),
    "KgCoOp": (),
    # From the template's own words, the direction that ProGrad keeps to is at first a rounding error's.
    "ProGrad": ("TRAINER.COOP.CTX_INIT", ""),
    "FLPT": (),
    "MaPLe": (),
    "PromptSRC": (),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for part in ("train", "test"):
        for number in range(15):
            picture(root / part / NAMES[number % 5] / f"{number}.jpg", number % 5, number)
    return root


def words(case: str, pictures: Path, output: Path) -> list[str]:
    trainer = case.partition("-")[0]
    return [
        *("--trainer", trainer, "--root", str(pictures), "--seed", "1", "--output-dir", str(output / case)),
        *("--dataset-config-file", str(ROOT / "configs/datasets/folder.yaml")),
        *("--config-file", str(ROOT / f"configs/trainers/{trainer}/shapes.yaml")),
        *("DATASET.SUBSAMPLE_CLASSES", "base", "INPUT.TRANSFORMS", "['random_flip', 'normalize']"),
        *("OPTIM.MAX_EPOCH", "2", "DATALOADER.TRAIN_X.BATCH_SIZE", "3", "DATALOADER.NUM_WORKERS", "0"),
        *CASES[case],
    ]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def torchrun(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`code` on two ranks of the real launcher; it finds `arguments` in sys.argv."""
    script = Path("ranks.py")  # each test has a working directory of its own
    script.write_text(code, encoding="utf-8")
    return subprocess.run(
        [*TORCHRUN, str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )


RUNS = """
import json, sys
from dfzsl import train
from dfzsl.utils import distributed
with distributed.process_group():
    for words in json.loads(sys.argv[1]):
        train.main(words)
"""


def contexts(folder: Path) -> dict[str, torch.Tensor]:
    """What was learned; without the frozen embeddings around it."""
    state = torch.load(folder / "prompt_learner/model.pth.tar-2", weights_only=False)["state_dict"]
    return {name: value for name, value in state.items() if not name.startswith("token_")}


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(pictures, tmp_path):
    given = [words(case, pictures, tmp_path / "two") for case in CASES]
    done = torchrun(RUNS, json.dumps(given))
    assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        train.main(words(case, pictures, tmp_path / "one"))
        one, two = (tmp_path / ranks / case for ranks in ("one", "two"))
        learned, expected = contexts(two), contexts(one)
        assert learned.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(learned[name], expected[name], rtol=1e-4, atol=1e-5)
        found = [read_results(folder / "results.json") for folder in (one, two)]
        for key in ("accuracy", "per_class", "images_used", "trained_parameters"):
            assert found[0][key] == found[1][key], (case, key)
        assert found[1]["curves"]["loss"] == pytest.approx(found[0]["curves"]["loss"], abs=1e-4)
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        assert (
            len(list((two / "tensorboard").iterdir())) == len(list((two / "prompt_learner").glob("*-2"))) == 1
        )


DIES = """
import json, os, sys
from dfzsl import train
from dfzsl.utils import distributed
from dfzsl.trainers.coop import CoOp
step = CoOp.step
def dies(self, features, label):
    if distributed.rank() == 1 and self.epoch == 1:
        {how}
    return step(self, features, label)
CoOp.step = dies
train.run_program(lambda: train.main(json.loads(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("os.kill(os.getpid(), 9)", "Signal 9"),
        ("raise OSError('disk full')", "error: disk full"),
        ("raise ValueError('a defect')", "ValueError: a defect"),
    ],
)
def test_a_rank_that_dies_ends_the_run_and_the_run_goes_on_later(how, said, pictures, tmp_path):
    given = words("CoOp", pictures, tmp_path / "two")
    died = torchrun(DIES.format(how=how), json.dumps(given))
    assert died.returncode != 0 and said in died.stderr
    assert not (tmp_path / "two/CoOp/results.json").exists()
    again = torchrun(RUNS, json.dumps([given]))
    assert again.returncode == 0, again.stderr[-3000:]
    train.main(words("CoOp", pictures, tmp_path / "one"))
    torch.testing.assert_close(contexts(tmp_path / "two/CoOp"), contexts(tmp_path / "one/CoOp"))


WAITS = """
import os, sys, time
from pathlib import Path
from dfzsl.utils import distributed
with distributed.process_group():
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_ranks_go_with_a_torchrun_that_is_killed(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS, encoding="utf-8")
    pids = tmp_path / "pids"
    pids.mkdir()
    words = [*TORCHRUN, str(tmp_path / "waits.py"), str(pids)]
    launcher = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    while len(list(pids.iterdir())) < 2:
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while any(Path("/proc", path.name).exists() for path in pids.iterdir()):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_launcher_runs_a_sweep_on_several_processes(pictures, tmp_path):
    methods = [Method("TeacherZeroshot"), Method("FLPT", virtual=True, config="shapes")]
    data, opts = Data(f"folder:{pictures}", ""), ("MODEL.BACKBONE.NAME", "shapes", "OPTIM.MAX_EPOCH", "2")
    found = []
    for gpus in (1, 2):
        jobs = [Job("base2new", m, data, 1, 16, -1, tmp_path / str(gpus), opts) for m in methods]
        workers.run(jobs[1], gpus)
        found.append([read_results(folder / "results.json") for job in jobs for folder, _ in job.parts()])
    for one, two in zip(*found, strict=True):
        assert two["queries"] == one["queries"]
        assert two["accuracy"] == one["accuracy"]
        assert two.keys() == one.keys() and set(VOLATILE_KEYS) < one.keys()


@pytest.mark.slow
def test_one_line_tells_why_torchrun_failed(tmp_path):
    with pytest.raises(UserError, match=r"'CoOpp'.*CoOp"):
        workers._torchrun(2, ["--trainer", "CoOpp"])


def test_workers_on_one_machine_share_out_its_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.gpu_shares(1) == ["0", "1", "2", "3"]
    assert workers.gpu_shares(2) == ["0,1", "2,3"]
    assert workers.gpu_shares(3) == ["0,1,2"]
    assert workers.gpu_shares(8) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a,1,0")
    assert workers.gpu_shares(2) == ["3,GPU-5a", "1,0"]
