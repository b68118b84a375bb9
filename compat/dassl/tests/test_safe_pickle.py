"""Checkpoints made to crash, hang or fill the memory. Those that once did are read in a process apart."""

import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from dassl.utils import load_checkpoint, save_checkpoint, torchtools
from dassl.utils.rng import get_random_state, set_random_state
from torch import nn

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="a process's memory and time are bounded by POSIX")

BESIDE = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}  # the package beside, installed or not
CHILD = """
import pickle, resource, sys
from pathlib import Path
from dassl.utils import load_checkpoint
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sys.argv[1:]:
    try:
        said = "read " + repr(load_checkpoint(path))
    except pickle.UnpicklingError as error:
        said = str(error)
    print(said[:500].replace("\\n", " "), flush=True)
"""


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def archive_of(path: Path, data: bytes, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **more}.items():
            archive.writestr(f"a/{name}", content)
    return path


OBJECT = b"cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87R"
# A record of one field, an object, whose flags say that it holds none.
RECORD = (
    OBJECT.replace(b"O8", b"V8") + b"(K\x03" + text("|") + b"N" + text("a") + b"\x85}" + text("a") + OBJECT
)
RECORD += b"K\x00\x86sK\x08K\x01K\x00tb"
ADDRESS = b"c_codecs\nencode\n" + text("A" * 8) + text("latin1") + b"\x86R"
MANY = b"".join(b"M" + struct.pack("<H", n) + b"K\x01" for n in range(20_000))  # keys and values
PROGRAMS = {
    "an object made of bytes": b"cnumpy.core.multiarray\nscalar\n" + OBJECT + ADDRESS + b"\x86R",
    "an object made of bytes, in a record": b"cnumpy.core.multiarray\nscalar\n" + RECORD + ADDRESS + b"\x86R",
    "a tuple of tuples of tuples as a key": b"}K\x00" + b"q\x00h\x00\x86" * 60 + b"K\x00s",
    "the same, doubled on the stack": b"}K\x00" + b"2\x86" * 60 + b"K\x00s",
    "the same, in a set": b"cbuiltins\nset\n]K\x00" + b"q\x00h\x00\x86" * 60 + b"a\x85R",
    "the same, as a value": b"}K\x00" + text("state_dict") + b"K\x00" + b"q\x00h\x00\x86" * 60 + b"s" * 2,
    "tuples hundreds of thousands deep as a key": b"}K\x00" + b"\x85" * 300_000 + b"K\x00s",
    "tuples hundreds of thousands deep": b"K\x00" + b"\x85" * 300_000,
    "lists hundreds of thousands deep": b"]" * 300_000 + b"a" * 299_999,
    "a list that holds itself": b"]q\x00h\x00a",
    "a memo of four billion places": b"]r\xff\xff\xff\xff",
    "a text of four billion letters": b"X\xff\xff\xff\xff",
    "a number of many digits": b"I" + b"9" * 300_000 + b"\n",
    "a long number as a key": b"}\x8a\xff" + b"\x7f" * 255 + b"K\x00s",
    "one state for thirty thousand objects": b"](}q\x00("
    + MANY
    + b"uctorch.optim.sgd\nSGD\nq\x01"
    + b"h\x01)\x81h\x00b" * 30_000
    + b"e",
    "one dictionary counted thirty thousand times": b"](}q\x00("
    + MANY
    + b"uccollections\nCounter\nq\x01"
    + b"h\x01h\x00\x85R" * 30_000
    + b"e",
    "a long text for thirty thousand values": text("x" * 30_000) + b"q\x000](" + b"h\x00" * 30_000 + b"e",
}
HARMLESS = ("a memo of four billion places", "one dictionary counted thirty thousand times")


@POSIX
def test_bombs(tmp_path):
    paths = [
        str(archive_of(tmp_path / str(n), b"\x80\x02" + data + b"."))
        for n, data in enumerate(PROGRAMS.values())
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, check=False, env=BESIDE
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths), f"{list(PROGRAMS)[len(lines)]}: {done.returncode} {done.stderr[-500:]}"
    for name, said in zip(PROGRAMS, lines, strict=True):
        assert said.startswith("read" if name in HARMLESS else "cannot load"), (name, said)


def with_tensor(storage: int, offset: bytes, size: bytes, stride: bytes) -> bytes:
    pid = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"J"
    pid += struct.pack("<i", storage) + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + offset + size + stride + b"\x89}tR."


ONE, FOUR, HUGE = b"K\x01\x85", b"K\x04\x85", b"\x8a\x07" + b"\x7f" * 7 + b"\x85"
LIES = {
    "a storage longer than its part": (100, b"K\x00", FOUR, ONE),
    "a storage of a negative length": (-4, b"K\x00", FOUR, ONE),
    "an offset beyond it": (4, b"K\x01", FOUR, ONE),
    "a negative offset": (4, b"J\xff\xff\xff\xff", ONE, ONE),
    "a stride beyond it": (4, b"K\x00", FOUR, b"K\x02\x85"),
    "a negative stride": (4, b"K\x03", FOUR, b"J\xff\xff\xff\xff\x85"),
    "a size beyond it": (4, b"K\x00", HUGE, ONE),
    "one number a billion times over": (4, b"K\x00", HUGE, b"K\x00\x85"),
    "sizes that overflow": (4, b"K\x00", b"(" + HUGE[:-1] * 3 + b"t", b"(" + HUGE[:-1] * 3 + b"t"),
    "a number for a size": (4, b"K\x00", b"K\x04", b"K\x01"),
    "fewer strides than sizes": (4, b"K\x00", b"K\x02K\x02\x86", ONE),
    "a list for a size": (4, b"K\x00", b"](K\x04e", b"](K\x01e"),
}


@pytest.mark.parametrize("name", LIES)
def test_tensors_that_lie(name, tmp_path):
    good = archive_of(tmp_path / "good", with_tensor(4, b"K\x00", FOUR, ONE), **{"data/0": bytes(16)})
    assert load_checkpoint(str(good)).shape == (4,)
    bad = archive_of(tmp_path / "bad", with_tensor(*LIES[name]), **{"data/0": bytes(16)})
    with pytest.raises(pickle.UnpicklingError, match="cannot load"):
        load_checkpoint(str(bad))


def test_views_keep_their_storage(tmp_path):
    """As torch.load has it: tensors that shared memory still do, also if they lie across it."""
    whole = torch.arange(12.0).view(3, 4)
    content = {
        "whole": whole,
        "column": whole[:, 1],
        "turned": whole.T,
        "none": whole[:0],
        "one": torch.tensor(3),
    }
    for legacy in (False, True):
        torch.save(content, tmp_path / "c", _use_new_zipfile_serialization=not legacy)
        loaded, expected = load_checkpoint(str(tmp_path / "c")), torch.load(tmp_path / "c", weights_only=True)
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor) and loaded[name].stride() == tensor.stride(), name
            assert loaded[name].dtype == tensor.dtype
        loaded["whole"].zero_()
        assert loaded["column"].sum() == 0 and loaded["turned"].sum() == 0


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_number(legacy, tmp_path):
    kinds = [dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)]
    names = ("float", "int", "complex", "bool", "uint8", "bfloat16", "half", "double")
    plain = {
        str(d): d for d in kinds if str(d).removeprefix("torch.").startswith(names) and "float8" not in str(d)
    }
    read = set()
    for name, dtype in plain.items():
        try:
            content = torch.arange(3).to(dtype)
            torch.save(content, tmp_path / "c", _use_new_zipfile_serialization=not legacy)
        except (RuntimeError, NotImplementedError, KeyError):
            continue
        try:
            loaded = load_checkpoint(str(tmp_path / "c"))
        except pickle.UnpicklingError as error:
            assert "which no such file needs" in str(error), name
            continue
        assert loaded.dtype == dtype and torch.equal(loaded, content)
        read.add(name)
    assert {
        f"torch.{n}" for n in ("float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool")
    } <= read


def test_modules_versions_survive(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    torch.save(model.state_dict(), tmp_path / "c")
    loaded = load_checkpoint(str(tmp_path / "c"))
    assert type(loaded) is OrderedDict and loaded._metadata == model.state_dict()._metadata
    model.load_state_dict(loaded)


@pytest.mark.parametrize("value", [1.5, -3, 200, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_of_numpy_become_pythons(value, protocol, tmp_path):
    for kind in ("f2", "f4", "f8", "i2", "i8", "u1", "?"):
        number = np.array(value).astype(kind)[()]
        torch.save({"val_result": number}, tmp_path / "c", pickle_protocol=protocol)
        loaded = load_checkpoint(str(tmp_path / "c"))["val_result"]
        assert loaded == number and type(loaded) in (bool, int, float), kind
    for bad in (np.array(value).astype(">f8")[()], np.array([value]), np.datetime64(1, "s"), np.str_("a")):
        torch.save(bad, tmp_path / "c", pickle_protocol=protocol)
        if isinstance(bad, np.float64):
            assert load_checkpoint(str(tmp_path / "c")) == bad  # numpy itself turns a scalar around
            continue
        with pytest.raises(pickle.UnpicklingError):
            load_checkpoint(str(tmp_path / "c"))


def test_damage_is_seen(tmp_path):
    """A bit of a weight, which torch.load takes as it comes."""
    weights = torch.randn(100)
    torch.save({"w": weights}, tmp_path / "c")
    whole = bytearray((tmp_path / "c").read_bytes())
    whole[whole.index(weights.numpy().tobytes()) + 7] ^= 1
    (tmp_path / "c").write_bytes(whole)
    with pytest.raises(pickle.UnpicklingError, match="c/data/0"):
        load_checkpoint(str(tmp_path / "c"))


def test_parts_in_one_place(tmp_path):
    """A thousand entries of one member, which cost forty bytes each and a megabyte when they are read."""
    path = archive_of(tmp_path / "c", b"\x80\x02N.", **{"data/0": bytes(10**5)})
    data = path.read_bytes()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = data[start:end]
    last = entries[entries.rindex(b"PK\1\2") :]
    more = b"".join(last.replace(b"data/0", f"data/{n}".encode()) for n in range(1, 10))
    tail = bytearray(data[end:])
    struct.pack_into("<2HL", tail, 8, 12, 12, len(entries) + len(more))
    path.write_bytes(data[:end] + more + tail)
    with pytest.raises(pickle.UnpicklingError, match="longer"):
        load_checkpoint(str(path))


@pytest.mark.parametrize(
    "change",
    [{"epoch": (1,)}, {"epoch": None}, {"state_dict": []}, {"state_dict": {1: torch.ones(2)}}],
)
def test_checkpoints_of_odd_contents(change, tmp_path):
    save_checkpoint({"state_dict": {}, "epoch": 1}, str(tmp_path))
    torch.save({"state_dict": {}, "epoch": 1, **change}, tmp_path / "model.pth.tar-1")
    with pytest.raises(ValueError, match=r"model\.pth\.tar-1"):
        torchtools.resume_training(str(tmp_path), nn.Linear(1, 1))


@pytest.mark.parametrize("place", [700, -5, 10**8])
def test_random_states_lead_nowhere(place):
    """numpy itself takes any place in its 624 words, and reads memory there."""
    state = get_random_state()
    set_random_state(state)
    before = np.random.get_state(legacy=True)[2]
    state["numpy"][2] = place
    with pytest.raises(ValueError, match="numpy"):
        set_random_state(state)
    assert np.random.get_state(legacy=True)[2] == before
    assert random.random() != random.random()


@POSIX
def test_random_programs():
    """The fuzzer for a moment; alone it runs as long as one likes."""
    script = Path(__file__).with_name("fuzz_pickle.py")
    words = [sys.executable, str(script), "--most", "150", "--seconds", "120"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=BESIDE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "150 programs" in done.stdout
