"""What the documentation tells a reader to type, name or follow exists and is accepted."""

from __future__ import annotations

import argparse
import fnmatch
import io
import itertools
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
from made_results import write_world
from PIL import Image
from sweeps import planned_jobs

from dfzsl import train
from dfzsl.cli import experiments
from dfzsl.cli import main as cli
from dfzsl.client import predict
from dfzsl.launch.checkouts import RECIPES
from dfzsl.launch.runs import FREE
from dfzsl.report import collect, sections
from dfzsl.report.formats import tabulated, terminal
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
ELSEWHERE = {"trainers/feature_adapter.py", "parse_test_res.py"}
MODULES = {
    "dfzsl.launch": experiments.launch,
    "dfzsl.report": experiments.report,
    "dfzsl.datasets.extract": experiments.extract,
    "dfzsl.prepare": experiments.prepare,
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")


def blocks(language: str) -> list:
    return [
        pytest.param(page, body, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, (kind, body) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
        if kind == language
    ]


def spans(page: Path) -> list[str]:
    """What stands in backticks outside of blocks, on one line each."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(found.split()) for found in SPAN.findall(prose)]


def commands() -> list:
    """(page, words) of every command: lines of shell blocks, and spans that begin as one."""
    found = []
    for page, body in (param.values for param in blocks("bash")):
        found += [(page, line) for line in body.replace("\\\n", " ").splitlines()]
    program = re.compile(r"(\w+=\S+ )*(bash|python|pip|torchrun|dfzsl) ")
    found += [(page, span) for page in PAGES for span in spans(page) if program.match(span)]
    cases: dict[str, list[str]] = {}
    for page, line in found:
        for part in line.split("&&"):
            words = shlex.split(part.replace("$CONFIGS", "configs"), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words and words[0] == "cd":  # what follows runs in another project
                break
            if words:
                cases.setdefault(f"{page.relative_to(ROOT)}: {shlex.join(words)}", words)
    return [pytest.param(words, id=name) for name, words in cases.items()]


@pytest.fixture(autouse=True)
def defaults_stay():
    """The pages' examples add config keys, which later tests in this process would find in their results."""
    before = DEFAULTS.clone()
    yield
    DEFAULTS.clear()
    DEFAULTS.update(before)


@pytest.fixture
def examples(monkeypatch, tmp_path):
    """The trainer that docs/new_trainer.md has its reader write, for as long as a test runs."""
    monkeypatch.setattr(TRAINER_REGISTRY, "_obj_map", dict(TRAINER_REGISTRY._obj_map))
    page = ROOT / "docs/new_trainer.md"
    code = next(param.values[1] for param in blocks("python") if param.values[0] == page)
    exec(compile(code, str(page), "exec"), {"__name__": "dfzsl.trainers.feature_adapter"})


@pytest.fixture
def given(tmp_path):
    """Replaces the files that a command reads by empty ones that exist."""

    def stand_in(words: list[str]) -> list[str]:
        new = []
        for i, word in enumerate(words):
            kind, colon, path = word.partition(":")
            if colon and kind in ("folder", "csv", "features"):
                word = f"{kind}:{_touched(tmp_path / Path(path).name)}"
            elif i and words[i - 1] == "--methods":
                word = re.sub(
                    r"@([^,]*/[^,]*)", lambda at: f"@{_checkout(tmp_path / Path(at[1]).name)}", word
                )
            elif i and words[i - 1] == "TEACHER.FILE":
                word = str(_touched(tmp_path / Path(word).name))
            new.append(word)
        return new

    return stand_in


def _touched(path: Path) -> Path:
    path.touch()
    return path


def _checkout(folder: Path) -> Path:
    """What a repository of CoOp's kind has: train.py, the configs of data sets and of every recipe."""
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
            for _, arguments in job.reader.parts():
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


class Accepted(BaseException):  # not to be explained to a user
    """Thrown by a program's argument parser once it has accepted its arguments."""


def accept_script(words: list[str], monkeypatch) -> None:
    """Run a script up to where its arguments are accepted, and no further."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Accepted

    def stop(*args):
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)  # benchmarks
    monkeypatch.setattr(click.Command, "invoke", stop)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", [str((ROOT / words[0]).parent), *sys.path])
    with pytest.raises(Accepted):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.mark.parametrize("words", commands())
def test_commands_are_accepted(words, monkeypatch, examples, given, tmp_path):
    monkeypatch.chdir(ROOT)
    program, *rest = given(words)
    if program == "torchrun":
        start = next(i for i, word in enumerate(rest) if word == "-m" or word.endswith(".py"))
        program, rest = "python", rest[start:]
    if program == "bash":
        script, *arguments = rest
        subprocess.run(["bash", "-n", script], check=True)
        runs = [line for line in Path(script).read_text().splitlines() if "dfzsl.launch" in line]
        monkeypatch.chdir(tmp_path)  # the checkout's output/ may hold such runs with other settings
        for line in runs:
            accept_launch([*shlex.split(line.partition("dfzsl.launch ")[2])[:-1], *arguments])
        assert runs or script in ("scripts/test.sh", "scripts/reliability.sh")
    elif program == "dfzsl":
        accept_click(cli.main, rest)
    elif program == "python" and rest[0] == "train.py":
        accept_train(rest[1:])
    elif program == "python" and rest[:2] == ["-m", "dfzsl.launch"]:
        monkeypatch.chdir(tmp_path)
        accept_launch(rest[2:])
    elif program == "python" and rest[0] == "-m":
        accept_click(MODULES[rest[1]], rest[2:])
    elif program == "python":
        accept_script(rest, monkeypatch)
    elif program == "pip":
        path = rest[-1].partition("[")[0]
        assert rest[0] == "install"
        assert path.startswith("/path/to/") or (ROOT / path / "pyproject.toml").exists()
    elif program == "git":
        assert rest[0] == "clone"
    elif program == "pytest":
        assert all(Path(path).exists() for path in rest)
    else:
        pytest.fail(f"no test knows how to try {program}")


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_blocks_run(page, code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TRAINER_REGISTRY, "_obj_map", dict(TRAINER_REGISTRY._obj_map))
    rows, text, new_text = torch.randn(3, 4, 512, generator=torch.Generator().manual_seed(0)).unbind()
    # What the text around the block says is there.
    Teacher(rows, list("abcd")).save("teacher.safetensors")
    torch.save(torch.nn.Linear(512, 4).state_dict(), "probe.pt")
    Path("names.txt").write_text("a\nb\nc\nd\n")
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    names = {
        "__name__": "dfzsl.trainers.mine",
        "classnames": list("abcd"),
        "text": text,
        "new_text": new_text,
    }
    names["ask"] = lambda x: (x @ rows.T).argmax(1)
    exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_what_they_define_exist(page):
    """`trainers/recovery/vmf.py`, `vmf.fit`, `trainers/recovery/vmf.py: fit`, `dfzsl.train.main`"""
    for span in spans(page):
        name, _, attribute = span.partition(": ")
        name = re.sub(r"\b[A-Z]+\b", "*", name.rstrip("/"))  # NAME, DATASET: any
        if (
            re.fullmatch(rf"({'|'.join(FOLDERS)})(/[\w.*-]+)+|[\w-]+\.(py|sh)", name)
            and name not in ELSEWHERE
        ):
            base = page.parent.relative_to(ROOT).as_posix()
            patterns = (name, f"{base}/{name}", f"*/{name}")
            assert any(fnmatch.filter(FILES, pattern) for pattern in patterns), span
        if attribute and name.endswith(".py"):
            pkgutil.resolve_name(f"dfzsl.{name.removesuffix('.py').replace('/', '.')}:{attribute}")
        elif match := re.match(r"(?!\w+\.yaml)((?:dfzsl|dassl|torch)(?:\.\w+)+)\b", span):
            pkgutil.resolve_name(match[1])
        elif (match := re.match(r"(\w+)\.(?!py|safetensors|yaml)([\w.]+)$", span)) and (
            files := [file for file in FILES if re.fullmatch(rf"trainers/(\w+/)*{match[1]}\.py", file)]
        ):
            pkgutil.resolve_name(f"dfzsl.{files[0].removesuffix('.py').replace('/', '.')}:{match[2]}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_config_keys_exist_and_take_the_values_shown(page):
    for span in spans(page):
        key, *values = span.split()
        if re.fullmatch(r"[A-Z_]+(\.[A-Z_]+)+", key):
            cfg = get_cfg_default()
            if len(values) == 1:
                cfg.merge_from_list([key, values[0].strip('"')])
            node = cfg
            for part in key.split("."):
                node = node[part]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_exist(page):
    known = {*train.parser()._option_string_actions} | click_flags(cli.main)
    assert {span.split()[0] for span in spans(page) if span.startswith("--")} <= known


def shown(start: str) -> str:
    """The block of the README that begins like this, without that line."""
    (body,) = [
        body
        for kind, body in FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        if not kind and body.startswith(start)
    ]
    return body.partition("\n")[2]


def cells_of(table: str) -> list[list[str]]:
    """The cells of a table, whose second line is dashes, as wide as their columns."""
    head, dashes, *lines = table.splitlines()
    spans = [match.span() for match in re.finditer("-+", dashes)]
    return [[line[a:b] for a, b in spans] for line in (head, *lines)]


def test_the_predictions_shown_are_as_the_command_prints_them():
    text = shown("$ dfzsl predict ")
    printed = io.StringIO()
    table = predict.Table(printed)
    rows = [[cell.strip() for cell in row] for row in cells_of(text)[1:]]
    for place, (path, *_) in enumerate(rows):
        if path:
            ranked = itertools.takewhile(lambda row: not row[0], rows[place + 1 :])
            best = [(name, float(chance.rstrip("%")) / 100) for _, name, chance in [rows[place], *ranked]]
            table.add(path, best)
    table.close()
    assert printed.getvalue() == text


def test_the_table_shown_is_as_a_sweep_prints_it(tmp_path):
    title, table = shown("$ bash scripts/dfzsl/base2new.sh shapes").rstrip("\n").split("\n\n")
    write_world(tmp_path / "base2new", ("shapes",), methods=(*FREE, "DFZSL"))
    made_title, made_table, *_ = terminal(sections(collect(tmp_path))).split("\n\n")
    assert title == made_title.replace("ViT-B-16", "shapes")
    (head, *rows), (made_head, *made_rows) = cells_of(table), cells_of(made_table)
    names = [name.strip() for name in head]
    assert names == [name.strip() for name in made_head]
    assert {row[0].strip() for row in rows} == {row[0].strip() for row in made_rows}
    assert tabulated(names, [[row[0].rstrip(), *row[1:]] for row in rows], "simple") == table
    for mine, made in zip(rows, made_rows, strict=True):
        assert [re.sub("[0-9]", "0", cell) for cell in mine[1:4]] == [
            re.sub("[0-9]", "0", cell) for cell in made[1:4]
        ]


# Texts that leave the narrowest frame around their middle, or lie on another.
CROWDED = """() => {
  const box = e => e.getBoundingClientRect();
  const frames = [...document.querySelectorAll('rect')].map(box);
  const texts = [...document.querySelectorAll('text')].map(e => [e.textContent, box(e)]);
  const faults = [];
  texts.forEach(([said, a], i) => {
    const x = (a.left + a.right) / 2, y = (a.top + a.bottom) / 2;
    const around = frames.filter(f => f.left < x && x < f.right && f.top < y && y < f.bottom);
    const frame = around.sort((f, g) => f.width * f.height - g.width * g.height)[0];
    if (a.left < frame.left + 2 || a.right > frame.right - 2 || a.bottom > frame.bottom)
      faults.push(`'${said}' leaves its frame`);
    for (const [other, b] of texts.slice(i + 1))
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
          Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
        faults.push(`'${said}' is on '${other}'`);
  });
  return faults;
}"""


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs").glob("*.svg")))
def test_drawings_have_room_for_wide_letters(chromium, name, tmp_path):
    drawing = (ROOT / "docs" / name).read_text(encoding="utf-8")
    wide = re.sub('font-family="[^"]*"', 'font-family="Verdana, DejaVu Sans, sans-serif"', drawing)
    (tmp_path / name).write_text(wide, encoding="utf-8")
    tab = chromium.new_page()
    tab.goto((tmp_path / name).as_uri())
    assert tab.evaluate(CROWDED) == []
    tab.close()


def test_the_picture_of_the_report_is_small():
    with Image.open(ROOT / "docs/report.webp") as picture:
        assert picture.width >= 1000
    assert (ROOT / "docs/report.webp").stat().st_size < 200_000
