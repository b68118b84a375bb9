import builtins
import os
import pickle
import struct
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict

import pytest
import torch
from dassl import utils
from dassl.config import get_cfg_default
from dassl.data.datasets import Datum
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint, load_pretrained_weights, resume_from_checkpoint, save_checkpoint
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR


def make_training(**settings):
    cfg = get_cfg_default().OPTIM
    cfg.NAME, cfg.LR, cfg.LR_SCHEDULER, cfg.MAX_EPOCH = "sgd", 0.002, "cosine", 5
    cfg.WARMUP_EPOCH, cfg.WARMUP_TYPE = 1, "constant"
    for key, value in settings.items():
        cfg[key] = value
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, cfg)
    return model, optimizer, build_lr_scheduler(optimizer, cfg)


def train(model, optimizer, scheduler, epochs):
    """Returns the learning rate of each epoch."""
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    return rates


def checkpoint_of(training, epoch):
    model, optimizer, scheduler = training
    return {
        "state_dict": model.state_dict(),
        "epoch": epoch,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "val_result": None,
    }


def test_files(tmp_path, capsys):
    state = checkpoint_of(make_training(), 3)
    state["state_dict"] = OrderedDict(("module." + k, v) for k, v in state["state_dict"].items())
    folder = str(tmp_path / "prompt_learner")
    save_checkpoint(state, folder, is_best=True)
    assert sorted(os.listdir(folder)) == ["checkpoint", "model-best.pth.tar", "model.pth.tar-3"]
    assert (tmp_path / "prompt_learner" / "checkpoint").read_text() == "model.pth.tar-3\n"
    out = capsys.readouterr().out
    assert out == (
        f"Checkpoint saved to {folder}/model.pth.tar-3\n"
        f'Best checkpoint saved to "{folder}/model-best.pth.tar"\n'
    )
    loaded = load_checkpoint(f"{folder}/model-best.pth.tar")
    assert list(loaded["state_dict"]) == ["weight", "bias"] and loaded["epoch"] == 3
    assert list(state["state_dict"]) == ["module.weight", "module.bias"], "the caller's dict is left alone"
    save_checkpoint(state, folder, remove_module_from_keys=False, model_name="mine.pth")
    assert (tmp_path / "prompt_learner" / "checkpoint").read_text() == "mine.pth\n"
    assert "module.bias" in load_checkpoint(f"{folder}/mine.pth")["state_dict"]


@pytest.mark.parametrize("scheduler", ["single_step", "multi_step", "cosine"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "radam"])
def test_new_checkpoints_are_plain(scheduler, optimizer, tmp_path):
    training = make_training(NAME=optimizer, LR_SCHEDULER=scheduler, STEPSIZE=(2, 3))
    train(*training, epochs=2)
    save_checkpoint(checkpoint_of(training, 2), str(tmp_path))
    loaded = torch.load(tmp_path / "model.pth.tar-2", weights_only=True)
    assert set(loaded) == {"state_dict", "epoch", "optimizer", "scheduler", "val_result"}


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    state = checkpoint_of(make_training(), 1)
    save_checkpoint(state, str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(state, str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_equal_states_are_equal_bytes(tmp_path):
    state = checkpoint_of(make_training(), 1)
    for name in ("one.tar", "two.tar"):
        save_checkpoint(state, str(tmp_path), model_name=name)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_resume(tmp_path, capsys):
    expected = train(*make_training(), epochs=5)
    training = make_training()
    train(*training, epochs=2)
    save_checkpoint(checkpoint_of(training, 2), str(tmp_path))
    capsys.readouterr()
    resumed = make_training()
    assert resume_from_checkpoint(str(tmp_path), *resumed) == 2
    assert capsys.readouterr().out == (
        f'Loading checkpoint from "{tmp_path}/model.pth.tar-2"\n'
        "Loaded model weights\nLoaded optimizer\nLoaded scheduler\nPrevious epoch: 2\n"
    )
    assert torch.equal(resumed[0].weight, training[0].weight)
    assert train(*resumed, epochs=3) == expected[2:]


# Files of the original


class Warmup:
    """What the original's warmup scheduler was to pickle: an object in dassl.optim.lr_scheduler."""


def save_as_the_original(path, training, legacy=False):
    """Its schedulers' state holds the scheduler that comes after the warmup, and that one its optimizer."""
    scheduler = training[2]
    checkpoint = checkpoint_of(training, 2)
    successor = scheduler.successor
    assert isinstance(successor, CosineAnnealingLR)
    successor.__dict__.pop("_initial_step", None)
    state = {k: v for k, v in vars(scheduler).items() if k != "optimizer"}
    # torch 1.13 has these as well.
    state.update(verbose=False, _get_lr_called_within_step=False, successor=successor)
    checkpoint["scheduler"] = state
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("legacy", [False, True])
def test_old_checkpoints(legacy, tmp_path):
    """Read without their objects, and the learning rate goes on (it stood still in the original)."""
    expected = train(*make_training(MOMENTUM=0.9), epochs=5)
    training = make_training()
    train(*training, epochs=2)
    path = tmp_path / "model.pth.tar-2"
    save_as_the_original(path, training, legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    checkpoint = load_checkpoint(str(path))
    successor = checkpoint["scheduler"]["successor"]
    assert type(successor).__name__ == "Inert" and type(successor.optimizer).__name__ == "Inert"
    assert torch.equal(checkpoint["state_dict"]["weight"], training[0].weight)
    (tmp_path / "checkpoint").write_text("model.pth.tar-2\n")
    resumed = make_training()
    assert resume_from_checkpoint(str(tmp_path), *resumed) == 2
    assert train(*resumed, epochs=3) == expected[2:]


def test_old_checkpoints_with_other_objects(tmp_path, monkeypatch):
    """Counters, default dictionaries, dtypes, parameters, numpy numbers, classes of dassl.optim."""
    import numpy as np

    monkeypatch.setattr(Warmup, "__module__", "dassl.optim.lr_scheduler")
    monkeypatch.setattr(sys.modules["dassl.optim.lr_scheduler"], "Warmup", Warmup, raising=False)
    warmup = Warmup()
    warmup.last_epoch = 4
    content = {
        "scheduler": warmup,
        "milestones": Counter([1, 2, 2]),
        "state": defaultdict(dict, {0: {"step": torch.tensor(1.0)}}),
        "weight": nn.Parameter(torch.ones(2, dtype=torch.float16)),
        "dtype": torch.bfloat16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "val_result": np.float64(55.5),
        "set": {1},
    }
    torch.save(content, tmp_path / "old")
    loaded = load_checkpoint(str(tmp_path / "old"))
    assert vars(loaded.pop("scheduler")) == {"last_epoch": 4}
    assert torch.equal(loaded.pop("weight"), content["weight"])
    assert {k: loaded[k] for k in loaded} == {k: content[k] for k in loaded} and len(loaded) == 7


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(marker):
    write = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Payload(os.system, f"touch {marker}"),
        "eval": Payload(eval, f"__import__('pathlib').Path({str(marker)!r}).touch()"),
        "exec": Payload(builtins.exec, write),
        "getattr": Payload(getattr, "text", "upper"),
        "torch.load": Payload(torch.load, str(marker)),
    }


@pytest.mark.parametrize("kind", ["os.system", "eval", "exec", "getattr", "torch.load"])
@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_checkpoints_are_refused(kind, legacy, tmp_path):
    marker = tmp_path / "executed"
    content = {"state_dict": {}, "epoch": 1, "scheduler": payloads(marker)[kind]}
    path = str(tmp_path / "bad")
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError, match="bad"):
        load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("torch.storage", "os.system.Storage"),
        ("torch", "serialization.os.system"),
        ("torch.optimizer_evil", "run"),
        ("dassl.optimum", "run"),
        ("torch", "load"),
        ("builtins", "getattr"),
        ("numpy", "load"),
    ],
)
def test_names_beside_the_admitted_ones_are_refused(module, name, tmp_path):
    """Dotted names reach into modules, and a prefix of a module's name is not that module."""
    path = tmp_path / "bad"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", f"\x80\x02c{module}\n{name}\n)R.".encode("latin-1"))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(pickle.UnpicklingError, match=rf"{module}\.{name}"):
        load_checkpoint(str(path))


def test_bad_files(tmp_path):
    good = tmp_path / "good"
    torch.save({"state_dict": {"a": torch.ones(1000)}, "epoch": 1}, good)
    bad = tmp_path / "bad"
    whole = good.read_bytes()
    directory = whole.rindex(b"good/data.pkl")
    for content in (
        *(b"", b"hello", whole[:500], b"PK\x03\x04" + bytes(100), b"\x80\x02." * 5),
        whole.replace(b"PK\x01\x02", b"PK\x01\x03"),
        whole[:directory] + b"go\xffd" + whole[directory + 4 :],
    ):
        bad.write_bytes(content)
        with pytest.raises(pickle.UnpicklingError, match="bad"):
            load_checkpoint(str(bad))
    with pytest.raises(ValueError, match="None"):
        load_checkpoint(None)
    with pytest.raises(FileNotFoundError, match="none"):
        load_checkpoint(str(tmp_path / "none"))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "bad")
    with pytest.raises(pickle.UnpicklingError, match="TorchScript"):
        load_checkpoint(str(tmp_path / "bad"))


def test_foreign_checkpoints(tmp_path):
    model = nn.Linear(3, 2)
    (tmp_path / "checkpoint").write_text("x\n")
    torch.save({"weight": torch.ones(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="x "):
        resume_from_checkpoint(str(tmp_path), model)
    torch.save({"state_dict": {"weight": torch.ones(1)}, "epoch": 1}, tmp_path / "x")
    with pytest.raises(RuntimeError, match="x "):
        resume_from_checkpoint(str(tmp_path), model)
    torch.save(torch.ones(1), tmp_path / "x")
    with pytest.raises(ValueError, match="Tensor"):
        load_pretrained_weights(model, str(tmp_path / "x"))


def test_load_pretrained_weights(tmp_path, capsys):
    path = str(tmp_path / "weights")
    weight = torch.arange(6.0).view(2, 3)
    torch.save({"state_dict": {"module.weight": weight, "bias": torch.ones(5), "x": weight}}, path)
    model = nn.Linear(3, 2)
    bias = model.bias.clone()
    load_pretrained_weights(model, path)
    assert torch.equal(model.weight, weight) and torch.equal(model.bias, bias)
    assert capsys.readouterr().out == (
        f"Successfully loaded pretrained weights from {path}\n"
        "Layers discarded due to unmatched keys or size: ['bias', 'x']\n"
    )
    torch.save({"bias": torch.full((2,), 7.0), "weight": weight}, path)
    load_pretrained_weights(model, path)
    assert model.bias.tolist() == [7, 7]
    assert capsys.readouterr().out == f"Successfully loaded pretrained weights from {path}\n"
    torch.save({"other": weight}, path)
    with pytest.warns(UserWarning, match="key"):
        load_pretrained_weights(model, path)


def test_parameters():
    model = nn.Sequential(OrderedDict(a=nn.Linear(3, 2), b=nn.Linear(2, 1)))
    assert utils.count_num_param(model) == 11
    assert utils.count_num_param(params=model.a.parameters()) == 8
    assert utils.count_num_param(params=[{"params": list(model.b.parameters())}]) == 3
    with pytest.raises(ValueError):
        utils.count_num_param()
    utils.open_specified_layers(model, "b")
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert not model.a.training and model.b.training
    utils.open_all_layers(model)
    assert all(p.requires_grad for p in model.parameters()) and model.a.training
    with pytest.raises(ValueError, match='"c"'):
        utils.open_specified_layers(model, ["a", "c"])


@pytest.mark.parametrize("kind", ["normal", "xavier", "kaiming", "orthogonal"])
def test_init_network_weights(kind):
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Linear(3, 3), nn.LayerNorm(3))
    nn.init.constant_(model[1].weight, 5.0)
    utils.init_network_weights(model, kind)
    assert model[1].weight.item() == 1 and model[2].bias.abs().sum() == 0
    with pytest.raises(ValueError, match="not implemented"):
        utils.init_network_weights(model, "zeros")


def test_published_few_shot_pickles(tmp_path, images):
    """They name dassl.data.datasets.base_dataset.Datum and its underscore attributes; here byte by byte."""
    path = str(next((images / "tiny_pets" / "images").glob("*/*.png")))

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    datum = b"cdassl.data.datasets.base_dataset\nDatum\n)\x81}("
    datum += text("_impath") + text(path) + text("_label") + b"K\x05" + text("_domain") + b"K\x00"
    datum += text("_classname") + text("pug") + b"ub"
    data = pickle.loads(b"\x80\x02}" + text("train") + b"]" + datum + b"as.")
    item = data["train"][0]
    assert isinstance(item, Datum)
    assert (item.impath, item.label, item.domain, item.classname) == (path, 5, 0, "pug")
    again = pickle.dumps(Datum(path, 5, 0, "pug"), protocol=2)
    assert b"dassl.data.datasets.base_dataset\nDatum" in again
    assert vars(pickle.loads(again)) == vars(item)
