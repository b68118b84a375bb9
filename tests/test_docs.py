"""Check the documentation page by page: its commands, Python code, links, files, config keys and flags."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
import yaml
from conftest import ROOT
from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY
from sweeps import planned_jobs

from dfzsl import train
from dfzsl.cli import experiments
from dfzsl.cli import main as cli
from dfzsl.launch.checkouts import RECIPES
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.dassl_plugin import DEFAULTS

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += [ROOT / "compat/dassl/README.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE = {"output", "data", "build", "dist"}  # by runs and builds, not ours
FOLDERS = sorted(
    path.name
    for path in ROOT.iterdir()
    if path.is_dir() and path.name[0] not in "._" and path.name not in MADE
)
FILES = [path.relative_to(ROOT).as_posix() for f in FOLDERS for path in (ROOT / f).rglob("*")]
FILES += [path.name for path in ROOT.iterdir()]
# Named, but not ours: written by the reader or part of CoOp.
NO_SWEEP = {"scripts/test.sh", "scripts/reliability.sh", "scripts/lint_imports.sh"}
ELSEWHERE = {"trainers/feature_adapter.py", "parse_test_res.py"}
MODULES = {
    "dfzsl.launch": experiments.launch,
    "dfzsl.report": experiments.report,
    "dfzsl": cli.main,
    "dfzsl.prepare": experiments.prepare,
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def spans(page: Path) -> list[str]:
    """The code spans of a page outside of fenced blocks, each on one line."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in SPAN.findall(prose)]


def commands(page: Path) -> list[list[str]]:
    """The words of every command: lines of shell blocks, and code spans that begin as a command does."""
    lines = [line for body in blocks(page, "bash") for line in body.replace("\\\n", " ").splitlines()]
    program = re.compile(r"(\w+=\S+ )*(bash|python|pip|torchrun|dfzsl) ")
    lines += filter(program.match, spans(page))
    commands = []
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part.replace("$CONFIGS", "configs"), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words and words[0] == "cd":  # the rest of the line runs in another project
                break
            if words and words not in commands:
                commands.append(words)
    return commands


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.fixture(autouse=True)
def defaults_stay():
    """Remove the config keys that the pages' examples add: later tests would find them in their results."""
    before = DEFAULTS.clone()
    yield
    DEFAULTS.clear()
    DEFAULTS.update(before)


@pytest.fixture
def example_trainer(monkeypatch):
    """Register the trainer of docs/new_trainer.md, which its commands name, for one test."""
    monkeypatch.setattr(TRAINER_REGISTRY, "_obj_map", dict(TRAINER_REGISTRY._obj_map))
    page = ROOT / "docs/new_trainer.md"
    code = blocks(page, "python")[0]
    exec(compile(code, str(page), "exec"), {"__name__": "dfzsl.trainers.feature_adapter"})


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with the files of the project, and without what runs and builds have written."""
    folder = tmp_path / "project"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in MADE and path.name[0] != ".":
            (folder / path.name).symlink_to(path)
    monkeypatch.chdir(folder)


def with_files(words: list[str], folder: Path) -> list[str]:
    """The command with the reader's files replaced by empty ones in `folder`."""

    def checkouts(methods: str) -> str:
        return re.sub(r"@([^,]*/[^,]*)", lambda at: f"@{_checkout(folder / Path(at[1]).name)}", methods)

    new = []
    for before, word in zip(["", *words], words, strict=False):
        kind, colon, path = word.partition(":")
        if colon and kind in ("folder", "csv", "features"):
            word = f"{kind}:{_touched(folder / Path(path).name)}"
        elif before == "--methods":
            word = checkouts(word)
        elif before == "TEACHER.FILE":
            word = str(_touched(folder / Path(word).name))
        new.append(word)
    return new


def _touched(path: Path) -> Path:
    path.touch()
    return path


def _checkout(folder: Path) -> Path:
    """The files of a CoOp-style repository: train.py, the configs of data sets and of every recipe."""
    recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in RECIPES.glob("*.yaml")]
    configs = [recipe["config"] for recipe in recipes]
    configs += [f"configs/datasets/{path.name}" for path in (ROOT / "configs/datasets").glob("*.yaml")]
    for path in (*configs, "train.py"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        _touched(folder / path)
    return folder


def accept_train(words: list[str]) -> None:
    cfg = train.setup_cfg(train.parser().parse_args([word for word in words if word != "..."]))
    if "..." not in words:  # nothing is left to the reader
        train.check(cfg)


def accept_launch(words: list[str]) -> None:
    jobs = planned_jobs(words)
    for job in jobs:
        if job.seed == jobs[0].seed and job.data == jobs[0].data:
            for _, arguments in job.data_job.parts():
                train.setup_cfg(train.parser().parse_args(arguments))


def accept_click(command: click.Command, words: list[str]) -> None:
    if not words or words == ["--help"]:  # named in a sentence
        return
    context = command.make_context(command.name, [word for word in words if word != "..."])
    if isinstance(command, click.Group):
        _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        accept_click(inner, rest)


def click_flags(command: click.Command) -> set[str]:
    """Every flag of a command and of those below it."""
    own = {flag for parameter in command.get_params(click.Context(command)) for flag in parameter.opts}
    return own.union(*map(click_flags, getattr(command, "commands", {}).values()))


class Accepted(BaseException):  # no Exception: programs explain those to the user
    """Thrown by a program's argument parser once it has accepted its arguments."""


def accept_script(words: list[str]) -> None:
    """Run a script until it has parsed its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Accepted

    def stop(*args):
        raise Accepted

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Accepted):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)  # benchmarks
        patch.setattr(click.Command, "invoke", stop)
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "path", [str((ROOT / words[0]).parent), *sys.path])
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        raise ValueError("it has not parsed its arguments")


def accept(words: list[str]) -> None:
    """Raise an error, or exit, if a program does not accept this command."""
    program, *rest = words
    program = program.replace("python3", "python")
    if program == "torchrun":
        start = next(i for i, word in enumerate(rest) if word == "-m" or word.endswith(".py"))
        program, rest = "python", rest[start:]
    if program == "bash":
        script, *arguments = rest
        subprocess.run(["bash", "-n", script], check=True)
        runs = [line for line in Path(script).read_text().splitlines() if "dfzsl.launch" in line]
        for line in runs:
            accept_launch([*shlex.split(line.partition("dfzsl.launch ")[2])[:-1], *arguments])
        assert runs or script in NO_SWEEP, "no sweep"
    elif program == "dfzsl":
        accept_click(cli.main, rest)
    elif program == "python" and rest[0] == "train.py":
        accept_train(rest[1:])
    elif program == "python" and rest[:2] == ["-m", "dfzsl.launch"]:
        accept_launch(rest[2:])
    elif program == "python" and rest[0] == "-m" and rest[1] in ("pip", "pytest"):
        accept(rest[1:])
    elif program == "python" and rest[:2] == ["-m", "venv"]:
        assert len(rest) == 3
    elif program == "python" and rest[0] == "-m":
        accept_click(MODULES[rest[1]], rest[2:])
    elif program == "python":
        accept_script(rest)
    elif program == "pip":
        path = rest[-1].partition("[")[0]
        assert rest[0] == "install"
        assert path.startswith("/path/to/") or Path(path, "pyproject.toml").exists(), "no package"
    elif program == "source":
        assert rest == [".venv/bin/activate"]
    elif program == "git":
        assert rest[0] == "clone"
    elif program == "pytest":
        paths = [word for word in rest if "/" in word]
        assert all(Path(path).exists() for path in paths), "no such test"
    else:
        raise ValueError(f"no test knows how to try {program}")


@every_page
@pytest.mark.usefixtures("project", "example_trainer")
def test_commands_are_accepted(page, tmp_path):
    faults, files = [], tmp_path / "files"
    files.mkdir()
    for words in commands(page):
        try:
            accept(with_files(words, files))
        except (Exception, SystemExit) as error:
            faults.append(f"{shlex.join(words)}: {error!r}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page, monkeypatch):
    monkeypatch.setattr(TRAINER_REGISTRY, "_obj_map", dict(TRAINER_REGISTRY._obj_map))
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    weight, text, new_text = torch.randn(3, 4, 512, generator=torch.Generator().manual_seed(0)).unbind()
    # The files and variables that the prose around the blocks introduces.
    Teacher(weight, list("abcd")).save("teacher.safetensors")
    torch.save(torch.nn.Linear(512, 4).state_dict(), "probe.pt")
    Path("names.txt").write_text("a\nb\nc\nd\n")
    for code in blocks(page, "python"):
        names = {"__name__": "dfzsl.trainers.mine", "classnames": list("abcd"), "text": text}
        names |= {"new_text": new_text, "ask": lambda x: (x @ weight.T).argmax(1)}
        exec(compile(code, str(page), "exec"), names)


def check_links(page: Path) -> list[str]:
    """The targets of relative links that do not exist."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        if not linked.exists():
            broken.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            broken += [] if anchor in anchors else [target]
    return broken


def check_name(span: str, page: Path) -> None:
    """Raise an error if a file, a module or what it should define does not exist.

    Checks `trainers/recovery/vmf.py`, `vmf.fit`, `trainers/recovery/vmf.py: fit` and `dfzsl.train.main`.
    """
    name, _, attribute = span.partition(": ")
    name = re.sub(r"\b[A-Z]+\b", "*", name.rstrip("/"))  # NAME, DATASET: any
    is_path = re.fullmatch(rf"({'|'.join(FOLDERS)})(/[\w.*-]+)+|[\w-]+\.(py|sh)", name)
    if is_path and name not in ELSEWHERE:
        base = page.parent.relative_to(ROOT).as_posix()
        patterns = (name, f"{base}/{name}", f"*/{name}")
        if not any(fnmatch.filter(FILES, pattern) for pattern in patterns):
            raise FileNotFoundError
    if attribute and name.endswith(".py"):
        module = name.removeprefix("dfzsl/").removesuffix(".py").replace("/", ".")
        pkgutil.resolve_name(f"dfzsl.{module}:{attribute}")
    elif match := re.match(r"(?!\w+\.yaml)((?:dfzsl|dassl|torch)(?:\.\w+)+)\b", span):
        pkgutil.resolve_name(match[1])
    elif (match := re.match(r"(\w+)\.(?!py|safetensors|yaml)([\w.]+)$", span)) and (
        files := [file for file in FILES if re.fullmatch(rf"trainers/(\w+/)*{match[1]}\.py", file)]
    ):
        pkgutil.resolve_name(f"dfzsl.{files[0].removesuffix('.py').replace('/', '.')}:{match[2]}")


def check_key(span: str) -> None:
    """Raise an error if a config key does not exist or does not take the value that follows it."""
    key, *values = span.split()
    if re.fullmatch(r"[A-Z_]+(\.[A-Z_]+)+", key):
        cfg = get_cfg_default()
        if len(values) == 1:
            cfg.merge_from_list([key, values[0].strip('"')])
        node = cfg
        for part in key.split("."):
            node = node[part]


def flags() -> set[str]:
    """Every flag of every program."""
    return {*train.parser()._option_string_actions} | click_flags(cli.main)


@every_page
def test_links_files_keys_and_flags_exist(page):
    faults, known = [f"{target}: no such target" for target in check_links(page)], flags()
    for span in spans(page):
        try:
            check_name(span, page)
            check_key(span)
            if span.startswith("--") and span.split()[0] not in known:
                raise KeyError("no such flag")
        except Exception as error:
            faults.append(f"`{span}`: {error!r}")
    assert not faults, "\n".join(faults)
