"""The documentation as a site: built strictly, so that every link and anchor leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("material", reason="needs mkdocs-material: pip install mkdocs-material")
pytest.importorskip("mkdocstrings", reason="needs mkdocstrings: pip install 'mkdocstrings[python]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = {"dfzsl": "dfzsl", "trainers": "dfzsl.trainers", "datasets": "dfzsl.datasets"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "WARNING" not in ran.stderr
    return folder


class Page(HTMLParser):
    """The anchors of a page, and what it loads from where."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors.add(found.get("id"))
        if tag in ("script", "img", "iframe") or (
            tag == "link" and found.get("rel") in ("stylesheet", "icon")
        ):
            self.loads.append(found.get("src") or found.get("href") or "")


def test_every_public_module_is_in_the_reference(site):
    anchors = set().union(*(Page(path).anchors for path in (site / "reference").rglob("*.html")))
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if not any(part.startswith("_") for part in parts):
                assert ".".join([package, *parts]) in anchors
    assert "dfzsl.io.results.write_results" in anchors


def test_every_page_of_the_repository_is_there(site):
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for page in pages:
        assert (site / page.relative_to(ROOT).with_suffix("") / "index.html").exists()
    index = (site / "index.html").read_text(encoding="utf-8")
    title = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    assert title in index
    # A link to a module leads to the reference.
    assert re.search(r'href="reference/dfzsl[\w.]*/#dfzsl\.io\.results"', index)


def test_a_page_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not [where for where in Page(path).loads if re.match(r"(https?:)?//", where)], path
