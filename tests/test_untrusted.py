"""Test readers of untrusted files: sizes are checked before reading, and child processes are limited."""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dfzsl.io.untrusted.archives import check_zip, npz_names, open_tar, read_npz_array
from dfzsl.io.untrusted.memory_limited import read_arrays
from dfzsl.utils.errors import UserError


def test_an_npz_is_read_in_this_machines_byte_order(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=">f8").reshape(2, 3),
        "b": np.array(["ant", "bee"]),
        "c": np.empty((0, 3)),
    }
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    assert npz_names(tmp_path / "x.npz") == list(arrays)
    for name, array in arrays.items():
        read = read_npz_array(tmp_path / "x.npz", name)
        assert read.dtype.isnative and read.shape == array.shape and (read == array).all()


def test_a_small_zip_of_much_content_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(10**6))
    check_zip(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"a\.npz.*8,000,128 bytes"):
        check_zip(tmp_path / "a.npz", floor=1000)


def test_members_that_lie_in_one_place_count_each(tmp_path):
    """Otherwise each of them would be as large as the archive allows."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", bytes(1 << 20))
        for number in range(9):
            file.infolist().append(file.infolist()[0])
            file.NameToInfo[str(number)] = file.infolist()[0]
    (tmp_path / "a.zip").write_bytes(content.getvalue())
    with pytest.raises(UserError, match=f"{10 << 20:,} bytes"):
        check_zip(tmp_path / "a.zip", floor=2 << 20)


def test_an_archive_behind_other_bytes_is_refused(tmp_path):
    """Python's reader corrects the places of its members, and torch's does not."""
    np.savez(tmp_path / "x.npz", x=np.zeros(9))
    (tmp_path / "y.npz").write_bytes(b"PK\3\4" + (tmp_path / "x.npz").read_bytes())
    with pytest.raises(UserError, match="bytes before the archive"):
        check_zip(tmp_path / "y.npz")


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], kind: str = "") -> Path:
    with tarfile.open(path, f"w:{kind}", format=tarfile.PAX_FORMAT) as file:
        for member, content in members:
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
def test_a_tar_of_any_compression(kind, tmp_path):
    names = ["a", "b" * 200, "deep/ä犬"]
    contents = [os.urandom(100_000), b"", b"x"]
    members = [(tarfile.TarInfo(name), content) for name, content in zip(names, contents, strict=True)]
    found = []
    with open_tar(tar_of(tmp_path / "a.tar", members, kind)) as opened:
        for archive, member in opened:
            archive.extract(member, tmp_path / "out", filter="data")
            found.append(member.name)
    assert found == names
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == contents


def header(kind: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Members whose header is of two megabytes."""
    long, member = bytes(2 << 20), tarfile.TarInfo("a")
    if kind == "PAX records":
        member.type = tarfile.XHDTYPE
    elif kind == "a long name":
        member.type = tarfile.GNUTYPE_LONGNAME
    else:  # a list of the parts of a sparse file, before its content
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a"}
        long = b"1000000\n" + b"1\n" * (1 << 20)
    return [(member, long)]


@pytest.mark.parametrize("kind", ["PAX records", "a long name", "a sparse map"])
@pytest.mark.parametrize("first", [True, False])
def test_a_tar_with_a_large_header_is_refused(kind, first, tmp_path):
    before = [] if first else [(tarfile.TarInfo("small"), b"x")]
    path = tar_of(tmp_path / "a.tar", [*before, *header(kind)])
    with pytest.raises(tarfile.ReadError, match="header is too large"), open_tar(path) as members:
        list(members)


# Functions that a child process calls.


def read(path: str) -> dict[str, np.ndarray]:
    return {"size": np.array(os.path.getsize(path)), "process": np.array(os.getpid())}


def refuse(path: str) -> dict[str, np.ndarray]:
    raise UserError(f"{path}: no\nsuch thing")


def fail(path: str) -> dict[str, np.ndarray]:
    raise KeyError("a")


def grow(path: str) -> dict[str, np.ndarray]:
    return {"x": np.ones(1 << 28)}


def die(path: str) -> dict[str, np.ndarray]:
    os.abort()


def test_a_child_process_reads_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 7)
    arrays = read_arrays("test_untrusted:read", tmp_path / "a")
    assert arrays["size"] == 7 and arrays["process"] != os.getpid()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (refuse, "a: no such thing"),
        (fail, "a: .*KeyError: 'a'"),
        (die, "a: .*exit code -6"),
        pytest.param(
            grow,
            "a: .*far more data",
            marks=pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux limits memory"),
        ),
    ],
)
def test_what_goes_wrong_in_a_child_process_is_one_line(function, message, tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match=message) as error:
        read_arrays(f"test_untrusted:{function.__name__}", tmp_path / "a")
    assert re.fullmatch(".+", str(error.value))
