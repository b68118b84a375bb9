"""Check the HTML report page: its content, and how a browser shows it."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
from made_results import ELEVEN, GAINS, write_failure, write_transfer, write_world

from dfzsl.report import __main__ as command
from dfzsl.utils.errors import UserError

pytest.importorskip("matplotlib")


def page_of(root: Path, *flags: str) -> Path:
    file = root / "page.html"
    command.main([str(root), "--html", str(file), "--format", "csv", *flags])
    return file


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("output")
    write_world(root / "base2new", datasets=("x", "y"), classes=30, names="<b>$class$ 犬 {} & co")
    write_failure(root / "base2new", "CoOp", 4, "<script>alert(1)</script>", data="x")
    return page_of(root, "--published").read_text(encoding="utf-8")


def test_needs_nothing_but_itself(html):
    assert not re.search(r"https?:|<link|<script|<img|<iframe|@import|url\((?!#)", html)
    assert "prefers-color-scheme: dark" in html


def test_text_from_files_is_escaped(html):
    assert "<b>$class" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "$class$ 犬" in html


def test_every_class_is_in_the_csv(html):
    links = re.findall(r'href="data:text/csv;charset=utf-8,([^"]*)"', html)
    assert len(links) == 2
    rows = list(csv.DictReader(io.StringIO(unquote(links[0]))))
    assert len(rows) == 30 and rows[-1]["class"] == "<b>$class$ 犬 29 & co (new)"
    assert all(0 <= float(row[name]) <= 100 for row in rows for name in ("CLIP", "CoOp", "DFZSL"))


def test_same_results_give_the_same_bytes(tmp_path):
    write_world(tmp_path)
    assert page_of(tmp_path).read_bytes() == page_of(tmp_path).read_bytes()


def test_missing_matplotlib_is_reported(tmp_path, monkeypatch):
    write_world(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("page", "figures"):
        monkeypatch.delitem(sys.modules, f"dfzsl.report.{module}", raising=False)
    with pytest.raises(UserError, match="pip install matplotlib"):
        command.main([str(tmp_path), "--html", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


REPORTS: dict[str, Callable[[Path], None]] = {
    "24": lambda root: write_world(root, ("dtd",), 24, "a class with quite a long name {}", list(GAINS)),
    "eleven sets": lambda root: write_world(root, ELEVEN, 2, methods=("ZeroshotCLIP", "DFZSL")),
    "transfer": lambda root: write_transfer(root),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_in_a_browser(chromium, name, tmp_path):
    """The page asks for nothing, reports no error, opens its folds and is accessible (axe-core)."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    REPORTS[name](tmp_path / ("xd" if name == "transfer" else "base2new"))
    address = page_of(tmp_path, "--published").as_uri()
    for width, scheme in ((1400, "light"), (390, "dark")):
        tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        asked, said = [], []
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        tab.on("console", lambda message, said=said: said.append(message.text))
        tab.goto(address)
        folds, links = tab.locator("main details"), tab.locator("nav a")
        assert folds.count() == (11 if name == "eleven sets" else 0)
        if folds.count():
            links.last.click()
            assert folds.last.locator("svg").first.is_visible()
        for fold in folds.all()[:-1]:
            assert not fold.locator("svg").first.is_visible()
            fold.locator("summary").click()
            assert fold.locator("svg").first.is_visible()
        broken = axe.run(tab).response["violations"]
        assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in broken] == []
        assert asked == [address] and said == []
        tab.close()
