"""docs/api.md says what the docstrings say, and docs/dfzsl.ipynb runs."""

from __future__ import annotations

import runpy

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient


def test_the_pages_table_is_made_from_the_docstrings():
    made = runpy.run_path(str(ROOT / "docs/api.py"))
    assert made["page"]() == made["PAGE"].read_text(encoding="utf-8"), "run python docs/api.py"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(ROOT / "docs/dfzsl.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "kept without outputs"
    done = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [
        output["data"]["text/plain"]
        for cell in done.cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]
    assert "Teacher(cosine, 6 classes, d = 128, shapes (" in said[1]
    assert said[2].startswith("Classifier(6 base + 4 new classes")
    table = done.cells[-1]["outputs"][-1]["text"]
    accuracy = {line.split()[0]: float(line.split()[1]) for line in table.splitlines()[2:]}
    assert accuracy["base"] > 40 and accuracy["new"] > 40  # chance is 17 and 20
