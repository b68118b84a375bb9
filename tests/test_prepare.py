"""Test downloads from a local server, hostile and broken archives, recipes and the check of a data folder."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import fake_data
import pytest
from dassl.data.datasets import DATASET_REGISTRY

from dfzsl.prepare import __main__ as prepare
from dfzsl.prepare import fetch, recipes
from dfzsl.prepare.names import dataset_names
from dfzsl.prepare.verify import check
from dfzsl.utils.errors import UserError


class Server:
    """Serves `files`; breaks off after `cut` bytes if that is set; remembers the ranges it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.ranges: list[str | None] = []
        self.kind = "application/octet-stream"
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = owner.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                tag = hashlib.md5(content).hexdigest()
                asked = self.headers["Range"]
                owner.ranges.append(asked)
                start = 0
                if asked and self.headers["If-Range"] == tag:
                    start = int(asked.removeprefix("bytes=").rstrip("-"))
                whole = start >= len(content)
                self.send_response(416 if whole else 206 if start else 200)
                if start:
                    span = "*" if whole else f"{start}-{len(content) - 1}"
                    self.send_header("Content-Range", f"bytes {span}/{len(content)}")
                self.send_header("ETag", tag)
                self.send_header("Content-Type", owner.kind)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                stop = len(content) if owner.cut is None else start + owner.cut
                self.wfile.write(content[start:stop])

            def log_message(self, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


CONTENT = os.urandom(1000) * 300


# ---------------------------------------------------------------- downloads


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_download_is_verified(server, tmp_path, kind):
    server.files["/a.zip"] = CONTENT
    good = f"{kind}:{hashlib.new(kind, CONTENT).hexdigest()}"
    path = fetch.download(f"{server.url}/a.zip", tmp_path / "a.zip", good)
    assert path.read_bytes() == CONTENT
    assert fetch.download(f"{server.url}/a.zip", path, good) == path and len(server.ranges) == 1
    with pytest.raises(UserError, match=f"{kind} .*0000"):
        fetch.download(f"{server.url}/a.zip", tmp_path / "b.zip", f"{kind}:0000")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]


def test_an_interrupted_download_goes_on(server, tmp_path):
    server.files["/a.zip"], server.cut = CONTENT, 100_000
    with pytest.raises(UserError, match=r"a\.zip"):
        fetch.download(f"{server.url}/a.zip", tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists() and (tmp_path / "a.zip.part").stat().st_size == 100_000
    server.cut = None
    assert fetch.download(f"{server.url}/a.zip", tmp_path / "a.zip").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    server.files["/a.zip"], server.cut = CONTENT, 100_000
    with pytest.raises(UserError):
        fetch.download(f"{server.url}/a.zip", tmp_path / "a.zip")
    server.files["/a.zip"], server.cut = CONTENT[::-1], None
    assert fetch.download(f"{server.url}/a.zip", tmp_path / "a.zip").read_bytes() == CONTENT[::-1]


def test_a_complete_part_is_only_verified(server, tmp_path):
    server.files["/a.zip"] = CONTENT
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    (tmp_path / "a.zip.etag").write_text(hashlib.md5(CONTENT).hexdigest())
    assert fetch.download(f"{server.url}/a.zip", tmp_path / "a.zip").read_bytes() == CONTENT


def test_without_a_checksum_the_first_download_is_the_measure(server, tmp_path):
    server.files["/a.zip"] = CONTENT
    fetch.download(f"{server.url}/a.zip", tmp_path / "a.zip").unlink()
    server.files["/a.zip"] = CONTENT[1:]
    with pytest.raises(UserError, match=r"sha256\.json"):
        fetch.download(f"{server.url}/a.zip", tmp_path / "a.zip")


def test_addresses_that_do_not_serve_the_file(server, tmp_path):
    with pytest.raises(UserError, match="404"):
        fetch.download(f"{server.url}/a.zip", tmp_path / "a.zip")
    server.files["/a.zip"], server.kind = b"<html>Too many downloads</html>", "text/html"
    with pytest.raises(UserError, match="web page"):
        fetch.download(f"{server.url}/a.zip", tmp_path / "a.zip")
    with pytest.raises(UserError, match="127"):
        fetch.download("http://127.0.0.1:9/a.zip", tmp_path / "a.zip")
    assert not list(tmp_path.glob("*.zip"))


# ---------------------------------------------------------------- archives


def make_tar(path: Path, names: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            file.addfile(member)
    return path


def make_zip(path: Path, names: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in names.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_an_archive_is_unpacked(tmp_path, make):
    archive = make(tmp_path / "archive", {"a/b.txt": b"1", "a/Ä #2.txt": b"2"})
    fetch.unpack(archive, tmp_path / "out")
    assert (tmp_path / "out/a/b.txt").read_bytes() == b"1" and (tmp_path / "out/a/Ä #2.txt").exists()


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (make_tar, ({"../evil": b"x"},)),
        (make_tar, ({"fine": b"x", "a/../../evil": b"x"},)),
        (make_tar, ({}, {"link": "/etc/passwd"})),
        (make_tar, ({}, {"link": "../../evil"})),
        (make_zip, ({"../evil": b"x"},)),
        (make_zip, ({"/evil": b"x"},)),
        (make_zip, ({"a\\..\\..\\evil": b"x"},)),
        (make_zip, ({"C:/evil": b"x"},)),
    ],
)
def test_a_hostile_archive_writes_nothing(tmp_path, make, arguments):
    archive = make(tmp_path / "archive", *arguments)
    with pytest.raises(UserError, match="unsafe"):
        fetch.unpack(archive, tmp_path / "deep/out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["archive", "deep"]


@pytest.mark.parametrize("make", [make_tar, make_zip])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_half_an_archive(tmp_path, make, share):
    archive = make(tmp_path / "archive", {f"{n}.bin": os.urandom(5000) for n in range(9)})
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="broken"):
        fetch.unpack(archive, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["archive"]


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "archive", {"a": b"12345"})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: SimpleNamespace(free=3))
    with pytest.raises(UserError, match="GB"):
        fetch.unpack(archive, tmp_path / "out")


def test_moving_joins_folders(tmp_path):
    for name in ("from/a/1", "from/a/deep/2", "to/a/3", "to/a/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    fetch.move_into(tmp_path / "from", tmp_path / "to")
    assert {str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*") if p.is_file()} == {
        "a/1",
        "a/deep/2",
        "a/3",
    }
    assert (tmp_path / "to/a/1").read_text() == "from/a/1"


# ---------------------------------------------------------------- recipes


def test_every_data_set_on_the_web_has_a_recipe():
    own = {"Folder", "Csv", "Features"}
    ours = {
        n
        for n in DATASET_REGISTRY.registered_names()
        if DATASET_REGISTRY.get(n).__module__.startswith("dfzsl.") and not n.startswith("Shapes")
    }
    assert set(recipes.RECIPES) == ours - own
    for recipe in recipes.RECIPES.values():
        assert recipe.steps or recipe.mirror


def test_names_are_those_of_registry_and_configs():
    assert dataset_names(["dtd", "OxfordPets", "oxford_pets", "awa2"]) == [
        "DescribableTextures",
        "OxfordPets",
        "AWA2",
    ]
    assert dataset_names(["all"]) == list(recipes.RECIPES)
    with pytest.raises(UserError, match="'oxfordpet'"):
        dataset_names(["oxfordpet"])


def packed(tmp_path: Path, name: str, top: str) -> bytes:
    """A fake data set as an archive whose only folder is `top`."""
    root = fake_data.make(name, tmp_path / "packed")
    folder = root / DATASET_REGISTRY.get(name).folder
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, top)
    return path.read_bytes()


def test_official_steps_make_a_data_set(server, tmp_path, monkeypatch):
    content = packed(tmp_path, "DescribableTextures", "dtd")
    server.files |= {"/dtd-r1.0.1.tar.gz": content, "/split": b"not used"}
    split = (tmp_path / "packed/dtd/split_zhou_DescribableTextures.json").read_bytes()
    server.files["/split"] = split
    md5 = f"md5:{hashlib.md5(content).hexdigest()}"
    archive = recipes.Archive(f"{server.url}/dtd-r1.0.1.tar.gz", "images", md5, take="dtd")
    steps = (archive, recipes.File(f"{server.url}/split", "split_zhou_DescribableTextures.json"))
    monkeypatch.setitem(recipes.RECIPES, "DescribableTextures", recipes.Recipe((5, 20, 10, 15), steps))
    prepare.main(["dtd", "--root", str(tmp_path / "data")])
    prepare.main(["dtd", "--root", str(tmp_path / "data"), "--check", "--workers", "1"])
    asked = len(server.ranges)
    prepare.main(["dtd", "--root", str(tmp_path / "data")])
    assert len(server.ranges) == asked, "what is there is not fetched again"


@pytest.mark.parametrize("top", ["dtd", "whatever/deeper", "."])
def test_the_mirrors_archive_may_have_any_top_folder(server, tmp_path, monkeypatch, top):
    server.files["/dtd.zip"] = content = packed(tmp_path, "DescribableTextures", top)
    listed = {"dtd.zip": (f"{server.url}/dtd.zip", f"sha256:{hashlib.sha256(content).hexdigest()}")}
    monkeypatch.setattr(recipes, "listing", lambda repository: listed)
    recipes.prepare("DescribableTextures", tmp_path / "data", "mirror")
    report = check("DescribableTextures", tmp_path / "data", 1)
    assert report.counts == (5, 20, 10, 15) and not report.missing and not report.broken


def test_the_hubs_listing_gives_checksums(monkeypatch):
    answer = b'[{"path": "README.md", "size": 3}, {"path": "dtd.zip", "lfs": {"oid": "abc", "size": 9}}]'
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(answer))
    found = fetch.listing("somebody/data")
    assert found == {"dtd.zip": ("https://huggingface.co/somebody/data/resolve/main/dtd.zip", "sha256:abc")}


def test_what_is_to_be_done_by_hand_is_said(tmp_path, monkeypatch):
    def offline(url, path, checksum=""):
        raise UserError(f"{url} answers nothing")

    monkeypatch.setattr(recipes, "download", offline)
    with pytest.raises(UserError) as error:
        prepare.main(["imagenet", "flo", "--root", str(tmp_path)])
    said = str(error.value)
    assert f"{tmp_path}/imagenet/images/train must be placed there by hand" in said
    assert f"{tmp_path}/FLO/res101.mat must be placed there by hand" in said


# ---------------------------------------------------------------- check


@pytest.fixture
def pets(tmp_path, monkeypatch):
    recipe = recipes.RECIPES["OxfordPets"]
    monkeypatch.setitem(recipes.RECIPES, "OxfordPets", recipes.Recipe((5, 20, 10, 15), recipe.steps))
    return fake_data.make("OxfordPets", tmp_path)


def test_check_is_content_with_a_whole_data_set(pets, capsys):
    prepare.main(["oxford_pets", "--root", str(pets), "--check", "--workers", "1"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("OxfordPets"))
    assert line.split() == ["OxfordPets", "5", "20", "10", "15", "0", "0", "ok"]


def test_check_counts_missing_and_broken_images(pets, capsys):
    images = sorted((pets / "oxford_pets/images").iterdir())
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:300])
    images[2].write_text("no image")
    with pytest.raises(UserError, match="OxfordPets"):
        prepare.main(["oxford_pets", "--root", str(pets), "--check", "--workers", "2"])
    said = capsys.readouterr().out
    assert said.splitlines()[2].split()[:7] == ["OxfordPets", "5", "20", "10", "15", "1", "2"]
    assert f"{images[0]}: missing" in said and str(images[1]) in said and str(images[2]) in said


def test_check_tells_other_counts_and_what_is_not_there(tmp_path, capsys):
    root = fake_data.make("EuroSAT", tmp_path)
    with pytest.raises(UserError, match="EuroSAT, UCF101"):
        prepare.main(["eurosat", "ucf101", "--root", str(root), "--check", "--workers", "1"])
    said = capsys.readouterr().out
    assert "EuroSAT: 20 training images; the published data set has 13500" in said
    assert f"UCF101: {root}/ucf101: no such folder" in said


@pytest.mark.parametrize("name", sorted(set(fake_data.FAKES) - {"Folder", "Csv", "Features"}))
def test_every_data_set_can_be_checked(name, tmp_path):
    report = check(name, fake_data.make(name, tmp_path), 1)
    assert report.counts[0] >= 4 and not report.missing and not report.broken
    assert all("the published data set has" in said for said in report.problems)


def test_the_command_needs_no_other_import(tmp_path):
    """In a fresh process, where no trainer has added its config keys."""
    command = [sys.executable, "-m", "dfzsl", "prepare", "nosuch", "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "nosuch" in done.stderr and "Traceback" not in done.stderr
