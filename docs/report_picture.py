"""The results on the report page as a browser shows it, docs/report.webp:

    python docs/report_picture.py OUTPUT

OUTPUT is what `bash scripts/dfzsl/base2new.sh` left. Needs playwright and an installed Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from dfzsl.report import collect, sections
from dfzsl.report.page import write_page

PICTURE = Path(__file__).with_name("report.webp")
WIDTH, SCALE = 1360, 1.5  # of the page in CSS pixels, and how many of the picture make one


def draw(output: Path, picture: Path = PICTURE) -> None:
    """The page of the results below `output`, photographed."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder, "report.html")
        write_page(page, sections(collect(output)))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE)
        tab.goto(page.as_uri())
        end = tab.evaluate("document.querySelector('main').getBoundingClientRect().bottom")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": end}
        shot = Image.open(io.BytesIO(tab.screenshot(full_page=True, clip=clip)))
        shot.convert("RGB").save(picture, quality=70, method=6)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    draw(parser.parse_args().output)
