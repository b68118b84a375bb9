"""The HTML page: what is in it, and how a browser shows it, wide and narrow, light and dark."""

from __future__ import annotations

import csv
import io
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from made_results import ELEVEN, GAINS, write_failure, write_transfer, write_world

from dfzsl.report import __main__ as command
from dfzsl.report.method_names import COLORS
from dfzsl.utils.errors import UserError

pytest.importorskip("matplotlib")

CSS = (Path(command.__file__).parent / "page.css").read_text()


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


def test_every_plot_is_there_and_well_formed(html):
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    scores = ["H", "base against new"]
    gains = ["DFZSL against CLIP by {}", "All against CLIP by {}"]
    assert titles == [
        *scores,
        gains[0].format("data set"),
        *2 * [*(title.format("class") for title in gains), "Training curves"],
    ]
    drawn = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawn) == len(titles)
    for svg in drawn:
        ElementTree.fromstring(svg.replace("xlink:", ""))
    assert "The largest gains and losses of 30" in html and "⋯ 18 between" in html


def test_colours_are_left_to_the_style(html):
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", html))
    light, dark = html.split("prefers-color-scheme")[:2]
    assert used <= set(re.findall(r"(--[a-z0-9]+):", light))
    assert used <= set(re.findall(r"(--[a-z0-9]+):", dark))
    assert "#fe0" not in html


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


def test_matplotlib_is_asked_for_when_it_is_missing(tmp_path, monkeypatch):
    write_world(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("page", "figures"):
        monkeypatch.delitem(sys.modules, f"dfzsl.report.{module}", raising=False)
    with pytest.raises(UserError, match="the HTML page needs matplotlib: pip install matplotlib"):
        command.main([str(tmp_path), "--html", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_of_methods_are_told_apart_by_everyone(theme):
    """Of the paper by a contrast of 3 (WCAG 2.2, 1.4.11); of one another, by the colour-blind too, by
    10 units of CAM02-UCS, of which one is just noticed."""
    convert = pytest.importorskip("colorspacious").cspace_convert
    block = CSS.split("prefers-color-scheme")[theme]
    found = dict(re.findall(r"--(paper|method\d): #([0-9a-f]{6})", block))
    assert len(found) == 1 + COLORS
    rgb = {
        name: np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]) for name, code in found.items()
    }
    paper = rgb.pop("paper")

    def luminance(color):
        return float(
            np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
            @ [0.2126, 0.7152, 0.0722]
        )

    for color in rgb.values():
        low, high = sorted([luminance(paper), luminance(color)])
        assert (high + 0.05) / (low + 0.05) >= 3
    for kind in (None, "deuteranomaly", "protanomaly", "tritanomaly"):
        seen = rgb.values()
        if kind:
            sight = {"name": "sRGB1+CVD", "cvd_type": kind, "severity": 50 if kind == "tritanomaly" else 100}
            seen = [np.clip(convert(color, sight, "sRGB1"), 0, 1) for color in seen]
        places = [convert(color, "sRGB1", "CAM02-UCS") for color in seen]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(places, 2)) >= 10


REPORTS: dict[str, Callable[[Path], None]] = {
    "six": lambda root: write_world(root),
    "24": lambda root: write_world(root, ("dtd",), 24, "a class with quite a long name {}", list(GAINS)),
    "1,000": lambda root: write_world(root, ("imagenet",), 1000, methods=list(GAINS), seeds=(1,)),
    "eleven sets": lambda root: write_world(root, ELEVEN, 2, methods=("ZeroshotCLIP", "DFZSL")),
    "transfer": lambda root: write_transfer(root),
}

# Pairs of texts of one plot whose boxes share more than a pixel, and texts that leave their plot's figure.
FAULTS = """() => {
  const faults = [];
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.closest('figure').getBoundingClientRect();
    const box = text => [text.textContent.trim(), text.getBoundingClientRect()];
    const texts = [...svg.querySelectorAll('text')].map(box);
    texts.forEach(([said, a], i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.bottom > frame.bottom + 1)
        faults.push(`${svg.ariaLabel}: '${said}' leaves the figure`);
      for (const [other, b] of texts.slice(i + 1))
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2)
          faults.push(`${svg.ariaLabel}: '${said}' is on '${other}'`);
    });
  }
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) faults.push(`the page is ${page.scrollWidth} wide`);
  return faults;
}"""


@pytest.mark.parametrize("name", REPORTS)
def test_in_a_browser(chromium, name, tmp_path):
    """No label on another, nothing too wide, folds that open by link and by click, no request; axe-core."""
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
        assert tab.evaluate(FAULTS) == []
        broken = axe.run(tab).response["violations"]
        assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in broken] == []
        assert asked == [address] and said == []
        tab.close()
