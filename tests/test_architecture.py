"""Who may import whom (docs/architecture.md): rooms stand on those below them, and nothing goes round."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# From the ground up, as prefixes of modules: the longest decides. A room imports itself and those before it.
ROOMS = {
    "ground": "dfzsl",
    "report": "dfzsl.report",
    "configs": "dfzsl.configs",
    "datasets": "dfzsl.datasets",
    "clip": "dfzsl.trainers.clip",
    "recovery": "dfzsl.trainers.recovery",
    "generation": "dfzsl.trainers.generation",
    "trainers": "dfzsl.trainers",
    "programs": "dfzsl.train dfzsl.launch dfzsl.prepare dfzsl.pictures dfzsl.datasets.extract dfzsl.cli "
    "dfzsl.building dfzsl.labelled dfzsl.evaluation dfzsl.predict dfzsl.cards dfzsl.export dfzsl.serve "
    "dfzsl.importing dfzsl.geometry dfzsl.datasets.shapes.geometry dfzsl.datasets.shapes.train_vit",
}
FLOORS = list(ROOMS)
# Libraries that only these rooms and modules know.
KNOWN_BY = {
    "dassl": {"dfzsl.toolbox", "datasets", "trainers", "programs"},
    "yacs": {"dfzsl.toolbox", "dfzsl.train"},
    "open_clip": {"clip", "dfzsl.datasets.shapes.train_clip"},
}
# Which folder is which package: setup.py says it.
FOLDERS = next(
    {package: ROOT / folder for package, folder in ast.literal_eval(node.value).items()}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS"
)


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    fitting = [
        (len(p), name) for name in ROOMS for p in ROOMS[name].split() if f"{module}.".startswith(f"{p}.")
    ]
    return max(fitting)[1]


def imports(module: str) -> Iterator[str]:
    """What a module imports, wherever in it: modules of ours, and the top names of others."""
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: None if path.name == "__init__.py" else -1]
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            whole = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else source for name in whole]
        else:
            continue
        yield from (name if name in MODULES else name.split(".")[0] for name in names)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    here = room(module)
    for name in imports(module):
        if name in MODULES:
            assert room(name) in FLOORS[: FLOORS.index(here) + 1], f"{here} imports {name}"
        elif name in KNOWN_BY:
            assert KNOWN_BY[name] & {here, module}, f"{here} imports {name}"


def test_no_circle():
    graph = {module: {name for name in imports(module) if name in MODULES} - {module} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_picture_shows_every_module():
    drawn = set(re.findall(r"\w+", (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")))
    # A package inside a room is drawn as a whole.
    parts = {tuple(name.removeprefix("dfzsl.").split(".")) for name in MODULES}
    tops = {"datasets", "trainers", "trainers.clip", "trainers.recovery", "trainers.generation"}
    shown = {p[-1] for p in parts if ".".join(p[:-1]) in {"", *tops}} - {"__main__"}
    assert sorted(shown - drawn) == []
