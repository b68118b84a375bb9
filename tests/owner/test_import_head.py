"""Test that imported classifiers decide like the originals."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import nn

from dfzsl.owner.import_head import import_teacher
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.recover import recover
from dfzsl.utils.errors import UserError

NAMES, DIM = ["ant", "bee", "cat"], 8


def features(n: int = 200) -> torch.Tensor:
    return F.normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(DIM, 3)


def kept(path: Path, state: dict) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: value.detach().contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "fc.", "head.", "classifier.", "module.fc.", "heads.head.", "probe."])
def test_a_linear_layer_of_any_toolbox(head, tmp_path, suffix, prefix):
    state = {prefix + key: value for key, value in head.state_dict().items()}
    teacher = import_teacher(kept(tmp_path / f"head{suffix}", state), classnames=NAMES, backbone="b (w)")
    torch.testing.assert_close(teacher.logits(features()), head(features()).detach())
    assert (teacher.classnames, teacher.backbone, teacher.normalized) == (NAMES, "b (w)", False)


def test_the_head_of_a_whole_model(head, tmp_path):
    state = {"body.weight": torch.randn(DIM, DIM), "body.bias": torch.randn(DIM)}
    state |= {f"fc.{key}": value for key, value in head.state_dict().items()}
    path = kept(tmp_path / "model.pt", {"state_dict": state, "epoch": 3})
    torch.testing.assert_close(
        import_teacher(path, classnames=NAMES).logits(features()), head(features()).detach()
    )
    state = {f"a.{key}": value for key, value in state.items()}
    path = kept(tmp_path / "other.pt", state)
    with pytest.raises(UserError, match=r"--weight.*a\.body\.weight"):
        import_teacher(path, classnames=NAMES)
    named = import_teacher(path, classnames=NAMES, weight="a.fc.weight")
    torch.testing.assert_close(named.logits(features()), head(features()).detach())
    shifted = import_teacher(path, classnames=NAMES, weight="a.fc.weight", bias="a.fc.bias")
    assert torch.equal(shifted.bias, named.bias)
    with pytest.raises(UserError, match=r"'a\.fc\.wieght'.*a\.fc\.weight"):
        import_teacher(path, classnames=NAMES, weight="a.fc.wieght")


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("suffix", [".npz", ".skops"])
def test_scikit_learns_classifiers_of_two_and_more_classes(tmp_path, classes, suffix):
    x = features()
    names = np.array(NAMES[:classes])
    y = names[torch.randn(DIM, classes, generator=torch.Generator().manual_seed(1)).T.matmul(x.T).argmax(0)]
    model = LogisticRegression().fit(x.double().numpy(), y)
    model.intercept_ += np.linspace(0, 1, len(model.intercept_))
    path = tmp_path / f"probe{suffix}"
    if suffix == ".npz":
        np.savez(path, coef_=model.coef_, intercept_=model.intercept_, classes_=model.classes_)
    else:
        pytest.importorskip("skops.io").dump(model, path)
    teacher = import_teacher(path)
    assert teacher.classnames == model.classes_.tolist()
    probabilities = torch.from_numpy(model.predict_proba(x.double().numpy())).float()
    torch.testing.assert_close(teacher.logits(x).softmax(1), probabilities)


def test_a_binary_cosine_head_and_one_without_intercept(tmp_path):
    row = torch.randn(DIM)
    path = kept(tmp_path / "one.pt", {"weight": row, "bias": torch.tensor(0.2)})
    teacher = import_teacher(path, classnames=["no", "yes"], normalized=True)
    score = F.cosine_similarity(features(), row[None]) + 0.2
    assert torch.equal(teacher.logits(features()).argmax(1) == 1, score > 0)
    assert (
        import_teacher(kept(tmp_path / "none.pt", {"weight": torch.randn(3, DIM)}), classnames=NAMES).bias
        is None
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_a_binary_head_of_any_float_type(tmp_path, dtype):
    path = kept(tmp_path / "one.safetensors", {"weight": torch.tensor([1.0, -2.0]).to(dtype)})
    weight = import_teacher(path, classnames=["no", "yes"]).weight
    torch.testing.assert_close(weight, torch.tensor([[-0.5, 1.0], [0.5, -1.0]]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_head_that_holds_no_floats(tmp_path, dtype):
    path = kept(tmp_path / "one.safetensors", {"weight": torch.ones(2, 3).to(dtype)})
    with pytest.raises(UserError, match=f"'weight'.*{dtype}"):
        import_teacher(path, classnames=["no", "yes"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "ant\nbee\n\ncat\n"),
        ("names.json", '["ant", "bee", "cat"]'),
        ("config.json", json.dumps({"id2label": {"1": "bee", "0": "ant", "2": "cat"}, "hidden_size": 8})),
        ("labels.json", '{"0": "ant", "2": "cat", "1": "bee"}'),
        ("names.csv", "id,name\n0,ant\n1,bee\n2,cat\n"),
        ("one.csv", "ant\nbee\ncat\n"),
    ],
)
def test_names_of_classes_from_files(head, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    path = kept(tmp_path / "head.pt", head.state_dict())
    assert import_teacher(path, classnames=tmp_path / name).classnames == NAMES


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("names.txt", "ant\nbee\n", r"head\.pt.*3 classes.*2 names"),
        ("names.txt", "ant\nbee\nant\n", r"names\.txt.*'ant'"),
        ("names.json", '{"0": "ant", "2": "bee"}', r"names\.json.*0, 1"),
        ("names.json", '{"ant": 0}', r"names\.json.*list"),
        ("names.json", "3", r"names\.json.*list"),
        ("names.csv", "id,animal\n0,ant\n", r"names\.csv.*column.*name"),
        ("names.csv", "id,name\n0\n", r"names\.csv.*column 2"),
        ("names.csv", "", r"names\.csv"),
    ],
)
def test_names_that_do_not_fit(head, tmp_path, name, content, fact):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=fact):
        import_teacher(kept(tmp_path / "head.pt", head.state_dict()), classnames=tmp_path / name)


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_files_that_are_no_classifier(head, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = head.state_dict()
    Path("trap.pt").write_bytes(pickle.dumps({"weight": Trap()}))
    Path("half.safetensors").write_bytes(kept(tmp_path / "t.safetensors", state).read_bytes()[:50])
    Path("broken.npz").write_bytes(b"PK\3\4 nothing")
    np.savez("objects.npz", coef_=np.array([Trap()], dtype=object))
    Path("model.joblib").write_bytes(b"x")
    kept(Path("deep.pt"), {"weight": torch.ones(3, 2, 2)})
    kept(Path("short.pt"), {"weight": torch.ones(3, DIM), "bias": torch.ones(2)})
    kept(Path("zero.pt"), {"weight": torch.zeros(3, DIM)})
    kept(Path("nan.pt"), {"weight": torch.full((3, DIM), torch.nan)})
    kept(Path("number.pt"), {"epoch": 3})
    np.savez("empty.npz", x=np.arange(3))
    for name, fact in {
        "trap.pt": ".pt",
        "half.safetensors": ".safetensors",
        "broken.npz": ".npz",
        "objects.npz": ".npz",
        "model.joblib": "coef_",
        "deep.pt": "--weight",
        "short.pt": "'weight'.*3.*2",
        "zero.pt": "zero",
        "nan.pt": "finite",
        "number.pt": "--weight",
        "empty.npz": "--weight",
        "missing.pt": "",
    }.items():
        with pytest.raises(UserError, match=f"^{re.escape(name)}: .*{fact}"):
            import_teacher(name, classnames=NAMES)
    assert not Path("trapped").exists()
    with pytest.raises(UserError, match="--classes"):
        import_teacher(kept(Path("head.pt"), state))


def test_what_was_imported_is_recovered_with_its_intercept(head, tmp_path):
    teacher = import_teacher(kept(tmp_path / "head.pt", head.state_dict()), classnames=NAMES)
    teacher.save(tmp_path / "teacher.safetensors")
    oracle = open_oracle(tmp_path / "teacher.safetensors", "logits")
    virtual = recover(oracle, features(3), new_text=features(5)[3:])
    torch.testing.assert_close(virtual.weight, head.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(virtual.bias, head.bias.detach(), rtol=1e-4, atol=1e-5)
