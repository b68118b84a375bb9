"""Test downloads from servers that disconnect or send wrong files, hostile archives, and interruptions."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_data
import killing
import numpy as np
import pytest
from conftest import needs_proc
from readers import grown

from dfzsl.io.files import lock
from dfzsl.prepare import fetch, recipes
from dfzsl.utils.errors import UserError

OLD, NEW = (np.random.default_rng(seed).bytes(200_000) for seed in (0, 1))
HALF = 100_000
Answer = Callable[[BaseHTTPRequestHandler, "int | None"], None]


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """Answers by `server.answers` in turn, the last for ever; `server.asked`: the ranges wanted."""
    state = SimpleNamespace(answers=[], asked=[])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            asked = self.headers["Range"]
            state.asked.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else None
            answer = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            answer(self, start)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/a.bin"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def reply(status: int, body: bytes, **headers: object) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, start: int | None) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            if value is not None:
                handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def broken_off(content: bytes, tag: str | None) -> Answer:
    return reply(200, content[:HALF], Content_Length=len(content), ETag=tag)


def rest(content: bytes, start: int = HALF, tag: str | None = '"1"', **headers: object) -> Answer:
    span = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return reply(206, content[start:], **{"ETag": tag, "Content_Range": span, **headers})


# Responses of a server after it disconnected within the old file, and the file that the download gives.
SECOND: dict[str, tuple[list[Answer], bytes]] = {
    "resumes": ([rest(OLD)], OLD),
    "resumes without an ETag": ([rest(OLD, tag=None)], OLD),
    "ignores Range": ([reply(200, OLD, ETag='"1"')], OLD),
    "has another file, with status 200": ([reply(200, NEW, ETag='"2"')], NEW),
    "has another file, with status 206": ([rest(NEW, tag='"2"'), reply(200, NEW, ETag='"2"')], NEW),
    "resumes at another position": ([rest(OLD, HALF - 7), reply(200, OLD)], OLD),
    "resumes without Content-Range": ([rest(OLD, Content_Range=None), reply(200, OLD)], OLD),
    "disconnects again": ([reply(206, OLD[HALF:150_000], ETag='"1"', Content_Length=HALF,
                                Content_Range="bytes 100000-199999/200000"), rest(OLD, 150_000)], OLD),
    "sends a part": ([reply(206, OLD[HALF:150_000], ETag='"1"', Content_Range="bytes 100000-149999/200000"),
                       rest(OLD, 150_000)], OLD),
    "has a shorter file": ([reply(416, b"", Content_Range="bytes */50000"), reply(200, NEW[:50_000])],
                           NEW[:50_000]),
    "has no such range, without Content-Range": ([reply(416, b""), reply(200, OLD)], OLD),
    "fails": ([reply(503, b"busy"), rest(OLD)], OLD),
    "sends an invalid length": ([reply(206, OLD[HALF:], Content_Length="many"), rest(OLD)], OLD),
}  # fmt: skip


@pytest.mark.parametrize("what", SECOND)
def test_a_download_that_goes_on(what, server, tmp_path, tried):
    answers, expected = SECOND[what]
    server.answers = [broken_off(OLD, '"1"'), *answers]
    path, tries = tmp_path / "a.bin", 0
    while not path.exists():
        tries += 1
        assert tries <= 1 + len(answers)
        try:
            fetch.download(server.url, path)
        except UserError as error:
            assert "run the command again" in str(error) or "responds 503" in str(error)
    assert path.read_bytes() == expected
    assert server.asked[:2] == [None, f"bytes={HALF}-"]
    assert json.loads((tmp_path / fetch.CHECKSUMS).read_text()) == {
        server.url: hashlib.sha256(expected).hexdigest()
    }
    tried("fetched", "downloads: Range ignored, another file, another place, broken off", 1, "the whole file")


def test_a_server_that_says_no_length(server, tmp_path, tried):
    """The end of the file and a broken line are the same to it."""
    server.answers = [reply(200, OLD[:HALF], Content_Length=None)]
    with pytest.raises(UserError, match="no file length"):
        fetch.download(server.url, tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())
    good = f"sha256:{hashlib.sha256(OLD).hexdigest()}"
    with pytest.raises(UserError, match="sha256"):
        fetch.download(server.url, tmp_path / "a.bin", good)
    server.answers = [reply(200, OLD, Content_Length=None)]
    assert fetch.download(server.url, tmp_path / "a.bin", good).read_bytes() == OLD
    tried("fetched", "downloads: no length, wrong length, wrong checksum", 3, "refused, one line")


@pytest.mark.parametrize("checksum", ["", f"sha256:{'0' * 64}"])
def test_a_wrong_checksum_leaves_nothing(checksum, server, tmp_path, tried):
    server.answers = [reply(200, OLD)]
    if not checksum:
        (tmp_path / fetch.CHECKSUMS).write_text(json.dumps({server.url: "0" * 64}))
    with pytest.raises(UserError, match="sha256"):
        fetch.download(server.url, tmp_path / "a.bin", checksum)
    assert {path.name for path in tmp_path.iterdir()} <= {fetch.CHECKSUMS}
    tried("fetched", "downloads: no length, wrong length, wrong checksum", 1, "refused, one line")


def test_a_length_that_is_too_great(server, tmp_path, tried):
    server.answers = [reply(200, OLD, Content_Length=len(OLD) + 1)]
    with pytest.raises(UserError, match="200000 of 200001"):
        fetch.download(server.url, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    tried("fetched", "downloads: no length, wrong length, wrong checksum", 1, "refused, one line")


def test_an_old_half_is_never_called_by_the_new_name(server, tmp_path, monkeypatch, tried):
    """Killed when the new version's name is known and none of its bytes have come."""
    server.answers = [broken_off(OLD, '"1"'), reply(200, NEW, ETag='"2"'), rest(NEW, tag='"2"')]
    with pytest.raises(UserError):
        fetch.download(server.url, tmp_path / "a.bin")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch, "tqdm", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        fetch.download(server.url, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin.part").exists()
    server.answers = [reply(200, NEW, ETag='"2"')]
    assert fetch.download(server.url, tmp_path / "a.bin").read_bytes() == NEW
    tried("fetched", "downloads: Range ignored, another file, another place, broken off", 1, "the whole file")


@pytest.mark.parametrize("tag", [b"", b"\xff\xfe", b"a\nX-Evil: 1", b'"1"\r\n'])
def test_a_damaged_note_of_the_version_is_no_version(tag, server, tmp_path):
    server.answers = [reply(200, OLD)]
    (tmp_path / "a.bin.part").write_bytes(NEW[:HALF])
    (tmp_path / "a.bin.etag").write_bytes(tag)
    assert fetch.download(server.url, tmp_path / "a.bin").read_bytes() == OLD
    assert server.asked == [None]


def test_a_damaged_ledger_is_one_line(server, tmp_path):
    server.answers = [reply(200, OLD)]
    (tmp_path / fetch.CHECKSUMS).write_text("[]")
    with pytest.raises(UserError, match=fetch.CHECKSUMS):
        fetch.download(server.url, tmp_path / "a.bin")


# ---------------------------------------------------------------- archives


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as file:
        for member, content in members:
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


HARM: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {
    "a path that leads out": [(member("a/../../evil"), b"x")],
    "a link that leads out": [(member("link", tarfile.SYMTYPE, "../.."), b"")],
    "a file through a link": [(member("link", tarfile.SYMTYPE, "/tmp"), b""), (member("link/evil"), b"x")],
    "a hard link": [(member("a"), b"x"), (member("b", tarfile.LNKTYPE, "/etc/passwd"), b"")],
    "a device": [(member("null", tarfile.CHRTYPE), b"")],
    "a block device": [(member("disk", tarfile.BLKTYPE), b"")],
    "a pipe": [(member("pipe", tarfile.FIFOTYPE), b"")],
}


@pytest.mark.parametrize("what", HARM)
def test_an_archive_that_would_write_elsewhere(what, tmp_path, tried):
    archive = tar_of(tmp_path / "a.tar.gz", HARM[what])
    with pytest.raises(UserError, match="unsafe"):
        fetch.unpack(archive, tmp_path / "deep/out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar.gz", "deep"]
    tried("fetched", "archives: paths and links that lead out, devices", 1, "nothing written, one line")


def test_an_absolute_path_in_a_tar_begins_in_the_folder(tmp_path):
    fetch.unpack(tar_of(tmp_path / "a.tar.gz", [(member("/deep/a"), b"x")]), tmp_path / "out")
    assert there(tmp_path) == ["a.tar.gz", "out/deep/a"]


def test_what_an_archive_says_of_rights_is_not_obeyed(tmp_path):
    made = member("a")
    made.mode = 0o6777
    fetch.unpack(tar_of(tmp_path / "a.tar.gz", [(made, b"x")]), tmp_path / "out")
    assert not (tmp_path / "out/a").stat().st_mode & 0o6022


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PAX header", "long name"])
def test_a_header_of_gigabytes(kind, tmp_path, tried):
    """tarfile reads it into memory before anybody can look at it."""
    import gzip

    made = member("a", tarfile.XHDTYPE if kind == "PAX header" else tarfile.GNUTYPE_LONGNAME)
    made.size = 2 << 30
    with gzip.open(tmp_path / "a.tar.gz", "wb", 1) as file:
        file.write(made.tobuf(tarfile.GNU_FORMAT))
        for _ in range(2 << 6):
            file.write(bytes(1 << 24))
    said, size = grown(lambda path: fetch.unpack(path, tmp_path / "out"), tmp_path / "a.tar.gz")
    assert said and size < 2 << 30
    tried("fetched", "archives: bombs in content, in headers", 1, "below 2 GB, one line")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_bomb_by_its_ratio(kind, tmp_path, monkeypatch, tried):
    monkeypatch.setattr(fetch, "MIN_CONTENT_BYTES", 1000)
    content = bytes(5_000_000)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a", content)
    else:
        tar_of(tmp_path / "a", [(member("a"), content)])
    with pytest.raises(UserError, match=r"unsafe.*5,000,000"):
        fetch.unpack(tmp_path / "a", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    tried("fetched", "archives: bombs in content, in headers", 1, "below 2 GB, one line")


# ---------------------------------------------------------------- interrupted, and given again


def packed(root: Path, top: str) -> bytes:
    """Pictures of FLO: they go into a folder of their own."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        for number in range(9):
            fake_data.picture(root / "picture.jpg", number, 0)
            file.add(root / "picture.jpg", f"{top}/image_{number}.jpg")
    return content.getvalue()


@pytest.fixture
def recipe(server, tmp_path, monkeypatch) -> Path:
    """Where FLO is to be, with one archive of nine pictures and a small file."""
    body = packed(tmp_path, "jpg")
    server.answers = [reply(200, body)]
    steps = (
        recipes.Archive(server.url, "images", take="jpg", into="images"),
        recipes.Names(),
    )
    monkeypatch.setitem(recipes.RECIPES, "FLO", recipes.Recipe((102, 0, 0, 0), steps))
    monkeypatch.setattr(recipes.Names, "fetch", lambda self, folder, _: (folder / self.gives).write_text("x"))
    return tmp_path / "data"


def there(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_an_archive_half_moved_is_moved_to_its_end(recipe, monkeypatch, tried):
    """The folder that a step gives is there from the first picture on, and says nothing of the others."""
    recipes.prepare("FLO", recipe, "official")
    whole = there(recipe / "FLO")
    assert len(whole) == 10
    stopped, real = 0, fetch.os.replace
    for at in range(1, 40):
        root, seen = recipe.parent / f"again{at}", 0

        def replace(source: Any, target: Any, root: Path = root, at: int = at) -> None:
            nonlocal seen
            seen += str(target).startswith(str(root))
            if seen == at:
                raise KeyboardInterrupt
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(fetch.os, "replace", replace)
            try:
                recipes.prepare("FLO", root, "official")
            except KeyboardInterrupt:
                stopped += 1
            else:
                break
        recipes.prepare("FLO", root, "official")
        assert there(root / "FLO") == whole
        assert {path.suffix for path in (root / ".downloads").iterdir()} <= {".bin", ".json", ".lock", ""}
    assert stopped >= 10
    tried("fetched", "preparing a data set, interrupted at each move", stopped, "the same files")


def test_what_is_left_of_a_killed_extraction_goes(recipe):
    left = recipe / ".downloads/.FLO.open.abcdefgh/jpg"
    left.mkdir(parents=True)
    (left / "half.jpg").write_bytes(b"x")
    recipes.prepare("FLO", recipe, "official")
    assert not left.parent.exists()


def test_data_sets_are_prepared_by_one_process_at_a_time(recipe, tried):
    (recipe / ".downloads").mkdir(parents=True)
    code = "another process is preparing data sets"
    with lock(recipe / ".downloads/.lock"), pytest.raises(UserError, match=code):
        recipes.prepare("FLO", recipe, "official")
    recipes.prepare("FLO", recipe, "official")
    tried("fetched", "two preparing into one folder", 1, "refused, one line")


def _prepare(url: str, root: str) -> None:
    steps = (recipes.Archive(url, "images", take="jpg", into="images"),)
    recipes.RECIPES["FLO"] = recipes.Recipe((102, 0, 0, 0), steps)
    recipes.prepare("FLO", Path(root), "official")


@pytest.mark.slow
def test_preparing_killed_at_any_operation(server, tmp_path, tried):
    server.answers = [reply(200, packed(tmp_path, "jpg"), ETag='"1"')]
    kills = 0
    for at in range(1, 200):
        root = tmp_path / f"data{at}"
        if killing.attempt(_prepare, server.url, str(root), folder=root, fault="operation", at=at):
            break
        kills += 1
        assert killing.attempt(_prepare, server.url, str(root), folder=root)
        assert len(there(root / "FLO")) == 9
        assert not [path for path in (root / ".downloads").iterdir() if path.is_dir()]
    assert kills > 20
    tried("fetched", "preparing a data set, killed at each file operation", kills, "the same files")
