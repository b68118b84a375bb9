"""Test small files that take forever, crash the process or read its memory, each in a separate process."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dassl.utils import load_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from dfzsl import train
from dfzsl.datasets.base import read_fewshot, read_split
from dfzsl.io.untrusted.yaml_reader import read_yaml
from dfzsl.trainers.clip.loading import _read_state
from dfzsl.utils.errors import UserError, describe_user_error


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


DOUBLED = b"K\x00" + b"q\x00h\x00\x86" * 60  # a tuple of one tuple twice, sixty times: 2^60 leaves
PICKLES = {
    "tuples in tuples as a key": b"}" + DOUBLED + b"K\x00s",
    "tuples in tuples, doubled on the stack": b"}K\x00" + b"2\x86" * 25 + b"K\x00s",
    "tuples in tuples in a list": b"}" + text("train") + b"]" + DOUBLED + b"as",
    "tuples 300,000 deep as a key": b"}K\x00" + b"\x85" * 300_000 + b"K\x00s",
    "lists 300,000 deep": b"]" * 300_000 + b"a" * 299_999,
    "a number of 300,000 digits": b"}I" + b"9" * 300_000 + b"\nK\x00s",
}


def archive_of(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"a/{name}", content)
    return path


def setup(path: Path) -> Any:
    return train.setup_cfg(train.parser().parse_args(["--config-file", str(path)]))


def bombs(folder: Path) -> dict[str, tuple[Path, Callable]]:
    found: dict[str, tuple[Path, Callable]] = {}
    for number, (name, operations) in enumerate(PICKLES.items()):
        data = b"\x80\x02" + operations + b"."
        (folder / f"{number}.pkl").write_bytes(data)
        path = archive_of(folder / f"{number}.pth", data)
        found[f"few shots, {name}"] = folder / f"{number}.pkl", read_fewshot
        found[f"weights, {name}"] = path, _read_state
        found[f"checkpoint, {name}"] = path, lambda path: load_checkpoint(str(path))
    configs = {
        "a sexagesimal number of 600 kB": "SEED: 1" + ":59" * 200_000,
        "a sexagesimal number of 200 kB": "SEED: 1" + ":59" * 66_000,
        "a sexagesimal fraction": "SEED: 1" + ":59" * 66_000 + ".5",
        "a number of 200,000 digits": "SEED: " + "9" * 200_000,
        "200,000 hexadecimal digits": "SEED: 0x" + "f" * 200_000,
        "brackets": "SEED: " + "[" * 200_000,
        "braces": "SEED: " + "{a: " * 60_000,
        "minus signs, which yacs evaluates": "SEED: '" + "-" * 200_000 + "1'",
        "ten megabytes": "SEED: 1\n" * 1_300_000,
    }
    for number, (name, content) in enumerate(configs.items()):
        (folder / f"{number}.yaml").write_text(content)
        found[f"config, {name}"] = folder / f"{number}.yaml", setup
    return found


def apart(load: Callable, path: Path) -> str:
    """What a process of its own says of the file."""

    def work(pipe: Any) -> None:
        try:
            load(path)
        except Exception as error:
            pipe.send(describe_user_error(error) or f"DEFECT {error!r}")
        else:
            pipe.send("read")

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=work, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(60) else "no answer"
    except EOFError:
        return "the process died"
    finally:
        process.kill()
        process.join()


def test_bombs(tmp_path, tried):
    cases = bombs(tmp_path)
    for name, (path, load) in cases.items():
        said = apart(load, path)
        assert said.startswith((str(path), "cannot load")) and "\n" not in said, (name, said[:300])
    tried("hostile files", "pickles and numbers that take for ever", len(cases), "one line")


def lying_script(path: Path, count: int) -> Path:
    """A TorchScript archive of a layer whose weight says that it has `count` x 4 numbers; it has 16."""
    torch.jit.script(torch.nn.Linear(4, 4, bias=False)).save(str(path))
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            if name.endswith("/data.pkl"):
                changed = content.replace(b"K\x10tQ", b"J" + struct.pack("<i", 4 * count) + b"tQ")
                changed = changed.replace(b"(K\x04K\x04t", b"(J" + struct.pack("<i", count) + b"K\x04t")
                assert len(changed) == len(content) + 6
                content = changed
            archive.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [5, 10**6, 10**8])
def test_weights_that_would_read_memory(count, tmp_path, tried):
    """torch.jit.load takes them, and the network's weights are what lay behind sixteen numbers."""
    said = apart(_read_state, lying_script(tmp_path / "w.pt", count))
    assert f"its storage 0 has 64 bytes, not the {16 * count} it claims" in said
    tried("hostile files", "TorchScript weights longer than what is stored", 3, "one line")


@pytest.mark.filterwarnings("ignore")
def test_a_script_of_much_code_is_refused(tmp_path, tried):
    """torch reads and parses all of it."""
    torch.jit.script(torch.nn.Linear(4, 4)).save(str(tmp_path / "w.pt"))
    with zipfile.ZipFile(tmp_path / "w.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/code/more.py", b" " * (20 << 20))
    with pytest.raises(UserError, match=r"w\.pt.*expands to"):
        _read_state(tmp_path / "w.pt")
    tried("hostile files", "TorchScript weights with compressed code without end", 1, "one line")


@pytest.mark.filterwarnings("ignore")
def test_honest_scripts_are_read(tmp_path):
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
            self.register_buffer("context_length", torch.tensor(77))
            self.sizes, self.shares, self.names = [1, 2], [0.5], {"a": 1}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x) + torch.tensor([1.0, 2.0, 3.0])

    model = Both().half()
    torch.jit.script(model).save(str(tmp_path / "w.pt"))
    state = _read_state(tmp_path / "w.pt")
    assert state.keys() == model.state_dict().keys()
    torch.jit.trace(Both().eval(), torch.ones(4, 2)).save(str(tmp_path / "t.pt"))
    assert state.keys() == _read_state(tmp_path / "t.pt").keys()


@pytest.mark.parametrize("name", [b"os\nsystem", b"numpy\nndarray", b"dassl.config.defaults\nDatum"])
def test_few_shot_files_hold_datums_alone(name, tmp_path):
    (tmp_path / "s.pkl").write_bytes(b"\x80\x02c" + name + b"\n)\x81.")
    with pytest.raises(UserError, match=r"s\.pkl.*it asks for"):
        read_fewshot(tmp_path / "s.pkl")


@pytest.mark.parametrize("label", [1.0, True, "1", None, [1], (1,)])
def test_a_label_is_a_whole_number(label, tmp_path):
    from dassl.data.datasets import Datum

    (tmp_path / "a.jpg").touch()
    item = Datum(str(tmp_path / "a.jpg"), 1, 0, "bee")
    item._label = label
    (tmp_path / "s.pkl").write_bytes(pickle.dumps({"train": [item], "val": []}))
    with pytest.raises(UserError, match=r"s\.pkl"):
        read_fewshot(tmp_path / "s.pkl")
    rows = [["a.jpg", label, "bee"]]
    (tmp_path / "s.json").write_text(json.dumps({"train": rows, "val": rows, "test": rows}))
    with pytest.raises(UserError, match=r"s\.json.*'train'"):
        read_split(tmp_path / "s.json", str(tmp_path), "get it")


def test_few_shots_of_every_protocol(tmp_path):
    from dassl.data.datasets import Datum

    (tmp_path / "a.jpg").touch()
    items = [Datum(str(tmp_path / "a.jpg"), label, 0, "bee") for label in range(1000)]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "s.pkl").write_bytes(pickle.dumps({"train": items, "val": items[:3]}, protocol))
        train_items, val_items = read_fewshot(tmp_path / "s.pkl")
        assert train_items == [(items[0].impath, label) for label in range(1000)]
        assert val_items == train_items[:3]


@pytest.mark.parametrize(
    "content, said",
    [
        ("A: !!python/name:os.mkdir []", "the tag !!python/name:os.mkdir;"),
        ("A:\n  B: !!binary aaaa", r"the tag !!binary; .* \(line 2\)"),
        ("A: 2001-01-01", "the tag !!timestamp;"),
        ("A: !!int x", "invalid literal"),
        ("A: !!bool x", "'x'"),
        ("a: b: c", "mapping values are not allowed here"),
        ("A: &a 1\nB: *a", r"an alias \(\*name\); write the value out \(line 2\)"),
        ("<<: {A: 1}", "the tag !!merge;"),
        ("? [1]\n: 2", "found unhashable key"),
        ("A: 1\n---\nA: 2", "found another document"),
    ],
)
def test_yaml_is_plain(content, said, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"c\.yaml.*{said}"):
        read_yaml(tmp_path / "c.yaml")


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.floats(allow_nan=False),
        st.text(max_size=50),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


class Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


@given(VALUES)
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_yaml_as_written(tmp_path_factory, value):
    """Whatever PyYAML writes of plain values is read as it was."""
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(yaml.dump(value, Dumper=Plain), encoding="utf-8")
    assert read_yaml(path) == value
