"""Test hostile files: damaged, with false sizes, huge, or with code.

None may execute code, use unlimited memory, or give an error of more than one line.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_data
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, needs_proc
from dassl.utils import load_checkpoint, read_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from readers import (
    EDITS,
    KINDS,
    RUN,
    attempt,
    build,
    damaged,
    grown,
    results,
    tables_of,
)
from safetensors.torch import save_file
from scipy.io import loadmat, savemat

from dfzsl import report, train
from dfzsl.datasets import encoding
from dfzsl.datasets.base import read_fewshot, read_split, relocate
from dfzsl.io.class_names import check_class_names
from dfzsl.io.files import read_json
from dfzsl.io.tensors import save_tensors
from dfzsl.prepare import fetch
from dfzsl.trainers.clip.loading import _read_state
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.trainers.recovery.virtual_classes import VirtualClasses
from dfzsl.utils.errors import UserError, unknown_name

FEW, MANY = 10, 1500  # examples of each kind by default, and with -m slow
MOST = 1 << 31  # bytes that any small file may cost


# ---------------------------------------------------------------- fuzzing


@st.composite
def damage(draw: Any) -> list[tuple]:
    """Some edits of a file: (kind, place in 0..1, size, bytes)."""
    edit = st.tuples(
        st.sampled_from(EDITS),
        st.floats(0, 1),
        st.integers(1, 64),
        st.binary(min_size=1, max_size=16),
    )
    return draw(st.lists(edit, min_size=1, max_size=4))


def tries(examples: int, strategy: Any, work: Callable[[Any], object]) -> int:
    """How many examples of `strategy` hypothesis gave to `work`: about `examples`."""
    seen = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        nonlocal seen
        work(example)
        seen += 1

    with torch.random.fork_rng():
        run()
    return seen


def amounts(few: int) -> pytest.MarkDecorator:
    """Parametrises `examples`: a few by default, many with -m slow."""
    return pytest.mark.parametrize("examples", [few, pytest.param(MANY, marks=pytest.mark.slow)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@amounts(FEW)
def test_damaged_files(kind, examples, tmp_path, tried):
    path, load = KINDS[kind](tmp_path)
    whole = path.read_bytes()
    assert attempt(load, path) is None

    def read(edits: list[tuple]) -> None:
        path.write_bytes(damaged(whole, edits))
        attempt(load, path)

    with np.errstate(all="ignore"):
        count = tries(examples, damage(), read)
    tried("hostile files", f"{kind}, damaged at random", count, "read, or one line")


# ---------------------------------------------------------------- files that are well formed and wrong

ODD = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([0, 1, -1, 2, 10**20, 0.0, -0.5, 1e300, 1e-300]),
        st.sampled_from(
            ["", "a", "ant", "\x1b[31m", "a\nb", "../../up", "/etc/passwd", "{}", "{0.x}", "ä犬", "\u202e"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["a", "class", "{}"]), inner, max_size=2)
    ),
    max_leaves=6,
)
TYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int8", "bool", "complex64", "float8_e4m3fn")


@st.composite
def odd_tensors(draw: Any) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    fill = draw(st.sampled_from([0.0, 1.0, -1.0, 1e30, 1e-30, float("nan"), float("inf")]))
    kind = getattr(torch, draw(st.sampled_from(TYPES)))
    return torch.full(shape, fill if kind.is_floating_point or kind.is_complex else int(fill == 1.0)).to(kind)


ARRAYS = ("labeled features .npz", "features to measure .npz", "features .npz")
ARRAYS += ("head of another toolbox .npz",)


@st.composite
def odd_arrays(draw: Any) -> np.ndarray:
    kind = draw(st.sampled_from(["f2", "f4", ">f8", "i8", "u1", "?", "c8", "U3", "S3", "M8[s]", "O"]))
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    fill = draw(st.sampled_from([0, 1, 2, 300]))
    return np.full(shape, fill).astype(kind)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ARRAYS)
@amounts(3 * FEW)
def test_wrong_arrays(kind, examples, tmp_path, tried):
    path, load = KINDS[kind](tmp_path)
    arrays = dict(np.load(path))

    def read(data: Any) -> None:
        np.savez(path, **replaced(data.draw, arrays, odd_arrays(), "template"))
        attempt(load, path)

    count = tries(examples, st.data(), read)
    tried("hostile files", f"{kind}, wrong contents", count, "read, or one line")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items()}
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


def replaced(draw: Any, given: dict[str, Any], odd: Any, extra: str) -> dict[str, Any]:
    """`given` with some of its values odd, gone, or with one more."""
    made = dict(given)
    for name in draw(st.lists(st.sampled_from([*given, extra]), max_size=2)):
        made[name] = draw(odd)
        if draw(st.integers(0, 5)) == 0:
            del made[name]
    return made


WELL_FORMED = ("teacher.safetensors", "virtual.safetensors", "classifier.safetensors", "feature cache")
WELL_FORMED += ("features .safetensors", "geometry.safetensors", "head of another toolbox .safetensors")
WELL_FORMED += ("dfzsl show", "labeled features .safetensors", "features to measure .safetensors")


@pytest.mark.parametrize("kind", WELL_FORMED)
@amounts(3 * FEW)
def test_wrong_contents(kind, examples, tmp_path, tried):
    path, load = KINDS[kind](tmp_path)
    tensors, about = read_tensors(path)

    def read(data: Any) -> None:
        made = replaced(data.draw, tensors, odd_tensors(), "network.output_layer.bias")
        words = replaced(data.draw, about, ODD, "template")
        save_file(made, path, {name: json.dumps(value) for name, value in words.items()})
        attempt(load, path)

    count = tries(examples, st.data(), read)
    tried("hostile files", f"{kind}, wrong contents", count, "read, or one line")


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in JSON or YAML, at any depth."""
    pairs = list(
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    )
    return [(node, key) for key, _ in pairs] + [deep for _, value in pairs for deep in places(value)]


WORDS = ("split_zhou .json", "results.json", "config YAML", "sentences .json", "class names .json")
WORDS += ("class names .config.json", "a server's reply", "a client's question", "sha256.json")
WORDS += ("the mirror's listing",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WORDS)
@amounts(3 * FEW)
def test_wrong_words(kind, examples, tmp_path, tried):
    path, load = KINDS[kind](tmp_path)
    parse, write = (yaml.safe_load, yaml.safe_dump) if kind == "config YAML" else (json.loads, json.dumps)
    whole = parse(path.read_text())

    def read(data: Any) -> None:
        made = copy.deepcopy(whole)
        node, key = data.draw(st.sampled_from(places(made)))
        node[key] = data.draw(ODD)
        path.write_text(write(made))
        attempt(load, path)

    count = tries(examples, st.data(), read)
    tried("hostile files", f"{kind}, wrong contents", count, "read, or one line")


# ---------------------------------------------------------------- made to run code


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


def objects(bomb: Bomb) -> np.ndarray:
    array = np.empty(15, object)
    array[:] = [bomb] * 15
    return array


def npz_with(folder: Path, **arrays: Any) -> Path:
    path = fake_data.make("Features", folder)
    np.savez(path, allow_pickle=True, **{**np.load(path), **arrays})
    return path


def pickles(bomb: Bomb, folder: Path) -> dict[str, tuple[Path, Callable]]:
    """Every way in which a pickle could come in."""
    state = {"state_dict": {"ctx": torch.ones(2)}, "epoch": 1, "optimizer": bomb, "scheduler": None}
    torch.save(state, folder / "new.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "plain.pth").write_bytes(pickle.dumps(bomb))
    (folder / "shots.pkl").write_bytes(pickle.dumps({"train": [bomb], "val": []}))
    (folder / "shots2.pkl").write_bytes(pickle.dumps({"train": [], "val": []}) + pickle.dumps(bomb))
    (folder / "plain.npz").write_bytes(pickle.dumps(bomb))
    found: dict[str, tuple[Path, Callable]] = {}
    for name in ("new.pth", "old.pth", "plain.pth"):
        found[f"checkpoint {name}"] = folder / name, lambda path: load_checkpoint(str(path))
        found[f"weights {name}"] = folder / name, _read_state
    for name in ("shots.pkl", "plain.pth"):
        found[f"few shots {name}"] = folder / name, read_fewshot
    for name in ("classnames", "y_test", "x_test", "new", "template"):
        (folder / name).mkdir()
        found[f"npz {name}"] = (
            npz_with(folder / name, **{name: objects(bomb)}),
            lambda path: build("Features", path),
        )
    found["a pickle called npz"] = folder / "plain.npz", lambda path: build("Features", path)
    return found


def test_pickles_run_nothing(tmp_path, tried):
    bomb = Bomb(tmp_path / "exploded")
    cases = pickles(bomb, tmp_path)
    for name, (path, load) in cases.items():
        assert attempt(load, path), name
        assert not bomb.place.exists(), name
    tried("hostile files", "pickles that run code", len(cases), "nothing ran, one line")


def test_a_pickle_cannot_double_what_it_holds(tmp_path):
    """Bytes may be made from text, but by no encoding whose result is longer, forty times over."""

    class Doubled:
        def __init__(self, times: int) -> None:
            self.times = times

        def __reduce__(self) -> tuple:
            import _codecs

            return _codecs.encode, (Doubled(self.times - 1) if self.times else b"a", "hex")

    (tmp_path / "c.pth").write_bytes(pickle.dumps(Doubled(40), protocol=2))
    said = attempt(lambda path: load_checkpoint(str(path)), tmp_path / "c.pth")
    assert said and "encoding hex" in said


class Runs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.rows, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.rows = state[0] + 1
        self.training = state[1]


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_that_runs_when_loaded_is_refused(tmp_path):
    torch.jit.script(Runs()).save(str(tmp_path / "w.pt"))
    with pytest.raises(UserError, match=r"w\.pt.*code"):
        _read_state(tmp_path / "w.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "plain.pt"))
    assert set(_read_state(tmp_path / "plain.pt")) == {"weight", "bias"}
    with pytest.raises(pickle.UnpicklingError, match="TorchScript"):
        load_checkpoint(str(tmp_path / "w.pt"))


def test_a_config_is_never_python(tmp_path, tried):
    (tmp_path / "c.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\ncfg = dict()\n")
    tags = ["!!python/object/apply:os.mkdir", "!!python/name:os.mkdir", "!!python/object/new:os.mkdir"]
    for number, tag in enumerate(tags):
        (tmp_path / f"{number}.yaml").write_text(f"SEED: {tag} [{tmp_path / 'exploded'}]\n")
    for path in tmp_path.iterdir():
        assert attempt(
            lambda path: train.setup_cfg(train.parser().parse_args(["--config-file", str(path)])), path
        )
    assert not (tmp_path / "exploded").exists()
    tried("hostile files", "configs that run code", 1 + len(tags), "nothing ran, one line")


def test_a_picture_is_handed_to_no_program(tmp_path, monkeypatch):
    """Pillow reads PostScript by running Ghostscript, whatever the file is called."""
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *args, **_: pytest.fail(f"ran {args[1]}"))
    monkeypatch.setattr("subprocess.check_call", lambda *args, **_: pytest.fail(f"ran {args}"))
    assert "not a readable image" in str(attempt(encoding.read_image, tmp_path / "a.jpg"))
    with pytest.raises(OSError, match="Cannot read the image"):
        read_image(str(tmp_path / "a.jpg"))


# ---------------------------------------------------------------- names

EVIL_NAMES = [
    "\x1b]0;title\x07",
    "\x1b[2J",
    "two\nlines",
    "a\rb",
    "\u202egpj.exe",
    "\x00",
    "\x9b31m",
    "a\u2028b",
    "\udc80",
]


def entrances(name: str, folder: Path) -> dict[str, Callable[[], object]]:
    """Ways in which a class name comes in."""
    names = ["ant", name, "cat"]
    found: dict[str, Callable[[], object]] = {"list": lambda: check_class_names(names, "x")}
    if name.isascii() or "\udc80" not in name:
        about: dict[str, Any] = {"classnames": names, "backbone": "", "normalized": True}
        save_tensors(folder / "t", {"weight": torch.ones(3, 2)}, {"kind": "teacher", **about})
        words = {
            "kind": "virtual",
            "classnames": names,
            "queries": 0,
            "method": "m",
            "level": "l",
            "backbone": "",
        }
        rows = torch.eye(3, 4)
        save_tensors(folder / "v", {"mu": rows, "kappa": torch.ones(3), "weight": rows.clone()}, words)
        found |= {
            "teacher": lambda: Teacher.load(folder / "t"),
            "virtual": lambda: VirtualClasses.load(folder / "v"),
        }
    if "\x00" not in name:
        for label, each in enumerate(names):
            (folder / "own" / each).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (4, 4), (label, 0, 0)).save(folder / "own" / each / f"{number}.png")
        found["folder"] = lambda: build("Folder", folder / "own")
    rows_of = [[f"{label}.jpg", label, each] for label, each in enumerate(names)]
    (folder / "s.json").write_text(json.dumps({"train": rows_of, "val": [], "test": rows_of}))
    from dfzsl.datasets.base import check_split

    found["split_zhou"] = lambda: check_split(read_split(str(folder / "s.json"), str(folder), ""), "x")
    return found


@pytest.mark.parametrize("name", EVIL_NAMES, ids=ascii)
def test_names_that_steer_terminals_are_refused(name, tmp_path, tried):
    cases = entrances(name, tmp_path)
    for where, load in cases.items():
        with pytest.raises(UserError, match="unprintable") as error:
            load()
        assert str(error.value).isprintable(), where
    tried(
        "hostile files",
        "class names with control characters",
        len(cases),
        "refused, one line",
    )


def test_messages_are_one_printable_line_of_bounded_length():
    for name in EVIL_NAMES:
        assert str(UserError(f"a{name}b")).isprintable()
    assert len(str(UserError("x" * 10**6))) < 3000
    assert len(str(unknown_name("class", "x", [f"class {number}" for number in range(10**4)]))) < 3000


EVIL_TEXTS = [
    "<script>alert(1)</script>",
    "=cmd|' |C'!A0",
    "@SUM(1)",
    "+1",
    "-1",
    "a|b",
    r"\input{x}",
    "a&b",
    "x' y\"",
]


def test_tables_and_page_show_hostile_text_as_text(tmp_path, tried):
    pytest.importorskip("matplotlib")
    from dfzsl.report.page import page

    results(tmp_path)
    whole = json.loads((tmp_path / "base2new" / RUN / "results.json").read_text())
    for number, text in enumerate([*EVIL_TEXTS, "\x1b[31mred\x07", "two\nlines"]):
        folder = text.replace("/", "∕")
        made = {**whole, "notes": [text] if text.isprintable() else []}
        if text.isprintable():
            made |= {"backbone": text, "versions": {text: text}}
            made["per_class"] = [{**row, "class": text} for row in whole["per_class"]]
        for part in ("train_base", "test_new"):
            run = tmp_path / "base2new" / part / folder / "shots_16" / f"M{number}{folder}" / folder / "seed1"
            run.mkdir(parents=True)
            (run / "results.json").write_text(json.dumps(made))
        (run.parent / "seed2").mkdir()
        failed = tmp_path / "base2new/train_base" / folder / "shots_16" / folder / folder / "seed3"
        failed.mkdir(parents=True)
        (failed / "failed.txt").write_bytes(text.encode() + b"\xff")
    shown = tables_of(tmp_path)
    for name, text in shown.items():
        assert not set(text) & {"\x1b", "\x07", "\r"}, name
    html = page([part for part in report.sections(report.collect(tmp_path)) if part.title.startswith("<")])
    assert "<script" not in html and "\x1b" not in html
    assert "&lt;script&gt;" in html
    for line in csv.reader(io.StringIO(shown["csv"])):
        assert not any(cell.startswith(("=", "+", "@")) or re.match(r"-\D", cell) for cell in line)
    for line in shown["latex"].splitlines():
        assert line.startswith("%") or r"\input" not in line
    assert "<script" not in "".join(re.findall(r"^\|.*", shown["markdown"], re.M))
    tried(
        "hostile files",
        "HTML, formulas, LaTeX and escapes in names of runs",
        len(EVIL_TEXTS) + 2,
        "shown as text",
    )


# ---------------------------------------------------------------- paths


def path_cases(folder: Path) -> dict[str, tuple[Path, Callable]]:
    """Files that name a picture outside of their folder, which is there and readable."""
    secret = folder / "secret"
    fake_data.picture(secret / "1.jpg", 0, 0)
    rows = [["../secret/1.jpg", 0, "a"], ["b/1.jpg", 1, "b"]]
    found: dict[str, tuple[Path, Callable]] = {}
    for number, up in enumerate(
        ["../secret/1.jpg", str(secret / "1.jpg"), "x/../../secret/1.jpg", "x\\..\\..\\s.jpg"]
    ):
        path = folder / f"{number}.json"
        rows[0][0] = up
        path.write_text(json.dumps({"train": rows, "val": [], "test": rows}))
        found[f"split {up}"] = path, lambda path: read_split(str(path), str(folder / "images"), "")
    root = fake_data.make("Folder", folder / "f")
    (root / "classnames.txt").write_text("../../../secret up\ncat cat\n")
    found["classnames.txt"] = root, lambda path: build("Folder", path)
    fake_data.make("FGVCAircraft", folder / "g")
    listed = folder / "g/fgvc_aircraft/images_variant_test.txt"
    listed.write_text("../../../secret/1 707-320\n" + listed.read_text())
    found["images_variant"] = folder / "g", lambda path: build("FGVCAircraft", path)
    fake_data.make("AWA2", folder / "h")
    data = loadmat(folder / "h/AWA2/res101.mat")
    data["image_files"][-1, 0] = np.array(["/x/data/JPEGImages/../../../secret/1.jpg"])
    savemat(
        folder / "h/AWA2/res101.mat", {name: data[name] for name in ("image_files", "labels", "features")}
    )
    found["image_files"] = folder / "h", lambda path: build("AWA2", path)
    return found


def test_no_file_leads_to_pictures_elsewhere(tmp_path, tried):
    cases = path_cases(tmp_path)
    for name, (path, load) in cases.items():
        assert "outside of" in str(attempt(load, path)), name
    tried("hostile files", "paths that lead out of the data set", len(cases), "refused, one line")


def test_a_few_shot_path_of_a_million_parts_costs_no_time():
    """Quadratic work would take hours here."""
    with pytest.raises(UserError, match=r"shots\.pkl"):
        relocate([("a/" * 10**6 + "b.jpg", 0)], [], "shots.pkl")


def members(kind: str) -> list[tarfile.TarInfo]:
    made = tarfile.TarInfo("link")
    made.type = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE}.get(
        kind, {"device": tarfile.CHRTYPE, "block device": tarfile.BLKTYPE}.get(kind, tarfile.FIFOTYPE)
    )
    made.linkname = "inside" if "link" in kind else ""
    return [made]


@pytest.mark.parametrize("kind", ["symlink", "hard link", "device", "block device", "fifo"])
def test_a_tar_holds_files_and_folders_only(kind, tmp_path, tried):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        inside = tarfile.TarInfo("inside")
        inside.size = 1
        file.addfile(inside, io.BytesIO(b"x"))
        for member in members(kind):
            file.addfile(member)
    said = attempt(lambda path: fetch.unpack(path, tmp_path / "out"), tmp_path / "a.tar")
    assert said and "is a link or a device" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]
    tried("hostile files", "links and devices in a tar", 1, "nothing written, one line")


def test_a_link_in_a_zip_is_a_file_that_names_its_target(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    fetch.unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out/link").is_symlink() and (tmp_path / "out/link").read_text() == "/etc/passwd"


# ---------------------------------------------------------------- small files that grow


def npy(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def zeros(count: int) -> bytes:
    """`count` MiB of zeros, deflated, without making them."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
    second = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
    return first + second * (count - 1) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def zip_of(path: Path, name: str, head: bytes, megabytes: int) -> Path:
    """An archive with one member, `head` and zeros, that says it is `megabytes` long."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = pack.compress(head) + pack.flush(zlib.Z_FULL_FLUSH) + zeros(megabytes)
    size = min(len(head) + (megabytes << 20), 0xFFFFFFFE)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(content), size, len(name), 0)
    central = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(content), size, len(name), 0, 0, 0, 0, 0, 0
    )
    start = len(local) + len(name) + len(content)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central) + len(name), start, 0)
    path.write_bytes(local + name.encode() + content + central + name.encode() + end)
    return path


def mat_of(content: bytes, order: str = "<") -> bytes:
    mark = {"<": b"\x00\x01IM", ">": b"\x01\x00MI"}[order]
    return b"MATLAB 5.0 MAT-file".ljust(124) + mark + content


def matrix(kind: int, shape: tuple[int, ...], name: bytes, body: bytes) -> bytes:
    dims = struct.pack(f"<{len(shape)}i", *shape)
    parts = (
        struct.pack("<4I", 6, 8, kind, 0)
        + struct.pack("<2I", 5, len(dims))
        + dims.ljust(-(-len(dims) // 8) * 8)
    )
    parts += struct.pack("<2I", 1, len(name)) + name.ljust(-(-len(name) // 8) * 8, b"\0") + body
    return struct.pack("<2I", 14, len(parts)) + parts


def claims(folder: Path) -> dict[str, tuple[Path, Callable]]:
    """Small files that claim gigabytes."""
    found: dict[str, tuple[Path, Callable]] = {}

    def case(name: str, content: bytes, load: Callable) -> None:
        (folder / name).write_bytes(content)
        found[name] = folder / name, load

    features = lambda path: build("Features", path)  # noqa: E731
    for name, shape in {
        "10 GB.npz": (2_500_000, 1000),
        "10 EB.npz": (1 << 40, 1 << 20),
        "negative.npz": (-1, 9),
    }.items():
        whole = fake_data.make("Features", folder / name.replace(".", "_"))
        with zipfile.ZipFile(folder / name, "w") as file:
            for other, array in np.load(whole).items():
                buffer = io.BytesIO()
                np.save(buffer, array)
                file.writestr(f"{other}.npy", npy(shape) if other == "x_test" else buffer.getvalue())
        found[name] = folder / name, features
    case("header.safetensors", struct.pack("<Q", 1 << 60) + b"{}", features)
    header = json.dumps(
        {"x_test": {"dtype": "F32", "shape": [1 << 20, 1 << 12], "data_offsets": [0, 1 << 34]}}
    ).encode()
    case("offsets.safetensors", struct.pack("<Q", len(header)) + header, features)
    case("deep.json", b"[" * 10**6, read_json)
    case("digits.json", b"9" * 10**6, read_json)
    setup = lambda path: train.setup_cfg(train.parser().parse_args(["--config-file", str(path)]))  # noqa: E731
    laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    case("laughs.yaml", b"a0: &a0 lol\n" + laughs.encode(), setup)
    case("deep.yaml", b"SEED: " + b"[" * 20000, setup)
    root = fake_data.make("AWA2", folder / "mat")
    splits = root / "AWA2/att_splits.mat"
    (root / "AWA2/clip_splits.mat").unlink()
    text = matrix(4, (1, 2**31 - 1), b"allclasses_names", b"")
    bombs = {"text": text, "numbers": matrix(6, (2**31 - 1, 2**31 - 1), b"att", b"")}
    bombs |= {
        "cells": matrix(1, (2**31 - 1, 1), b"allclasses_names", b""),
        "breaks off": struct.pack("<2I", 14, 2**32 - 1),
    }
    bombs["a text in a cell"] = matrix(1, (1, 1), b"allclasses_names", matrix(4, (1, 2**31 - 1), b"", b""))
    bombs["cells in cells"] = b""
    for _ in range(3000):
        bombs["cells in cells"] = matrix(1, (1, 1), b"allclasses_names", bombs["cells in cells"])

    def with_splits(content: bytes) -> Callable:
        def load(path: Path) -> None:
            splits.write_bytes(content)
            build("AWA2", root)

        return load

    for name, content in bombs.items():
        found[f"{name}.mat"] = splits, with_splits(mat_of(content))
    png = io.BytesIO()
    Image.new("1", (1, 1)).save(png, "PNG")
    wide = png.getvalue()[:16] + struct.pack(">2I", 60000, 60000) + png.getvalue()[24:29]
    case(
        "60000.png",
        wide + struct.pack(">I", zlib.crc32(wide[12:29])) + png.getvalue()[33:],
        encoding.read_image,
    )
    save_tensors(
        folder / "wide.safetensors",
        {
            "mu": torch.eye(1, 10**6),
            "kappa": torch.ones(1),
            "weight": torch.eye(1, 10**6),
            "network.x": torch.ones(1),
        },
        {"kind": "virtual", "classnames": ["a"], "queries": 0, "method": "m", "level": "l", "backbone": ""},
    )
    found["an MLP for a million dimensions"] = folder / "wide.safetensors", VirtualClasses.load
    zip_of(folder / "4 GB.zip", "a", b"", 4)
    claimed = bytearray((folder / "4 GB.zip").read_bytes())
    place = claimed.index(b"PK\1\2")
    claimed[place + 24 : place + 28] = struct.pack("<I", 0xFFFFFFF0)
    case("4 GB.zip", bytes(claimed), lambda path: fetch.unpack(path, folder / "out"))
    member = tarfile.TarInfo("a")
    member.size = 1 << 42
    case("4 TB.tar", member.tobuf(), lambda path: fetch.unpack(path, folder / "out"))
    return found


@needs_proc
@pytest.mark.filterwarnings("ignore")
def test_small_files_that_claim_to_be_huge(tmp_path, tried):
    cases = claims(tmp_path)
    for name, (path, load) in cases.items():
        said, size = grown(load, path)
        assert said and size < 1 << 28, (name, said, size)
    assert not (tmp_path / "out").exists()
    tried("hostile files", "small files that claim to be huge", len(cases), "below 256 MB, one line")


@needs_proc
def test_small_files_that_are_huge(tmp_path, tried):
    """Zeros, deflated to a thousandth: 4 GB in 4 MB."""
    found: dict[str, tuple[Path, Callable]] = {}
    whole = zip_of(tmp_path / "bomb.npz", "classnames.npy", npy((1 << 30,)), 4095)
    found["npz"] = whole, lambda path: build("Features", path)
    root = fake_data.make("AWA2", tmp_path / "mat")
    head = matrix(6, (1, 1 << 29), b"att", struct.pack("<2I", 9, 0xFFFFFFF0))
    head = head[:4] + struct.pack("<I", 0xFFFFFFFF) + head[8:]
    pack = zlib.compressobj(9)
    packed = pack.compress(head) + pack.flush(zlib.Z_FULL_FLUSH) + zeros(4095)
    bomb = mat_of(struct.pack("<2I", 15, len(packed)) + packed)
    (root / "AWA2/clip_splits.mat").write_bytes(bomb)
    found["mat"] = root, lambda path: build("AWA2", path)
    state = zip_of(tmp_path / "bomb.pth", "archive/data/0", b"", 4095)
    found["checkpoint"] = state, lambda path: load_checkpoint(str(path))
    found["weights"] = state, _read_state
    found["zip"] = state, lambda path: fetch.unpack(path, tmp_path / "out")
    for name, (path, load) in found.items():
        said, size = grown(load, path)
        assert said and size < MOST, (name, said, size)
    tried("hostile files", "bombs of 4 GB in 4 MB", len(found), "below 2 GB, one line")


# ---------------------------------------------------------------- the command line


def ends(capfd: Any, work: Callable[[], object]) -> str:
    """What a command prints on stderr that ends with code 2."""
    with pytest.raises(SystemExit) as stopped:
        train.run_program(work)
    assert stopped.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), lines
    return lines[0]


def test_the_command_ends_with_code_2(tmp_path, capfd, tried):
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x1b[2J\x00\xffjunk" * 9)
    for suffix in (".npz", ".safetensors", ".yaml", ".csv"):
        (tmp_path / f"j{suffix}").write_bytes(junk.read_bytes())
    whole = fake_data.make("Features", tmp_path / "whole")
    base = ["--trainer", "TextTeacherMix", "--output-dir", str(tmp_path / "out"), "--seed", "1"]
    kinds = {
        kind: ["--dataset-config-file", str(ROOT / f"configs/datasets/{kind}.yaml")]
        for kind in ("features", "csv")
    }
    commands = [
        ["--config-file", str(tmp_path / "j.yaml")],
        [*kinds["features"], "--root", str(tmp_path / "j.npz")],
        [*kinds["features"], "--root", str(tmp_path / "j.safetensors")],
        [*kinds["csv"], "--root", str(tmp_path / "j.csv"), "--backbone", "shapes"],
        [*kinds["features"], "--root", str(whole), "TEACHER.FILE", str(junk)],
        [
            *kinds["features"],
            "--root",
            str(whole),
            "--backbone",
            "shapes",
            "MODEL.BACKBONE.WEIGHTS",
            str(junk),
        ],
    ]
    for words in commands:
        ends(capfd, lambda words=words: train.main([*base, *words]))  # type: ignore[misc]
    tried("hostile files", "given to train.py", len(commands), "one line, exit code 2")
