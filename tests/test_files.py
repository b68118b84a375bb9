from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfzsl.io.files import atomic, read_json, write_json
from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import UserError, unknown_name


def test_atomic_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_json_round_trip_and_refusals(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, "ü"]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, "ü"]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()
    (tmp_path / "broken.json").write_text('{"x": ')
    for name in ("broken.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            read_json(tmp_path / name)


def test_tensors_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    save_tensors(tmp_path / "t", tensors, {"kind": "thing", "names": ["x", "y"]})
    loaded, about = load_tensors(tmp_path / "t", "thing")
    assert about["names"] == ["x", "y"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_same_content_is_the_same_bytes(tmp_path):
    tensors = {name: torch.ones(3) for name in "abcdefgh"}
    about = {"kind": "thing", **{name: name for name in "pqrstuv"}, "größe": "ünï"}
    files = [tmp_path / str(i) for i in range(4)]
    for path in files:
        save_tensors(path, tensors, about)
    assert len({path.read_bytes() for path in files}) == 1
    assert load_tensors(files[0], "thing")[1] == about


def test_tensors_of_another_kind_or_not_finite_are_refused(tmp_path):
    save_tensors(tmp_path / "t", {"a": torch.tensor([1.0, float("inf")])}, {"kind": "thing"})
    with pytest.raises(UserError, match=r"teacher.*thing"):
        load_tensors(tmp_path / "t", "teacher")
    with pytest.raises(UserError, match=r"'a'.*not finite"):
        load_tensors(tmp_path / "t", "thing")
    with pytest.raises(UserError, match=r"none.*no such"):
        load_tensors(tmp_path / "none", "thing")


@given(st.binary(max_size=200))
def test_no_bytes_get_past_the_loader(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("junk") / "f"
    path.write_bytes(junk)
    with pytest.raises(UserError):
        load_tensors(path, "thing")


def test_a_header_that_lies_about_its_size_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="/f: "):
        load_tensors(tmp_path / "f", "thing")


def test_unknown_lists_the_nearest_first():
    message = str(unknown_name("trainer", "cocop", ["ZeroshotCLIP", "CoOp", "CoCoOp"]))
    assert message.startswith("unknown trainer 'cocop'; known: CoCoOp, CoOp")
    assert "ZeroshotCLIP" in message
