"""Download files with resume and verification, and extract archives safely."""

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

BLOCK_BYTES = 1 << 20
MIN_CONTENT_BYTES = 1 << 30  # that any archive may expand to, in addition to 100 times its size
CHECKSUMS = "sha256.json"  # checksums of first downloads, for files whose authors publish none


def download(url: str, path: Path, checksum: str = "") -> Path:
    """Download a file and verify it. An interrupted download resumes from PATH.part.

    Args:
        url: address of the file.
        path: file to write.
        checksum: "md5:..." or "sha256:...". Without one, the sha256 of the first download is written to
            sha256.json beside `path`, and later downloads of the same address must match it.

    Returns:
        path.

    Raises:
        UserError: the server does not respond, or sends a web page, an incomplete or another file, or no
            length, without which an incomplete file cannot be detected.
    """
    if path.exists():
        verify(path, url, checksum)
        return path
    part, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers={"User-Agent": "dfzsl"})
    if part.exists() and tag.exists() and _tag(tag):
        # If the file has changed since, the server sends all of it.
        request.add_header("Range", f"bytes={part.stat().st_size}-")
        request.add_header("If-Range", _tag(tag))
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.headers.get_content_type() == "text/html":
                raise UserError(
                    f"{url} sent a web page, not the file; download it in a browser and save it as {path}"
                )
            resumed = response.status == 206
            offset = part.stat().st_size if resumed and part.exists() else 0
            length = response.headers["Content-Length"]
            etag = response.headers["ETag"] or ""
            start, total = _range(response.headers)
            if total is None and length:
                total = offset + int(length)
            if resumed:
                if start != offset or (offset and etag not in ("", _tag(tag))):
                    _delete_partial(part, tag)
                    raise UserError(
                        f"{url} resumed at another position or with another file; run the command again to "
                        "restart the download"
                    )
            elif not (length or checksum or getattr(response, "chunked", False)):
                raise UserError(
                    f"{url} sends no file length, so an incomplete download cannot be detected; download the "
                    f"file in a browser and save it as {path}"
                )
            else:
                _delete_partial(part, tag)  # first: an old part must never have a new tag
                if etag.isprintable() and etag.isascii():
                    tag.write_text(etag, encoding="utf-8")
            with (
                open(part, "ab" if resumed else "wb") as file,
                tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while block := response.read(BLOCK_BYTES):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        # 416: the file is complete and only its verification is missing.
        if error.code != 416:
            raise UserError(
                f"{url} responds {error.code} {error.reason}; see docs/DATASETS.md for mirrors"
            ) from None
        total = part.stat().st_size
        if _range(error.headers)[1] not in (total, None if checksum else total):
            _delete_partial(part, tag)
            raise UserError(f"{url} has changed; run the command again to restart the download") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{url}: {getattr(error, 'reason', error)}; run the command again to resume"
        ) from None
    if total is not None and part.stat().st_size != total:
        raise UserError(
            f"{url} stopped after {part.stat().st_size} of {total} bytes; run the command again to resume"
        )
    try:
        verify(part, url, checksum, path.parent / CHECKSUMS)
    finally:
        tag.unlink(missing_ok=True)
    os.replace(part, path)
    return path


def _tag(path: Path) -> str:
    """Read the ETag of a partial download; "" if it is unreadable."""
    content = path.read_bytes()
    return content.decode() if content.isascii() and content.decode().isprintable() else ""


def _delete_partial(part: Path, tag: Path) -> None:
    part.unlink(missing_ok=True)
    tag.unlink(missing_ok=True)


def _range(headers: Message) -> tuple[int | None, int | None]:
    """Parse a Content-Range: (first byte, length of the whole file), None for missing values."""
    match = re.fullmatch(
        r"bytes (?:(\d{1,15})-\d{1,15}|\*)/(?:(\d{1,15})|\*)", headers["Content-Range"] or ""
    )
    start, whole = match.groups() if match else (None, None)
    return None if start is None else int(start), None if whole is None else int(whole)


def verify(path: Path, url: str, checksum: str, checksums: Path | None = None) -> None:
    """Compare a file with its checksum, and delete it if they differ.

    Args:
        path: the file.
        url: its address.
        checksum: "md5:..." or "sha256:..."; "" to use `checksums`.
        checksums: JSON file of sha256 by address; by default sha256.json beside the file. An address that
            it does not have is added.

    Raises:
        UserError: the checksums differ.
    """
    kind, _, expected = (checksum or "sha256:").partition(":")
    actual = digest(path, kind)
    checksums = checksums or path.parent / CHECKSUMS
    known = read_json(checksums) if checksums.exists() else {}
    if not isinstance(known, dict):
        raise UserError(f"{checksums}: not a file of checksums; delete it to trust the next download")
    expected = expected or known.get(url, actual)
    if actual != expected:
        path.unlink()
        raise UserError(
            f"{url}: the {kind} of the download is {actual}, not {expected}; the file was deleted, run the "
            f"command again{'' if checksum else f' (delete {checksums} to accept a new version)'}"
        )
    if not checksum and url not in known:
        write_json(checksums, {**known, url: expected})


def unpack(archive: Path, place: Path) -> None:
    """Extract a zip or tar archive, completely or not at all.

    Args:
        archive: the archive.
        place: folder to extract into; its previous content is deleted.

    Raises:
        UserError: the archive is broken, expands to more than 100 times its size or more than the disk has
            room for, or has a link, a device or a path outside of `place`.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
        try:
            if zipfile.is_zipfile(archive):
                _unzip(archive, Path(temporary))
            else:
                _untar(archive, Path(temporary))
        except tarfile.FilterError as error:
            raise UserError(f"{archive}: unsafe, not extracted ({error})") from None
        except UserError:
            raise
        # zipfile, tarfile and the decompressors raise many types for a broken archive.
        except Exception as error:
            message = f"{archive}: broken or incomplete ({error}); delete it and run the command again"
            raise UserError(message) from None
        shutil.rmtree(place, ignore_errors=True)
        move_into(Path(temporary), place)


def _unzip(archive: Path, place: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        names = file.infolist()
        for name in names:
            path = PurePosixPath(name.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in str(path.parts[:1]):
                raise UserError(
                    f"{archive}: unsafe, not extracted ('{name.filename}' leads out of the folder)"
                )
        _check_size(sum(name.file_size for name in names), archive, place)
        for name in tqdm(names, unit="file", desc=f"unpack {archive.name}"):
            file.extract(name, place)


def _untar(archive: Path, place: Path) -> None:
    size = 0
    with open_tar(archive) as members:
        for file, member in tqdm(members, unit="file", desc=f"unpack {archive.name}"):
            if not (member.isfile() or member.isdir()):
                raise UserError(f"{archive}: unsafe, not extracted ('{member.name}' is a link or a device)")
            size += member.size
            _check_size(size, archive, place)
            # The filter "data" refuses "..", and makes absolute paths relative.
            file.extract(member, place, filter="data")


def _check_size(size: int, archive: Path, place: Path) -> None:
    """Raise UserError if the content is implausibly large for the archive or too large for the disk."""
    check_expansion(archive, size, floor=MIN_CONTENT_BYTES)
    free = shutil.disk_usage(place).free
    if size > free:
        raise UserError(
            f"{archive}: needs {size / 1e9:.1f} GB, but {place.parent} has only {free / 1e9:.1f} GB free"
        )


def move_into(source: Path, target: Path) -> None:
    """Move the content of a folder into `target`, merging folders and replacing files."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        place = target / entry.name
        if entry.is_dir() and not entry.is_symlink() and place.is_dir():
            move_into(entry, place)
        else:
            os.replace(entry, place)


def listing(repository: str) -> dict[str, tuple[str, str]]:
    """Return {file name: (address, "sha256:...")} of a Hugging Face model repository."""
    url = f"https://huggingface.co/api/models/{repository}/tree/main"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            entries = json.load(response)
        return {
            entry["path"]: (
                f"https://huggingface.co/{repository}/resolve/main/{entry['path']}",
                f"sha256:{entry['lfs']['oid']}",
            )
            for entry in entries
            if "lfs" in entry
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{url}: {error}; the mirror cannot be reached") from None
