"""Provide what tests share: an isolated environment, small feature files, a browser, the table of faults."""

from __future__ import annotations

import logging
import os
import re
import shutil
import site
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from tabulate import tabulate

torch.set_num_threads(1)
# The same examples in every run; `--hypothesis-profile default` draws new ones.
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")
sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[1]
CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")


def pytest_configure(config):
    """Give matplotlib one configuration directory for the whole run, so that it lists the fonts once."""
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist inherit the environment
        folder = tempfile.TemporaryDirectory(prefix="matplotlib-")
        config.add_cleanup(folder.cleanup)
        os.environ["MPLCONFIGDIR"] = folder.name


def isolate(patch: pytest.MonkeyPatch, home: Path, working_directory: Path) -> None:
    """Replace the home directory, the caches and the working directory, for child processes as well."""
    # Python looks for the packages of `pip install --user` below the home directory.
    patch.setenv("PYTHONUSERBASE", site.getuserbase())
    patch.setenv("HOME", str(home))
    patch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    patch.setenv("DFZSL_CACHE", str(home / "features"))
    patch.delenv("DATA", raising=False)
    patch.chdir(working_directory)


@pytest.fixture(scope="session", autouse=True)
def isolated_session(tmp_path_factory):
    """Isolate the fixtures that several tests share, which pytest sets up before `isolated`."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("working"))
        yield


@pytest.fixture(autouse=True)
def isolated(tmp_path, tmp_path_factory, monkeypatch):
    """Give each test a home directory, caches and a working directory of its own."""
    isolate(monkeypatch, tmp_path_factory.mktemp("home"), tmp_path)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # Dassl's logger replaces it
    log = logging.getLogger("dfzsl")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers[:] = handlers  # train.main adds one
    log.setLevel(level)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def write_features(path: Path, seed: int = 0, per_class: int = 24, dim: int = 32, **changes) -> Path:
    """A feature file whose geometry is CLIP's in small: concentrated classes, a modality gap, text that
    points only roughly at its class. `changes` replace or (None) drop arrays."""
    rng = np.random.default_rng(seed)
    means = unit(unit(rng.normal(size=dim)) + rng.normal(size=(len(CLASSES), dim)) / dim**0.5)
    off = rng.normal(size=means.shape) / dim**0.5
    text = unit(unit(rng.normal(size=dim)) + means - means.mean(0) + off)
    arrays: dict[str, object] = {"text": text.astype("float16"), "classnames": np.array(CLASSES)}
    for split in ("val", "test"):
        labels = np.repeat(np.arange(len(CLASSES)), per_class)
        noise = rng.normal(size=(len(labels), dim)) / dim**0.5
        arrays[f"x_{split}"] = unit(means[labels] + 0.8 * noise).astype("float16")
        arrays[f"y_{split}"] = labels
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.fixture
def feature_file(tmp_path: Path) -> Path:
    return write_features(tmp_path / "animals.npz")


@pytest.fixture(scope="session")
def real_features() -> Path:
    """The folder of real CLIP ViT-B/32 features, where the machine has it."""
    folder = Path(os.environ.get("DFZSL_REAL", ROOT.parent / "shared/data/real_clip_vitb32"))
    if not folder.is_dir():
        pytest.skip("the real CLIP features are not on this machine")
    return folder


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def chromium():
    """The distribution's browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc"
)


def peak_memory() -> int:
    """Highest resident memory of this process so far in bytes. That of getrusage begins with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


FAILED = "**FAILED**"


@pytest.fixture
def tried(record_property):
    """tried(area, fault, count, outcome): a row of docs/reliability.md, which holds if the test passes.

    `count` is what this test tried; a row that several tests share, as those of a parametrised one, adds up.
    """

    def record(area: str, fault: str, count: int, outcome: str) -> None:
        record_property("tried", (area, fault, count, outcome))

    return record


def pytest_addoption(parser):
    parser.addoption("--faults", type=Path, help="write the table of faults tried between this file's marks")


def pytest_terminal_summary(terminalreporter, config):
    if (page := config.getoption("--faults")) is None:
        return
    rows: dict[tuple[str, str], tuple[int, str]] = {}
    for state in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(state, []):
            found = [row for name, row in report.user_properties if name == "tried"]
            if state != "passed" and not found:  # before it could say what it tried
                found = [("failed", report.nodeid, 0, "")]
            for area, fault, count, outcome in found:
                before, was = rows.get((area, fault), (0, ""))
                failed = state != "passed" or was == FAILED
                rows[area, fault] = (before + count, FAILED if failed else outcome)
    if config.getoption("keyword") or terminalreporter.stats.get("deselected"):
        print("only a part was tried: the table stays as it is")
        return
    table = tabulate(
        [(*named, f"{count:,}", outcome) for named, (count, outcome) in sorted(rows.items())],
        headers=("where", "fault", "tried", "outcome"),
        tablefmt="github",
        disable_numparse=True,
    )
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- faults -->")
    after = rest.partition("<!-- end of faults -->")[2]
    page.write_text(f"{before}<!-- faults -->\n{table}\n<!-- end of faults -->{after}", encoding="utf-8")
