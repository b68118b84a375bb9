"""Downloads that can be interrupted and are verified, archives that cannot write where they like."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from email.message import Message
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from dfzsl.io.files import digest, read_json, write_json
from dfzsl.io.untrusted.archives import check_expansion, open_tar
from dfzsl.utils.errors import UserError

BLOCK = 1 << 20
SLACK = 1 << 30  # bytes that any archive may grow to, beside what its own size allows
LEDGER = "sha256.json"  # what was downloaded from where, for files whose authors publish no checksum


def download(url: str, path: Path, checksum: str = "") -> Path:
    """Fetch `url` into `path`, going on from `path`.part if an earlier run was interrupted.

    checksum: "md5:..." or "sha256:...". Without one, the sha256 of the first download is written to
    sha256.json beside `path`, and a later download of the same address must agree with it.

    Raises UserError if the address does not answer, sends a web page, too little or another file, or does not
    say how long the file is: an end that is none could not be told.
    """
    if path.exists():
        verify(path, url, checksum)
        return path
    part, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers={"User-Agent": "dfzsl"})
    if part.exists() and tag.exists() and _tag(tag):
        # If the file has changed since, the server then sends all of it.
        request.add_header("Range", f"bytes={part.stat().st_size}-")
        request.add_header("If-Range", _tag(tag))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise UserError(
                    f"{url} sent a web page, not the file: fetch it in a browser and save it as {path}"
                )
            goes_on = answer.status == 206
            done = part.stat().st_size if goes_on and part.exists() else 0
            length = answer.headers["Content-Length"]
            now = answer.headers["ETag"] or ""
            start, total = _range(answer.headers)
            if total is None and length:
                total = done + int(length)
            if goes_on:
                if start != done or (done and now not in ("", _tag(tag))):
                    _forget(part, tag)
                    raise UserError(
                        f"{url} goes on at another place or with another file than it began; give the "
                        "command again to fetch it anew"
                    )
            elif not (length or checksum or getattr(answer, "chunked", False)):
                raise UserError(
                    f"{url} does not say how long the file is, and its end could not be told from a broken "
                    f"line: fetch it in a browser and save it as {path}"
                )
            else:
                _forget(part, tag)  # first: an old half must never stand beside a new name
                if now.isprintable() and now.isascii():
                    tag.write_text(now, encoding="utf-8")
            with (
                open(part, "ab" if goes_on else "wb") as file,
                tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while block := answer.read(BLOCK):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        # 416: all of it had arrived, and only the verification was missing.
        if error.code != 416:
            raise UserError(
                f"{url} answers {error.code} {error.reason}; see docs/DATASETS.md for mirrors"
            ) from None
        total = part.stat().st_size
        if _range(error.headers)[1] not in (total, None if checksum else total):
            _forget(part, tag)
            raise UserError(
                f"{url} is another file than before; give the command again to fetch it"
            ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{url}: {getattr(error, 'reason', error)}; give the command again to go on"
        ) from None
    if total is not None and part.stat().st_size != total:
        raise UserError(
            f"{url} broke off at {part.stat().st_size} of {total} bytes; give the command again to go on"
        )
    try:
        verify(part, url, checksum, path.parent / LEDGER)
    finally:
        tag.unlink(missing_ok=True)
    os.replace(part, path)
    return path


def _tag(path: Path) -> str:
    """What the server called the version of which the first half is there; "" where that is unreadable."""
    said = path.read_bytes()
    return said.decode() if said.isascii() and said.decode().isprintable() else ""


def _forget(part: Path, tag: Path) -> None:
    part.unlink(missing_ok=True)
    tag.unlink(missing_ok=True)


def _range(headers: Message) -> tuple[int | None, int | None]:
    """(first byte, length of the whole file) of a Content-Range; None for what it does not say."""
    found = re.fullmatch(
        r"bytes (?:(\d{1,15})-\d{1,15}|\*)/(?:(\d{1,15})|\*)", headers["Content-Range"] or ""
    )
    start, whole = found.groups() if found else (None, None)
    return None if start is None else int(start), None if whole is None else int(whole)


def verify(path: Path, url: str, checksum: str, ledger: Path | None = None) -> None:
    """Hold a file against its checksum, or against the ledger.

    Raises UserError, and removes the file, if it differs.
    """
    kind, _, expected = (checksum or "sha256:").partition(":")
    found = digest(path, kind)
    ledger = ledger or path.parent / LEDGER
    known = read_json(ledger) if ledger.exists() else {}
    if not isinstance(known, dict):
        raise UserError(f"{ledger}: not a list of checksums; delete it, and the next download is the measure")
    expected = expected or known.get(url, found)
    if found != expected:
        path.unlink()
        raise UserError(
            f"{url}: the {kind} of what arrived is {found}, not {expected}; it was deleted, "
            f"give the command again{'' if checksum else f' (delete {ledger} to accept a new version)'}"
        )
    if not checksum and url not in known:
        write_json(ledger, {**known, url: expected})


def unpack(archive: Path, place: Path) -> None:
    """Extract a zip or tar file into the folder `place`, which it replaces: all of it, or nothing.

    Raises UserError for a file that is broken, that grows to 100 times its size or more than the disk has
    room for, or that holds a path that leads out of `place`, a link or a device.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as inside:
        try:
            if zipfile.is_zipfile(archive):
                _unzip(archive, Path(inside))
            else:
                _untar(archive, Path(inside))
        except tarfile.FilterError as error:
            raise UserError(f"{archive}: unsafe, not extracted ({error})") from None
        except UserError:
            raise
        # zipfile, tarfile and what they decompress with have many words for a broken archive.
        except Exception as error:
            said = f"{archive}: broken or only half there ({error}); delete it and give the command again"
            raise UserError(said) from None
        shutil.rmtree(place, ignore_errors=True)
        move_into(Path(inside), place)


def _unzip(archive: Path, place: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        names = file.infolist()
        for name in names:
            path = PurePosixPath(name.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in str(path.parts[:1]):
                raise UserError(
                    f"{archive}: unsafe, not extracted ('{name.filename}' leads out of the folder)"
                )
        _room_for(sum(name.file_size for name in names), archive, place)
        for name in tqdm(names, unit="file", desc=f"unpack {archive.name}"):
            file.extract(name, place)


def _untar(archive: Path, place: Path) -> None:
    size = 0
    with open_tar(archive) as members:
        for file, member in tqdm(members, unit="file", desc=f"unpack {archive.name}"):
            if not (member.isfile() or member.isdir()):
                raise UserError(f"{archive}: unsafe, not extracted ('{member.name}' is a link or a device)")
            size += member.size
            _room_for(size, archive, place)
            # "data" refuses "..", and takes what is absolute for a path within.
            file.extract(member, place, filter="data")


def _room_for(size: int, archive: Path, place: Path) -> None:
    """Raise UserError for an archive with more content than it can honestly hold or the disk has room for."""
    check_expansion(archive, size, floor=SLACK)
    free = shutil.disk_usage(place).free
    if size > free:
        raise UserError(
            f"{archive}: needs {size / 1e9:.1f} GB, but {place.parent} has {free / 1e9:.1f} GB left"
        )


def move_into(source: Path, target: Path) -> None:
    """Move what is in the folder `source` into `target`, folder by folder; files there are replaced."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        place = target / entry.name
        if entry.is_dir() and not entry.is_symlink() and place.is_dir():
            move_into(entry, place)
        else:
            os.replace(entry, place)


def listing(repository: str) -> dict[str, tuple[str, str]]:
    """File name to (address, "sha256:...") of a Hugging Face model repository, as the hub publishes them."""
    url = f"https://huggingface.co/api/models/{repository}/tree/main"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            entries = json.load(answer)
        return {
            entry["path"]: (
                f"https://huggingface.co/{repository}/resolve/main/{entry['path']}",
                f"sha256:{entry['lfs']['oid']}",
            )
            for entry in entries
            if "lfs" in entry
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{url}: {error}; the mirror cannot be reached now") from None
