"""Feature files."""

from __future__ import annotations

import json
from pathlib import Path

import fake_data
import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from safetensors.torch import save_file

from dfzsl.datasets.features import Features
from dfzsl.utils.errors import UserError


def build(path: Path, subsample: str = "all", teacher: str = ""):
    cfg = get_cfg_default()
    pairs = ["DATASET.NAME", "Features", "DATASET.ROOT", str(path), "DATASET.SUBSAMPLE_CLASSES", subsample]
    cfg.merge_from_list([*pairs, "TEACHER.FILE", teacher])
    return Features(cfg)


def matrix(datums) -> torch.Tensor:
    return torch.stack([datum.feature for datum in datums])


def test_npz_and_safetensors_say_the_same(tmp_path):
    npz = fake_data.make("Features", tmp_path)
    arrays = dict(np.load(npz))
    names = arrays.pop("classnames").tolist()
    save_file(
        {k: torch.from_numpy(v) for k, v in arrays.items()},
        tmp_path / "f.safetensors",
        {"classnames": json.dumps(names)},
    )
    for part in ("base", "new", "all"):
        one, two = build(npz, part), build(tmp_path / "f.safetensors", part)
        assert one.classnames == two.classnames
        for name in ("train_x", "val", "test"):
            assert torch.equal(matrix(getattr(one, name)), matrix(getattr(two, name)))
        assert all(torch.equal(one.text_features[n], two.text_features[n]) for n in names)


def test_rows_are_unit_float32_and_belong_to_their_labels(tmp_path):
    path = fake_data.make("Features", tmp_path)
    arrays = np.load(path)
    dataset = build(path, "new")
    expected = arrays["x_test"][arrays["y_test"] >= 3].astype("float32")
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    x = matrix(dataset.test)
    assert x.dtype == torch.float32 and np.allclose(x, expected, atol=1e-6)
    assert [d.label for d in dataset.test] == (arrays["y_test"][arrays["y_test"] >= 3] - 3).tolist()
    assert all(d.impath == str(path) for d in dataset.test)


def test_without_training_features_validation_trains(feature_file):
    dataset = build(feature_file)
    assert len(dataset.train_x) == 8 * 24 and dataset.val == [] and not dataset.test_only


def test_the_file_may_name_the_new_classes(tmp_path):
    path = fake_data.make("Features", tmp_path)
    np.savez(path, **{**np.load(path), "new": np.array([3, 0])})
    dataset = build(path, "new")
    assert dataset.classnames == ["tench", "tiger shark"] and {d.label for d in dataset.test} == {0, 1}
    assert build(path).base_classnames == ["goldfish", "great white shark", "hammerhead shark"]


def test_template_and_ids(tmp_path):
    path = fake_data.make("Features", tmp_path)
    words = {
        "template": np.array("a sketch of a {}."),
        "backbone": np.array("ViT-B-16"),
        "weights": np.array("openai"),
    }
    np.savez(path, **{**np.load(path), **words})
    dataset = build(path)
    assert (dataset.template, dataset.backbone_id, dataset.weights_id) == (
        "a sketch of a {}.",
        "ViT-B-16",
        "openai",
    )
    assert "a sketch of a {}." in dataset.templates


# What is broken -> (changed arrays, a fact that the message names).
BROKEN: dict[str, tuple[dict, str]] = {
    "no class names": ({"classnames": None}, "class names"),
    "an empty list of class names": ({"classnames": np.array([], dtype=str)}, "class"),
    "a class name twice": ({"classnames": np.array(["a", "a", "b", "c", "d"])}, "'a'"),
    "class names that are objects": ({"classnames": np.array([{"a": 1}], dtype=object)}, "'classnames'"),
    "no test features": ({"x_test": None, "y_test": None}, "test features"),
    "too few labels": ({"y_test": np.arange(3)}, "y_test.* 15"),
    "labels that are floats": ({"y_train": np.zeros(20)}, "y_train.* 20"),
    "a label without a class": ({"y_test": np.arange(1, 16)}, "0 to 4"),
    "labels that are objects": ({"y_val": np.array([{"a": 1}], dtype=object)}, "'y_val'"),
    "labels that are text": ({"y_test": np.array(["a"] * 15)}, "'y_test'"),
    "three dimensions": ({"x_test": np.ones((15, 4, 4), "float32")}, "x_test"),
    "features that are integers": ({"x_val": np.ones((10, 16), "int64")}, "x_val"),
    "rows of zeros": ({"x_test": np.zeros((15, 16), "float32")}, "x_test"),
    "too few text features": ({"text": np.ones((4, 16), "float32")}, "4 .*5"),
    "other text dimensions": ({"text": np.ones((5, 8), "float32")}, "x_train 16, .*text 8"),
    "an unknown new class": ({"new": np.array([7])}, "'new'"),
    "a class without training features": ({"y_train": np.zeros(20, int)}, "training"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file(tmp_path, what):
    path = fake_data.make("Features", tmp_path)
    changes, fact = BROKEN[what]
    arrays = {**np.load(path), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=fact) as error:
        build(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".txt"])
def test_a_file_of_another_kind(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    with pytest.raises(UserError, match=str(path)):
        build(path)
    path.write_bytes(b"some text that is no feature file")
    with pytest.raises(UserError, match=str(path)):
        build(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=str(path)):
        build(path)


def test_real_features(real_features):
    dataset = build(real_features / "dtd_vitb32.npz", "base")
    assert (len(dataset.classnames), len(dataset.train_x), len(dataset.test)) == (24, 576, 864)
    text = torch.stack([dataset.text_features[name] for name in dataset.classnames])
    found = (matrix(dataset.test) @ text.T).argmax(1)
    accuracy = (found == torch.tensor([d.label for d in dataset.test])).float().mean()
    assert abs(100 * accuracy - 55.3) < 0.1  # the measured zero-shot accuracy of these features
