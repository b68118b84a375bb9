import math
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from dassl.engine import (
    TRAINER_REGISTRY,
    SimpleNet,
    SimpleTrainer,
    TrainerBase,
    TrainerX,
    TrainerXU,
    build_trainer,
)
from dassl.modeling import BACKBONE_REGISTRY, Backbone, build_head
from dassl.utils import load_checkpoint, set_random_seed
from dassl_thirdparty import main, parse_test_res
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def run(images, tmp_path):
    """run("out", "--trainer", "TinyCoOp", ...) runs train.py there and returns the trainer."""

    def run(folder, *arguments, seed=1):
        argv = ["--root", str(images), "--output-dir", str(tmp_path / folder), "--seed", str(seed)]
        console = sys.stdout
        try:
            return main([*argv, *map(str, arguments)])
        finally:
            sys.stdout = console

    return run


def log_of(folder):
    """The log, with its times, paths and learning rates left as they are."""
    return (folder / "log.txt").read_text()


class Crash(Exception):
    pass


def crash_at(trainer_name, epoch, monkeypatch):
    """The trainer dies in the second batch of that (0-based) epoch."""
    cls = TRAINER_REGISTRY.get(trainer_name)
    original = cls.forward_backward

    def forward_backward(self, *batches):
        if self.epoch == epoch and self.batch_idx == 1:
            raise Crash
        return original(self, *batches)

    monkeypatch.setattr(cls, "forward_backward", forward_backward)


# The log and the files


def test_log_and_files(run, tmp_path, capsys):
    run("out", "--trainer", "TinyCoOp", "OPTIM.MAX_EPOCH", 2, "TRAIN.CHECKPOINT_FREQ", 1)
    out = tmp_path / "out"
    lines = log_of(out).splitlines()
    number, rate = r"\d+\.\d{3} \(\d+\.\d{3}\)", r"\d+\.\d{4} \(\d+\.\d{4}\)"
    epoch_line = rf"time {number} data {number} loss {rate} acc {rate} lr \d\.\d{{4}}e[-+]\d\d eta 0:00:0\d"
    expected = [
        "Loading trainer: TinyCoOp",
        "Loading dataset: TinyPets",
        "Building transform_train",
        r"\+ random resized crop \(size=\(8, 8\), scale=\(0.08, 1.0\)\)",
        r"\+ random flip",
        r"\+ to torch tensor of range \[0, 1\]",
        r"\+ normalization .*",
        "Building transform_test",
        r"\+ resize the smaller edge to 8",
        r"\+ 8x8 center crop",
        r"\+ to torch tensor of range \[0, 1\]",
        r"\+ normalization .*",
        *["-.*", "Dataset .*", "# classes .*", "# train_x .*", "# val .*", "# test .*", "-.*"],
        "Loading evaluator: Classification",
        "No checkpoint found, train from scratch",
        rf"Initialize tensorboard \(log_dir={out}/tensorboard\)",
        *[rf"epoch \[1/2\] batch \[{i}/3\] {epoch_line}" for i in (1, 2, 3)],
        f"Checkpoint saved to {out}/prompt_learner/model.pth.tar-1",
        *[rf"epoch \[2/2\] batch \[{i}/3\] {epoch_line}" for i in (1, 2, 3)],
        f"Checkpoint saved to {out}/prompt_learner/model.pth.tar-2",
        "Finish training",
        "Deploy the last-epoch model",
        r"Evaluate on the \*test\* set",
        "=> result",
        r"\* total: 12",
        r"\* correct: \d+",
        r"\* accuracy: \d+\.\d%",
        r"\* error: \d+\.\d%",
        r"\* macro_f1: \d+\.\d%",
        r"Elapsed: 0:00:\d\d",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    # An epoch's last line has the next epoch's learning rate.
    rates = [re.search(r"lr (\S+)", line).group(1) for line in lines if line.startswith("epoch")]
    assert rates == ["1.0000e-05", "1.0000e-05", "1.0000e-01", "1.0000e-01", "1.0000e-01", "5.0000e-02"]

    assert sorted(os.listdir(out)) == ["log.txt", "prompt_learner", "tensorboard"]
    assert sorted(os.listdir(out / "prompt_learner")) == ["checkpoint", "model.pth.tar-1", "model.pth.tar-2"]
    assert (out / "prompt_learner" / "checkpoint").read_text() == "model.pth.tar-2\n"
    checkpoint = torch.load(out / "prompt_learner" / "model.pth.tar-2", weights_only=True)
    assert {"state_dict", "epoch", "optimizer", "scheduler", "val_result"} <= set(checkpoint)
    assert set(checkpoint["state_dict"]) == {"ctx", "token_prefix", "token_suffix"}
    assert checkpoint["epoch"] == 2 and checkpoint["val_result"] is None
    assert "it/s" not in log_of(out) and "it/s" in capsys.readouterr().err


@pytest.mark.parametrize("freq, printed", [(2, [2]), (3, [3]), (4, [1, 2, 3]), (1, [1, 2, 3])])
def test_print_freq(run, freq, printed, tmp_path):
    run("out", "--trainer", "TinyCoOp", "OPTIM.MAX_EPOCH", 1, "TRAIN.PRINT_FREQ", freq)
    assert [int(i) for i in re.findall(r"batch \[(\d)/3\]", log_of(tmp_path / "out"))] == printed


def test_parse_test_res(run, tmp_path):
    accuracies = []
    for seed in (1, 2):
        trainer = run(f"exp/seed{seed}", "--trainer", "TinyCoOp", "OPTIM.MAX_EPOCH", 1, seed=seed)
        accuracies.append(round(trainer.test(), 1))
    assert parse_test_res(tmp_path / "exp")["accuracy"] == pytest.approx(np.mean(accuracies))


# Saving, resuming, evaluating


def final_state(trainer):
    """Everything that a run leaves: all weights, optimizers, schedules."""
    state = {}
    for name in trainer.get_model_names():
        state[name] = (
            trainer._models[name].state_dict(),
            trainer._optims[name].state_dict() if trainer._optims[name] else None,
            trainer._scheds[name].state_dict() if trainer._scheds[name] else None,
        )
    return state


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


CASES = {
    "CoOp": ("TinyCoOp", 1, []),
    "workers": ("TinyCoOp", 2, ["DATALOADER.NUM_WORKERS", 2, "OPTIM.MAX_EPOCH", 3]),
    "CoCoOp, Adam": ("TinyCoCoOp", 3, ["OPTIM.NAME", "adam"]),
    "mixed precision": ("TinyCoOp", 2, ["TRAINER.TINYCOOP.PREC", "amp"]),
    "DePT, RAdam": ("TinyDePT", 2, ["OPTIM.NAME", "radam", "OPTIM.WARMUP_RECOUNT", False]),
    "few shots": ("TinyCoOp", 2, ["DATASET.NUM_SHOTS", 3]),
    "class sampler": (
        "TinyCoOp",
        2,
        ["DATALOADER.TRAIN_X.SAMPLER", "RandomClassSampler", "DATALOADER.TRAIN_X.N_INS", 3],
    ),
    "python and numpy draws": (
        "TinyCoOp",
        1,
        ["INPUT.TRANSFORMS", "['random_translation', 'imagenet_policy', 'cutout', 'normalize']"],
    ),
    "two models": (
        "TinyXU",
        2,
        ["DATASET.NAME", "TinyUnlabelled", "DATASET.SOURCE_DOMAINS", "['odd']", "OPTIM.NAME", "amsgrad"],
    ),
}


@pytest.mark.parametrize("final", ["last_step", "best_val"])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(case, final, run, tmp_path, monkeypatch, images):
    """Bit for bit: weights, optimizer, schedule, random state, data order, printed losses, results."""
    name, epoch, options = CASES[case]
    arguments = ["--trainer", name, "TRAIN.CHECKPOINT_FREQ", 1, "TEST.FINAL_MODEL", final, *options]
    # Drawing a few-shot split consumes random numbers, reading one does not: it is drawn in both runs.
    splits = images / "tiny_pets" / "split_fewshot"
    shutil.rmtree(splits, ignore_errors=True)
    whole = run("whole", *arguments)
    random_state = torch.get_rng_state()
    shutil.rmtree(splits)
    with monkeypatch.context() as patch:
        crash_at(name, epoch, patch)
        with pytest.raises(Crash):
            run("parts", *arguments)
    resumed = run("parts", *arguments)
    assert resumed.start_epoch == epoch
    assert_same(final_state(resumed), final_state(whole))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert resumed.best_result == whole.best_result

    def comparable(folder, pattern):
        """The lines from the resumed epoch on, without times and paths."""
        (log,) = (tmp_path / folder).glob(pattern)
        text = log.read_text()
        text = text[text.index(f"epoch [{epoch + 1}/") :] if name != "TinyDePT" else text
        text = text[text.index(f"DePT epoch {epoch}") :] if name == "TinyDePT" else text
        return re.sub(r"time \S+ \S+ data \S+ \S+|eta \S+|Elapsed: \S+|/(whole|parts)/", "", text)

    assert comparable("parts", "log.txt-*") == comparable("whole", "log.txt")
    for model in whole.get_model_names():
        files = sorted(os.listdir(tmp_path / "whole" / model))
        assert sorted(os.listdir(tmp_path / "parts" / model)) == files
        for file in files:
            if file != "checkpoint":
                paths = [str(tmp_path / folder / model / file) for folder in ("whole", "parts")]
                assert_same(*[load_checkpoint(path) for path in paths])


def test_resume_from_another_folder(run, tmp_path, monkeypatch):
    """RESUME: the run goes on in OUTPUT_DIR, and takes the best model along."""
    arguments = ["--trainer", "TinyCoOp", "TRAIN.CHECKPOINT_FREQ", 1, "TEST.FINAL_MODEL", "best_val"]
    # A result that no later epoch beats.
    monkeypatch.setattr(TRAINER_REGISTRY.get("TinyCoOp"), "test", falling_results())
    whole = run("whole", *arguments)
    assert whole.best_result == 90
    with monkeypatch.context() as patch:
        patch.setattr(TRAINER_REGISTRY.get("TinyCoOp"), "test", falling_results())
        crash_at("TinyCoOp", 2, patch)
        with pytest.raises(Crash):
            run("first", *arguments)
    resumed = run("second", "--resume", tmp_path / "first", *arguments)
    assert resumed.start_epoch == 2 and resumed.best_result == 90
    assert_same(final_state(resumed), final_state(whole))
    best = load_checkpoint(str(tmp_path / "second" / "prompt_learner" / "model-best.pth.tar"))
    assert best["epoch"] == 1 and best["val_result"] == 90
    assert f"Found checkpoint at {tmp_path}/first (will resume training)" in log_of(tmp_path / "second")


def falling_results():
    def test(self, split=None):
        torch.rand(1)
        return 90.0 - self.epoch

    return test


def test_killed_between_the_best_model_and_the_checkpoint(run, tmp_path):
    arguments = ["--trainer", "TinyCoOp", "OPTIM.MAX_EPOCH", 1, "TEST.FINAL_MODEL", "best_val"]
    run("out", *arguments)
    folder = tmp_path / "out" / "prompt_learner"
    saved = (folder / "model.pth.tar-1").read_bytes()
    (folder / "model.pth.tar-1").unlink()
    (folder / "checkpoint").write_text("model-best.pth.tar\n")
    run("out", *arguments)
    assert (folder / "model.pth.tar-1").read_bytes() == saved
    assert (folder / "checkpoint").read_text() == "model.pth.tar-1\n"


def test_best_val(run, tmp_path, monkeypatch):
    """Strictly better results are kept as model-best, and the best one is deployed."""
    results = iter([50.0, 70.0, 70.0, 60.0])
    splits = []

    def test(self, split=None):
        splits.append(split)
        return next(results, None)

    monkeypatch.setattr(TRAINER_REGISTRY.get("TinyCoOp"), "test", test)
    trainer = run("out", "--trainer", "TinyCoOp", "TEST.FINAL_MODEL", "best_val")
    assert splits == ["val"] * 4 + [None] and trainer.best_result == 70
    folder = tmp_path / "out" / "prompt_learner"
    best = load_checkpoint(str(folder / "model-best.pth.tar"))
    assert best["epoch"] == 2 and best["val_result"] == 70
    assert torch.equal(trainer.model.prompt_learner.ctx, best["state_dict"]["ctx"])
    assert sorted(os.listdir(folder)) == ["checkpoint", "model-best.pth.tar", "model.pth.tar-4"]
    log = log_of(tmp_path / "out")
    assert "Deploy the model with the best val performance\nLoading weights to prompt_learner" in log
    assert log.count("Checkpoint saved to") == 3


def test_eval_only(run, tmp_path):
    arguments = ["--trainer", "TinyCoOp", "TRAIN.CHECKPOINT_FREQ", 2]
    trained = run("out", *arguments)
    accuracy = trained.test()
    tested = run("eval", *arguments[:2], "--eval-only", "--model-dir", tmp_path / "out", "--load-epoch", 4)
    assert tested.test() == accuracy
    assert_same(tested.model.state_dict(), trained.model.state_dict())
    # On other classes: the class tokens of the checkpoint are dropped.
    options = ["DATASET.SUBSAMPLE_CLASSES", "new", "TEST.SPLIT", "val"]
    new = run(
        "new", *arguments[:2], "--eval-only", "--model-dir", tmp_path / "out", "--load-epoch", 2, *options
    )
    assert new.model.prompt_learner.token_prefix.shape[0] == 2
    assert "Evaluate on the *val* set" in log_of(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="model-best"):
        run("none", *arguments[:2], "--eval-only", "--model-dir", tmp_path / "out")


def test_finished_run_is_only_tested(run, tmp_path):
    first = run("out", "--trainer", "TinyCoOp")
    again = run("out", "--trainer", "TinyCoOp")
    assert again.start_epoch == 4
    assert_same(final_state(again), final_state(first))


def test_an_interrupted_first_save_starts_afresh(run, tmp_path):
    """The folder is there, but no checkpoint in it yet."""
    (tmp_path / "out" / "prompt_learner").mkdir(parents=True)
    trainer = run("out", "--trainer", "TinyCoOp", "OPTIM.MAX_EPOCH", 1)
    assert trainer.start_epoch == 0 and "No checkpoint found" in log_of(tmp_path / "out")


def test_killed_between_the_checkpoints_of_two_models(run, tmp_path):
    """Both go back to the last epoch that both have; where there is none, the run is refused."""
    arguments = ["--trainer", "TinyXU", "DATASET.NAME", "TinyUnlabelled", "TRAIN.CHECKPOINT_FREQ", 1]
    first = run("out", *arguments)
    (tmp_path / "out" / "teacher" / "checkpoint").write_text("model.pth.tar-2\n")
    again = run("out", *arguments)
    assert again.start_epoch == 2
    assert_same(final_state(again), final_state(first))
    (tmp_path / "out" / "teacher" / "checkpoint").write_text("model.pth.tar-2\n")
    (tmp_path / "out" / "net" / "model.pth.tar-2").unlink()
    with pytest.raises(ValueError, match="epochs"):
        run("out", *arguments)


def test_the_originals_checkpoint_is_resumed(run, tmp_path):
    """Without random state, and with a scheduler inside the scheduler."""
    run("out", "--trainer", "TinyCoOp", "TRAIN.CHECKPOINT_FREQ", 2)
    folder = tmp_path / "out" / "prompt_learner"
    checkpoint = load_checkpoint(str(folder / "model.pth.tar-2"))
    del checkpoint["resume"]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    vars(successor).update(checkpoint["scheduler"]["successor"])
    checkpoint["scheduler"]["successor"] = successor
    torch.save(checkpoint, folder / "model.pth.tar-2")
    (folder / "checkpoint").write_text("model.pth.tar-2\n")
    trainer = run("out", "--trainer", "TinyCoOp", "TRAIN.CHECKPOINT_FREQ", 2)
    assert trainer.start_epoch == 2
    (log,) = (tmp_path / "out").glob("log.txt-*")
    rates = [float(rate) for rate in re.findall(r"batch \[1/3\].* lr (\S+)", log.read_text())]
    cosine = [0.05 * (1 + math.cos(math.pi * t / 4)) for t in (1, 2)]
    assert rates == pytest.approx(cosine, rel=1e-4)


def test_same_seed_same_bytes(run, tmp_path):
    run("a", "--trainer", "TinyCoOp")
    run("b", "--trainer", "TinyCoOp")
    files = [tmp_path / folder / "prompt_learner" / "model.pth.tar-4" for folder in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    run("c", "--trainer", "TinyCoOp", seed=2)
    assert (tmp_path / "c" / "prompt_learner" / "model.pth.tar-4").read_bytes() != files[0].read_bytes()


# The order of events


def test_order_of_events(make_cfg, monkeypatch):
    events = []

    class Recorder(TRAINER_REGISTRY.get("TinyCoOp")):
        def __getattribute__(self, name):
            hooks = (
                *("check_cfg", "build_data_loader", "build_model", "register_model", "before_train"),
                *("resume_model_if_exist", "init_writer", "before_epoch", "run_epoch", "set_model_mode"),
                *("forward_backward", "parse_batch_train", "model_backward_and_update", "update_lr"),
                *("after_epoch", "save_model", "after_train", "test", "parse_batch_test", "model_inference"),
                "close_writer",
            )
            if name in hooks:
                events.append(name)
            return super().__getattribute__(name)

    trainer = Recorder(make_cfg("OPTIM.MAX_EPOCH", 1, "TRAIN.PRINT_FREQ", 50))
    assert events == ["check_cfg", "build_data_loader", "build_model", "register_model"]
    for attribute in ("dm", "train_loader_x", "train_loader_u", "val_loader", "test_loader", "num_classes"):
        assert hasattr(trainer, attribute)
    assert (trainer.start_epoch, trainer.epoch, trainer.max_epoch) == (0, 0, 1)
    assert trainer.best_result == -math.inf and trainer.device.type in ("cpu", "cuda")
    assert trainer.lab2cname[0] == "class_0" and trainer.num_source_domains == 0
    events.clear()
    trainer.train()
    step = ["forward_backward", "parse_batch_train", "model_backward_and_update"]
    assert events == [
        *("before_train", "resume_model_if_exist", "init_writer", "before_epoch", "run_epoch"),
        *("set_model_mode", *step, *step, *step, "update_lr"),
        *("after_epoch", "save_model", "after_train"),
        *("test", "set_model_mode", "parse_batch_test", "model_inference", "close_writer"),
    ]
    assert trainer.num_batches == 3 and trainer.batch_idx == 2


def test_settings_are_there_before_the_hooks(make_cfg):
    seen = {}

    class Early(TRAINER_REGISTRY.get("TinyCoOp")):
        def check_cfg(self, cfg):
            seen["check_cfg"] = set(vars(self))

        def build_data_loader(self):
            seen["build_data_loader"] = set(vars(self))
            super().build_data_loader()

    Early(make_cfg())
    assert "device" not in seen["check_cfg"]
    assert {"device", "cfg", "max_epoch", "output_dir", "start_epoch"} <= seen["build_data_loader"]


def test_only_registered_models_change_mode(make_cfg):
    trainer = build_trainer(make_cfg("--trainer", "TinyCoCoOp"))
    trainer.set_model_mode("eval")
    assert trainer.model.training and not trainer.model.prompt_learner.training
    trainer.test()
    trainer.set_model_mode("train", names="prompt_learner")
    assert trainer.model.prompt_learner.training
    with pytest.raises(KeyError, match="mode"):
        trainer.set_model_mode("testing")


def test_test_runs_without_gradients_and_falls_back(make_cfg, capsys):
    trainer = build_trainer(make_cfg("--trainer", "TinyZeroshot"))
    assert trainer.get_model_names() == [] and trainer.resume_model_if_exist(".") == 0
    outputs = []
    trainer.model_inference = lambda x: outputs.append(trainer.model(x)) or outputs[-1]
    accuracy = trainer.test()
    assert isinstance(accuracy, float) and 0 <= accuracy <= 100 and not outputs[0].requires_grad
    trainer.test(split="val")
    assert "Evaluate on the *val* set" in capsys.readouterr().out
    trainer.val_loader = None
    with pytest.warns(UserWarning, match="validation"):
        assert trainer.test(split="val") == accuracy
    assert "Evaluate on the *test* set" in capsys.readouterr().out


def test_no_test(run, tmp_path):
    run("out", "--trainer", "TinyCoOp", "TEST.NO_TEST", True, "TEST.FINAL_MODEL", "best_val")
    log = log_of(tmp_path / "out")
    assert "Finish training\nElapsed" in log and "Evaluate" not in log and "model-best" not in log


def test_zeroshot_cannot_be_found_under_another_name(make_cfg):
    with pytest.raises(ValueError, match="TinyZeroshot"):
        build_trainer(make_cfg("--trainer", "TinyZeroShot"))


@pytest.mark.parametrize("name", ["TinySRC", "TinyDePT", "TinyCoCoOp"])
def test_other_families_train(name, run, tmp_path):
    set_random_seed(0)
    trainer = run("out", "--trainer", name, "DATASET.NUM_SHOTS", 2, "DATASET.SUBSAMPLE_CLASSES", "base")
    folders = {"TinySRC": "VLPromptLearner", "TinyDePT": "PromptLearner"}
    folder = folders.get(name, "prompt_learner")
    assert (tmp_path / "out" / folder / "model.pth.tar-4").exists()
    assert len(trainer.dm.dataset.train_x) == 4 and trainer.num_classes == 2
    assert f"Checkpoint saved to {tmp_path}/out/{folder}/model.pth.tar-4" in log_of(tmp_path / "out")


def test_training_learns(run):
    """The classes' colours."""
    options = [
        "INPUT.TRANSFORMS",
        "['normalize']",
        "OPTIM.MAX_EPOCH",
        15,
        "MODEL.BACKBONE.NAME",
        "TinyBackbone",
    ]
    assert run("out", "--trainer", "TinyVanilla", *options).test() > 80


# Registered models


def plain_trainer(**models):
    trainer = TrainerBase()
    for name, model in models.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer.register_model(name, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    return trainer


def test_names_and_updates():
    trainer = plain_trainer(a=nn.Linear(1, 1, bias=False), b=nn.Linear(1, 1, bias=False))
    assert trainer.get_model_names() == ["a", "b"] and trainer.get_model_names("b") == ["b"]
    with pytest.raises(AssertionError, match="c"):
        trainer.get_model_names(["c"])
    with pytest.raises(AssertionError, match="duplicate"):
        trainer.register_model("a", nn.Linear(1, 1))
    a, b = (trainer._models[name].weight for name in "ab")
    before = a.item(), b.item()
    trainer.model_backward_and_update((a + b).sum(), names="a")
    assert (a.item(), b.item()) == pytest.approx((before[0] - 1, before[1]))
    # b's gradient was not zeroed with a's.
    trainer.model_backward_and_update((a + b).sum())
    assert (a.item(), b.item()) == pytest.approx((before[0] - 2, before[1] - 1))
    trainer.update_lr("b")
    assert trainer.get_current_lr() == 1.0 and trainer.get_current_lr("b") == pytest.approx(0.1)
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="NaN"):
            trainer.model_backward(a.sum() * bad)
    trainer.write_scalar("x", 1.0, 0)


def test_prograd():
    """The general gradient's opposing part is taken out, and only if it opposes."""
    model = nn.Linear(2, 1, bias=False)
    trainer = plain_trainer(m=model)
    for towards, expected in (([1.0, 1.0], [-1.0, 0.0]), ([-1.0, 1.0], [-0.5, -0.5])):
        nn.init.zeros_(model.weight)
        trainer.prograd_backward_and_update(
            model.weight[0, 0], (model.weight[0] * torch.tensor(towards)).sum()
        )
        assert model.weight[0].tolist() == expected


def test_registering_needs_init():
    class Early(TrainerBase):
        def __init__(self):
            self.register_model("m", nn.Linear(1, 1))

    with pytest.raises(AttributeError, match="super"):
        Early()


def test_base_save_and_load(tmp_path, capsys):
    trainer = plain_trainer(a=nn.Linear(1, 1), b=nn.Linear(2, 1))
    trainer.save_model(4, str(tmp_path))
    trainer.save_model(1, str(tmp_path), val_result=77.77, model_name="model-best.pth.tar")
    saved = {name: model.weight.clone() for name, model in trainer._models.items()}
    for model in trainer._models.values():
        nn.init.zeros_(model.weight)
    capsys.readouterr()
    trainer.load_model(str(tmp_path), epoch=5)
    trainer.load_model(str(tmp_path))
    out = capsys.readouterr().out
    assert f"Load {tmp_path}/a/model.pth.tar-5 to a (epoch=5)\n" in out
    assert f"Load {tmp_path}/b/model-best.pth.tar to b (epoch=2, val_result=77.8)\n" in out
    assert all(torch.equal(trainer._models[name].weight, saved[name]) for name in saved)
    trainer.load_model("")
    assert "load_model() is skipped" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"model\.pth\.tar-9"):
        trainer.load_model(str(tmp_path), epoch=9)


@pytest.mark.parametrize(
    "hook", ["run_epoch", "test", "parse_batch_test", "forward_backward", "model_inference"]
)
def test_base_hooks_are_to_be_defined(hook):
    with pytest.raises(NotImplementedError):
        getattr(TrainerBase(), hook)(*([None] if hook in ("parse_batch_test", "model_inference") else []))


# Labelled and unlabelled data


@pytest.mark.parametrize("count, batches", [("train_x", 3), ("train_u", 4), ("smaller_one", 3)])
def test_xu_epochs(count, batches, make_cfg):
    options = [
        "DATASET.NAME",
        "TinyUnlabelled",
        "DATASET.SOURCE_DOMAINS",
        "['odd']",
        "TRAIN.COUNT_ITER",
        count,
    ]
    options += ["DATALOADER.TRAIN_U.SAME_AS_X", False, "DATALOADER.TRAIN_U.BATCH_SIZE", 5]
    trainer = build_trainer(make_cfg("--trainer", "TinyXU", "OPTIM.MAX_EPOCH", 1, *options))
    assert isinstance(trainer, TrainerXU)
    trainer.train()
    assert trainer.num_batches == batches == len(trainer.seen)
    xs = [i for x, _ in trainer.seen[:3] for i in x]
    us = [i for _, u in trainer.seen for i in u]
    assert len(set(xs)) == 18 and len(set(us)) == 5 * batches, "no repetition within one pass"
    names = trainer.get_model_names()
    assert names == ["net", "teacher"] and trainer._optims["teacher"] is None


def test_xu_unknown_count(make_cfg):
    options = ["DATASET.NAME", "TinyUnlabelled", "TRAIN.COUNT_ITER", "larger_one"]
    trainer = build_trainer(make_cfg("--trainer", "TinyXU", *options))
    with pytest.raises(ValueError, match="COUNT_ITER"):
        trainer.train()


# SimpleNet


@BACKBONE_REGISTRY.register()
class TinyBackbone(Backbone):
    def __init__(self, pretrained=True):
        super().__init__()
        self._out_features = 3 * 64
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * x.flatten(1)


@TRAINER_REGISTRY.register()
class TinyVanilla(TrainerX):
    def forward_backward(self, batch):
        image, label, domain = self.parse_batch_train(batch)
        assert domain.shape == label.shape
        loss = F.cross_entropy(self.model(image), label)
        self.model_backward_and_update(loss)
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}


def test_simple_net(make_cfg, tmp_path, capsys):
    options = [
        "MODEL.BACKBONE.NAME",
        "TinyBackbone",
        "MODEL.HEAD.NAME",
        "mlp",
        "MODEL.HEAD.HIDDEN_LAYERS",
        "[5, 4]",
    ]
    cfg = make_cfg("--trainer", "TinyVanilla", *options, "OPTIM.LR", 0.01)
    trainer = build_trainer(cfg)
    assert isinstance(trainer, SimpleTrainer) and isinstance(trainer.model, SimpleNet)
    assert "Building model\nBackbone: TinyBackbone\nHead: mlp\n# params: 1,0" in capsys.readouterr().out
    x = torch.rand(6, 3, 8, 8)
    logits, features = trainer.model(x, return_feature=True)
    assert logits.shape == (6, 4) and features.shape == (6, 4) and trainer.model.fdim == 4
    trainer.train()
    assert trainer.get_model_names() == ["model"]
    assert SimpleNet(cfg, cfg.MODEL, 0)(x).shape == (6, 4)
    path = tmp_path / "out" / "model" / "model.pth.tar-4"
    again = build_trainer(
        make_cfg(
            "--trainer", "TinyVanilla", *options, "MODEL.INIT_WEIGHTS", path, "OUTPUT_DIR", tmp_path / "again"
        )
    )
    assert_same(again.model.state_dict(), trainer.model.state_dict())


def test_heads():
    for bad in (dict(hidden_layers=[]), dict(hidden_layers=[3], activation="gelu")):
        with pytest.raises(ValueError):
            build_head("mlp", verbose=False, in_features=2, **bad)
    with pytest.raises(ValueError, match="mlp"):
        build_head("mpl", in_features=2)
