"""The tests run against the package beside them, installed or not."""

import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from dassl_thirdparty import get_arguments, make_images, setup_cfg  # noqa: E402


@pytest.fixture(autouse=True)
def isolated(tmp_path, tmp_path_factory, monkeypatch):
    """Isolate each test: home and working directory, standard output, random numbers."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.chdir(tmp_path)
    stdout = sys.stdout
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    sys.stdout = stdout
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 4 classes of small images, 10 of each."""
    root = tmp_path_factory.mktemp("root")
    make_images(root / "tiny_pets" / "images", n_classes=4, n_images=10)
    return root


@pytest.fixture
def make_cfg(images, tmp_path):
    """make_cfg("--trainer", "TinyCoOp", "OPTIM.MAX_EPOCH", 3): from arguments to configuration."""

    def make(*arguments):
        argv = ["--root", str(images), "--output-dir", str(tmp_path / "out"), *map(str, arguments)]
        return setup_cfg(get_arguments(argv))

    return make
