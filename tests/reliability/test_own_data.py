"""Test the user's own data: CSV files, folders, links and spellings.

A mistake gives one line that names the place; nothing is silently skipped, duplicated or distinguished.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import fake_data
import pytest
from readers import build

from dfzsl.datasets.labeled_images import read_labeled_features
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.utils.errors import UserError

ROWS = [f"{name}{number}.jpg,{name}" for name in ("ant", "bee") for number in range(10)]
TABLE = "path,label\n" + "\n".join(ROWS) + "\n"
PLACES = "".join(f"{row},test\n" for row in ROWS)
APART = unicodedata.normalize("NFD", "café")
TOGETHER = unicodedata.normalize("NFC", "café")


@pytest.fixture
def pictures(tmp_path) -> Path:
    for row in ROWS:
        fake_data.picture(tmp_path / "own" / row.split(",")[0], 0, len(row))
    return tmp_path / "own"


WRITTEN: dict[str, Callable[[str], bytes]] = {
    "as it is": str.encode,
    "with a byte-order mark": lambda text: ("\ufeff" + text).encode(),
    "with the ends of lines of Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "with empty lines": lambda text: text.replace("\n", "\n\n").encode(),
    "with quotes": lambda text: text.replace("ant0.jpg,ant", '"ant0.jpg","ant"').encode(),
    "without an end of its last line": lambda text: text.rstrip("\n").encode(),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_csv_is_the_same_however_it_was_written(how, pictures, tried):
    (pictures / "own.csv").write_bytes(WRITTEN[how](TABLE))
    data = build("Csv", pictures / "own.csv")
    assert data.classnames == ["ant", "bee"]
    assert [len(part) for part in (data.train_x, data.val, data.test)] == [10, 4, 6]
    tried("own data", "CSV: byte-order mark, ends of lines, quotes, empty lines", 1, "the same rows")


WRONG = {
    "an image twice": (TABLE + ROWS[0] + "\n", "ant0.jpg"),
    "an image of two classes": (TABLE + "ant0.jpg,bee\n", "ant0.jpg"),
    "an image twice, spelt in two ways": (TABLE + "./ant0.jpg,bee\n", "./ant0.jpg"),
    "an image for training and for testing": (
        f"path,label,split\n{PLACES}ant0.jpg,ant,train\nbee0.jpg,bee,train\n",
        "ant0.jpg",
    ),
    "a link to another one's image": (TABLE + "link.jpg,bee\n", r"link\.jpg.*ant0\.jpg"),
    "no such column": ("path,class\n" + PLACES, "path.*label"),
    "a column twice": ("path,label,path\n" + PLACES, "path, label, path"),
    "a comma without quotes": (TABLE + "bee9.jpg,bee, or wasp\n", "line 22"),
    "a row cut short": (TABLE.replace("\n", "\n\n") + "bee9.jpg\n", "line 43"),
    "a quote that does not end": (TABLE + '"bee9.jpg,bee\n', r"own\.csv"),
    "no split in one row": ("path,label,split\n" + PLACES + "a.jpg,ant\n", "line 22"),
    "another word for a part": (f"path,label,split\n{PLACES}a.jpg,ant,TEST\n", "line 22"),
    "an image that is a folder": (TABLE + "folder.jpg,ant\n", "folder.jpg"),
    "an image that is not there": (TABLE + "ant10.jpg,ant\n", "ant10.jpg"),
    "an address": (TABLE + "http://nowhere/a.jpg,ant\n", "nowhere/a.jpg"),
    "a name with a zero": (TABLE + "a\0.jpg,ant\n", r"a\\x00\.jpg"),
    "classes that differ in case": (TABLE.replace("jpg,bee", "jpg,Ant"), "[Aa]nt"),
    "classes that differ in Unicode form": (
        TABLE.replace("jpg,bee", f"jpg,{APART}").replace("jpg,ant", f"jpg,{TOGETHER}"),
        "caf",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_csv_that_is_wrong(what, pictures, tried):
    text, said = WRONG[what]
    (pictures / "folder.jpg").mkdir()
    (pictures / "link.jpg").symlink_to("ant0.jpg")
    (pictures / "own.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        build("Csv", pictures / "own.csv")
    tried("own data", "CSV: rows, columns, names and images that are wrong", 1, "refused, one line")


def test_a_csv_may_name_pictures_anywhere(pictures, tried):
    (pictures / "deep").mkdir()
    rows = [f"../{row}" for row in ROWS[:10]] + [f"{pictures}/{row}" for row in ROWS[10:]]
    (pictures / "deep/own.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    data = build("Csv", pictures / "deep/own.csv")
    assert len([*data.train_x, *data.val, *data.test]) == 20
    tried("own data", "CSV: paths that are absolute or begin with ../", 2, "read: its owner's choice")


# ---------------------------------------------------------------- folders


@pytest.fixture
def folders(tmp_path) -> Path:
    """Two classes of ten pictures."""
    for label, name in enumerate(("ant", "bee")):
        for number in range(10):
            fake_data.picture(tmp_path / "own" / name / f"{number}.jpg", label, number)
    return tmp_path / "own"


def divide(root: Path) -> None:
    (root / "train").mkdir()
    for name in ("ant", "bee"):
        (root / name).rename(root / "train" / name)
    (root / "test").symlink_to("train")


def respelt(root: Path) -> None:
    for folder, name in (("ant", APART), ("bee", TOGETHER)):
        (root / folder).rename(root / name)
    if len(list(root.iterdir())) < 2:
        pytest.skip("this disk knows one form of Unicode")


LINKED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a loop": (
        lambda root: (root / "loop").symlink_to(root),
        "'loop'",
    ),
    "a link to itself": (lambda root: (root / "self").symlink_to("self"), "self"),
    "a link to nothing": (lambda root: (root / "cat").symlink_to("gone"), "cat"),
    "a class twice": (lambda root: (root / "cat").symlink_to("ant"), "cat .*ant"),
    "an image twice": (
        lambda root: (root / "ant/a.jpg").symlink_to("0.jpg"),
        r"a\.jpg.*0\.jpg",
    ),
    "an image of two classes": (
        lambda root: (root / "bee/a.jpg").symlink_to("../ant/0.jpg"),
        r"bee/a\.jpg.*ant/0\.jpg",
    ),
    "an image hard linked": (lambda root: os.link(root / "ant/0.jpg", root / "ant/a.jpg"), r"ant/(a|0)\.jpg"),
    "an image that leads nowhere": (lambda root: (root / "ant/a.jpg").symlink_to("x.jpg"), r"ant/a\.jpg"),
    "an image that leads to itself": (lambda root: (root / "ant/a.jpg").symlink_to("a.jpg"), r"ant/a\.jpg"),
    "the training set for testing": (divide, r"test/ant/\d\.jpg.*train/ant"),
    "an image that is a folder": (lambda root: (root / "ant/a.jpg").mkdir(), r"ant/a\.jpg"),
    "two folders in two forms of Unicode": (respelt, "café"),
    "two folders that differ in case": (
        lambda root: (root / "bee").rename(root / "Ant"),
        "'ant'",
    ),
    "one folder with two names": (
        lambda root: (root / "classnames.txt").write_text("ant Ameise\nant bee\nbee bee\n"),
        "'ant'.*'Ameise'.*'bee'",
    ),
}


@pytest.mark.parametrize("what", LINKED)
def test_links_and_spellings(what, folders, tried):
    change, said = LINKED[what]
    change(folders)
    with pytest.raises(UserError, match=said):
        build("Folder", folders)
    tried("own data", "folders: links and names that make one thing two, or nothing", 1, "refused, one line")


def test_links_and_spellings_that_are_fine(folders, tried):
    """A whole data set by a link, a class by a link, and names that a Mac has taken apart."""
    expected = [Path(datum.impath).relative_to(folders) for datum in build("Folder", folders).test]
    (folders.parent / "linked").symlink_to(folders)
    found = build("Folder", folders.parent / "linked").test
    assert [Path(datum.impath).relative_to(folders.parent / "linked") for datum in found] == expected
    (folders / "ant").rename(folders.parent / "elsewhere")
    (folders / "ant").symlink_to("../elsewhere")
    assert len(build("Folder", folders).test) == 6
    (folders / "bee").rename(folders / APART)
    (folders / "classnames.txt").write_text(f"{TOGETHER} coffee\nant ant\n", encoding="utf-8")
    data = build("Folder", folders)
    assert data.classnames == ["coffee", "ant"] and {datum.label for datum in data.test} == {0, 1}
    tried("own data", "folders: linked as a whole, names in another form of Unicode", 3, "read")


def test_labeled_folders_have_the_same_eyes(folders, tried):
    (folders / "cat").symlink_to("ant")
    with pytest.raises(UserError, match="cat"):
        read_labeled_features(folders, lambda: load_backbone("shapes"))
    (folders / "cat").unlink()
    (folders / "cat").symlink_to("gone")
    with pytest.raises(UserError, match="cat"):
        read_labeled_features(folders, lambda: load_backbone("shapes"))
    tried("own data", "folders: links and names that make one thing two, or nothing", 2, "refused, one line")


def test_a_client_looks_at_no_training_picture_for_that(tmp_path, monkeypatch):
    root = fake_data.make("Folder", tmp_path)
    looked: list[str] = []
    real = os.stat

    def stat(path, *args, **kwargs):
        looked.append(str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    build("Folder", root, TEACHER__FILE="teacher.safetensors")
    monkeypatch.undo()
    assert any("/test/" in path for path in looked)
    assert not [path for path in looked if "/train/" in path or "/val/" in path]
