import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from dassl import utils
from dassl.engine.trainer import SummaryWriter
from dassl.metrics import compute_accuracy, compute_distance_matrix
from dassl.utils import AverageMeter, Logger, MetricMeter, Registry, read_image, set_random_seed, setup_logger
from PIL import Image


def test_registry():
    registry = Registry("THING")

    @registry.register()
    class Thing:
        pass

    class Other:
        pass

    registry.register(Other)
    assert registry.get("Thing") is Thing and registry.registered_names() == ["Thing", "Other"]
    assert "Other" in registry and "Nothing" not in registry
    with pytest.raises(KeyError, match=r'"Thing".*"THING"'):
        registry.register(Thing)
    registry.register(Thing, force=True)
    with pytest.raises(KeyError, match=r'"Nothing".*"THING"'):
        registry.get("Nothing")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"OxfordPet.*OxfordPets"):
        utils.check_availability("OxfordPet", ["Caltech101", "OxfordPets"])
    with pytest.raises(ValueError, match="got "):
        utils.check_availability("x", [])


def test_meters():
    meter = AverageMeter()
    meter.update(torch.tensor([2.0]))
    meter.update(5.0, n=2)
    assert (meter.val, meter.sum, meter.count, meter.avg) == (5.0, 12.0, 3, 4.0)
    meter = AverageMeter(ema=True)
    meter.update(10.0)
    meter.update(20.0)
    assert meter.avg == pytest.approx(0.9 * 1.0 + 0.1 * 20.0)
    meters = MetricMeter()
    meters.update(None)
    assert str(meters) == ""
    meters.update({"loss": torch.tensor(2.3516), "acc": 20})
    meters.update({"loss": 1.0278, "acc": 20})
    assert str(meters) == "loss 1.0278 (1.6897) acc 20.0000 (20.0000)"
    tabbed = MetricMeter(delimiter="\t")
    tabbed.update({"a": 1, "b": 2})
    assert str(tabbed) == "a 1.0000 (1.0000)\tb 2.0000 (2.0000)"
    with pytest.raises(TypeError, match="dictionary"):
        meters.update([1.0])


def test_logger_copies_and_keeps_the_console(tmp_path, capsys):
    console = sys.stdout
    setup_logger(str(tmp_path / "run"))
    print("first")
    logger = sys.stdout
    assert logger.encoding == console.encoding and logger.isatty() == console.isatty()
    logger.close()
    print("after close")
    del logger
    sys.stdout = console
    print("console lives")
    assert (tmp_path / "run" / "log.txt").read_text() == "first\n"
    assert capsys.readouterr().out == "first\nafter close\nconsole lives\n"


def test_logger_rotates(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: form)
    setup_logger(str(tmp_path))
    print("one")
    setup_logger(str(tmp_path))
    print("two")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log.txt", "log.txt-%Y-%m-%d-%H-%M-%S"]
    assert (tmp_path / names[0]).read_text() == "one\n"
    assert (tmp_path / names[1]).read_text() == "two\n"


def test_logger_file_name(tmp_path):
    setup_logger(None)
    assert not isinstance(sys.stdout, Logger)
    setup_logger(str(tmp_path / "sub" / "my.log"))
    print("x")
    assert (tmp_path / "sub" / "my.log").read_text() == "x\n"
    with Logger() as plain:
        plain.write("")
        plain.flush()


def test_files(tmp_path):
    path = tmp_path / "a" / "b.json"
    utils.write_json({"x": [1, "y"]}, str(path))
    assert utils.read_json(str(path)) == {"x": [1, "y"]}
    assert path.read_text() == json.dumps({"x": [1, "y"]}, indent=4)
    (tmp_path / ".hidden").touch()
    (tmp_path / "z").touch()
    assert utils.listdir_nohidden(str(tmp_path), sort=True) == ["a", "z"]
    assert utils.check_isfile(str(path))
    with pytest.warns(UserWarning, match="file"):
        assert not utils.check_isfile(str(tmp_path / "none"))
    with pytest.raises(TypeError):
        utils.write_json({"x": object()}, str(path))
    assert utils.read_json(str(path)) == {"x": [1, "y"]}, "a failed write must leave the old file"
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]
    utils.mkdir_if_missing("")
    assert utils.tolist_if_not("a") == ["a"] and utils.tolist_if_not(["a"]) == ["a"]


def test_read_image(tmp_path):
    path = tmp_path / "gray.png"
    Image.new("L", (3, 2), 7).save(path)
    image = read_image(str(path))
    assert image.mode == "RGB" and image.size == (3, 2) and image.getpixel((0, 0)) == (7, 7, 7)
    with pytest.raises(OSError, match=r"none\.png"):
        read_image(str(tmp_path / "none.png"))
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "gif", "bmp"):
        path = tmp_path / f"whole.{suffix}"
        Image.fromarray(noise).save(path)
        cut = tmp_path / f"cut.{suffix}"
        for keep in (0, 10, 200):
            cut.write_bytes(path.read_bytes()[:keep])
            with pytest.raises(OSError, match=rf"cut\.{suffix}"):
                read_image(str(cut))


def test_random_seed():
    def draw():
        import random

        return random.random(), np.random.rand(), torch.rand(1).item()

    set_random_seed(3)
    first = draw()
    set_random_seed(3)
    assert draw() == first
    import random

    random.seed(3)
    assert first[0] == random.random()
    assert first[2] == torch.rand(1, generator=torch.Generator().manual_seed(3)).item()


def test_random_state_round_trip(tmp_path):
    import random

    from dassl.utils.rng import get_random_state, set_random_state

    set_random_seed(5)
    random.gauss(0, 1), np.random.randn(3), torch.rand(2)
    torch.save(get_random_state(), tmp_path / "state")
    first = random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(3).tolist()
    set_random_seed(6)
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert first == (
        random.random(),
        random.gauss(0, 1),
        np.random.randn(3).tolist(),
        torch.randn(3).tolist(),
    )


def test_compute_accuracy():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0], [3.0, 2.0, 1.0]])
    target = torch.tensor([0, 2, 2, 2])
    top1, top2 = compute_accuracy((logits, "features"), target, topk=(1, 2))
    assert top1.shape == (1,) and top1.item() == 50.0 and top2.item() == 75.0
    assert compute_accuracy(logits, target)[0].item() == 50.0


def test_distances():
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    assert torch.allclose(compute_distance_matrix(a, b), torch.cdist(a, b) ** 2, atol=1e-5)
    cosine = 1 - torch.cosine_similarity(a[:, None], b[None], dim=-1)
    assert torch.allclose(compute_distance_matrix(a, b, "cosine"), cosine, atol=1e-6)
    for bad in (lambda: compute_distance_matrix(a, b, "x"), lambda: compute_distance_matrix(a, b[0])):
        with pytest.raises(ValueError):
            bad()


def test_writer_without_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    with pytest.warns(UserWarning, match="tensorboard"):
        writer = SummaryWriter(log_dir="x")
    writer.add_scalar("a", 1.0, 2)
    writer.close()


def test_import_is_light():
    """Importing loads no optional part, silences no logging, and seeds nothing."""
    code = (
        "import logging, random, sys; random.seed(1); state = random.getstate()\n"
        "import dassl.data, dassl.engine.trainer, dassl.optim.radam\n"
        "assert logging.getLogger().isEnabledFor(logging.WARNING) and random.getstate() == state\n"
        "heavy = {'torchvision', 'tensorboard', 'sklearn', 'gdown', 'tabulate', 'six'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    path = str(utils.__file__).rsplit("/", 3)[0]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=path, timeout=120)


def test_collect_env_info_names_pillow(monkeypatch):
    from torch.utils import collect_env

    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: "PyTorch version: x")
    assert re.fullmatch(r"PyTorch version: x\n +Pillow \([\d.]+\)", utils.collect_env_info())
