"""Feature files, batches of features, and images encoded once."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import fake_data
import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, Datum
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from dfzsl.datasets import features
from dfzsl.datasets.features import FeatureDatum, FeatureLoader, encode_datums
from dfzsl.errors import UserError


def build(path: Path, subsample: str = "all", teacher: str = ""):
    cfg = get_cfg_default()
    pairs = ["DATASET.NAME", "Features", "DATASET.ROOT", str(path), "DATASET.SUBSAMPLE_CLASSES", subsample]
    cfg.merge_from_list([*pairs, "TEACHER.FILE", teacher])
    return DATASET_REGISTRY.get("Features")(cfg)


def matrix(datums) -> torch.Tensor:
    return torch.stack([datum.feature for datum in datums])


# ---------------------------------------------------------------- the file


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


BROKEN = {
    "no list of class names": {"classnames": None},
    "the same name": {"classnames": np.array(["a", "a", "b", "c", "d"])},
    "no test features": {"x_test": None, "y_test": None},
    "y_test must hold 15 whole numbers": {"y_test": np.arange(3)},
    "y_train must hold 20 whole numbers": {"y_train": np.zeros(20)},
    "must lie in 0 to 4": {"y_test": np.arange(1, 16)},
    "x_test must be a table": {"x_test": np.ones((15, 4, 4), "float32")},
    "x_val must be a table": {"x_val": np.ones((10, 16), "int64")},
    "zero or not finite": {"x_test": np.zeros((15, 16), "float32")},
    "4 text rows for 5": {"text": np.ones((4, 16), "float32")},
    "of different dimensions": {"text": np.ones((5, 8), "float32")},
    "'new' must name some": {"new": np.array([7])},
    "no training image": {"y_train": np.zeros(20, int)},
    "'y_val' is not a readable array": {"y_val": np.array([{"a": 1}], dtype=object)},
    "'y_test' is not a readable array": {"y_test": np.array(["a"] * 15)},
    "'classnames' is not a readable array": {"classnames": np.array([{"a": 1}], dtype=object)},
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_file(tmp_path, said):
    path = fake_data.make("Features", tmp_path)
    arrays = {**np.load(path), **BROKEN[said]}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=said) as error:
        build(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".txt"])
def test_a_file_of_another_kind(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    with pytest.raises(UserError, match="no such file"):
        build(path)
    path.write_bytes(b"some text that is no feature file")
    with pytest.raises(UserError, match="feature file"):
        build(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="feature file"):
        build(path)


def test_real_features(real_features):
    dataset = build(real_features / "dtd_vitb32.npz", "base")
    assert (len(dataset.classnames), len(dataset.train_x), len(dataset.test)) == (24, 576, 864)
    text = torch.stack([dataset.text_features[name] for name in dataset.classnames])
    found = (matrix(dataset.test) @ text.T).argmax(1)
    accuracy = (found == torch.tensor([d.label for d in dataset.test])).float().mean()
    assert abs(100 * accuracy - 55.3) < 0.1  # the measured zero-shot accuracy of these features


# ---------------------------------------------------------------- batches


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 30),
    size=st.integers(1, 12),
    shuffle=st.booleans(),
    drop=st.booleans(),
    seed=st.integers(0, 9),
)
def test_loader_serves_each_row_once(n, size, shuffle, drop, seed):
    x, y = torch.randn(n, 3), torch.arange(n)
    loader = FeatureLoader(x, y, size, shuffle, torch.Generator().manual_seed(seed), drop)
    batches = list(loader)
    assert len(batches) == len(loader) == (n // size if drop else -(-n // size))
    for batch in batches:
        assert set(batch) == {"img", "label", "domain", "impath", "index"}
        assert torch.equal(batch["img"], x[batch["index"]]) and torch.equal(batch["label"], batch["index"])
        assert len(batch["impath"]) == len(batch["img"]) == len(batch["domain"])
    served = Counter(i for batch in batches for i in batch["index"].tolist())
    assert sum(served.values()) == (n // size * size if drop else n) and set(served.values()) <= {1}


def test_loader_shuffles_anew_and_repeats_by_seed():
    x, y = torch.randn(50, 2), torch.arange(50)

    def passes(seed: int) -> list[list[int]]:
        loader = FeatureLoader(x, y, 50, True, torch.Generator().manual_seed(seed))
        return [next(iter(loader))["index"].tolist() for _ in range(2)]

    assert passes(1) == passes(1) != passes(2)
    assert passes(1)[0] != passes(1)[1]


@pytest.mark.parametrize(("x", "y", "size"), [(0, 0, 1), (2, 3, 1), (2, 2, 0)])
def test_loader_refuses_nonsense(x, y, size):
    with pytest.raises(ValueError, match=r"nothing to serve|at least 1"):
        FeatureLoader(torch.zeros(x, 2), torch.zeros(y, dtype=torch.long), size)


# ---------------------------------------------------------------- encoding


class Encoder:
    """Mean colours: an encoder whose features can be worked out by hand. Counts the images it has seen."""

    name, weights_id, precision, dim = "mean", "none", "fp32", 3

    def __init__(self) -> None:
        self.seen = 0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=1)


class Pixels:
    """A transform with a repr that says what it does."""

    def __init__(self, size: int = 8) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image.resize((self.size, self.size)), dtype="float32").transpose(2, 0, 1)
        return torch.from_numpy(pixels / 255)

    def __repr__(self) -> str:
        return f"Pixels({self.size})"


@pytest.fixture
def datums(tmp_path) -> list[Datum]:
    for number in range(23):
        fake_data.picture(tmp_path / f"{number}.jpg", number, number)
    return [Datum(impath=str(tmp_path / f"{number}.jpg"), label=number) for number in range(23)]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(features, "PART", 5)


def by_hand(datums) -> torch.Tensor:
    return Encoder().encode_image(torch.stack([Pixels()(Image.open(d.impath)) for d in datums]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_features_equal_a_plain_loop(datums, small_parts, tmp_path, workers, batch_size):
    x = encode_datums(Encoder(), datums, Pixels(), tmp_path / "cache", batch_size, workers)
    assert x.dtype == torch.float32 and torch.allclose(x, by_hand(datums), atol=1e-6)


def test_an_image_is_encoded_once(datums, small_parts, tmp_path):
    encoder = Encoder()
    state = torch.get_rng_state()
    first = encode_datums(encoder, datums, Pixels(), tmp_path / "cache", num_workers=0)
    assert torch.equal(torch.get_rng_state(), state), "a run with a filled cache would go on otherwise"
    again = encode_datums(encoder, datums, Pixels(), tmp_path / "cache", num_workers=0)
    assert encoder.seen == len(datums) and torch.equal(first, again)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the parts are gone"


def test_the_default_cache_is_outside_the_data_folder(datums, tmp_path):
    encode_datums(Encoder(), datums, Pixels(), num_workers=0)
    assert len(list(Path(os.environ["DFZSL_CACHE"]).glob("*.safetensors"))) == 1
    assert not list(tmp_path.glob("*.safetensors"))


def test_whatever_decides_the_features_is_in_the_key(datums, tmp_path):
    def run(encoder=None, transform=None, of=datums) -> int:
        encoder = encoder or Encoder()
        encode_datums(encoder, of, transform or Pixels(), tmp_path / "cache", num_workers=0)
        return encoder.seen

    assert run() == 23 and run() == 0
    for attribute in ("name", "weights_id", "precision"):
        other = Encoder()
        setattr(other, attribute, "other")
        assert run(other) == 23
    assert run(transform=Pixels(9)) == 23
    assert run(of=datums[::-1]) == 23
    fake_data.picture(Path(datums[0].impath), 77, 77)
    os.utime(datums[0].impath, ns=(1, 1))
    assert run() == 23


def test_an_interrupted_encoding_goes_on(datums, small_parts, tmp_path):
    class Stops(Encoder):
        def encode_image(self, images):
            if self.seen >= 12:
                raise KeyboardInterrupt
            return super().encode_image(images)

    with pytest.raises(KeyboardInterrupt):
        encode_datums(Stops(), datums, Pixels(), tmp_path / "cache", 2, 0)
    encoder = Encoder()
    x = encode_datums(encoder, datums, Pixels(), tmp_path / "cache", 4, 0)
    assert encoder.seen == 23 - 10, "two parts of five were kept"
    assert torch.allclose(x, by_hand(datums), atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_a_broken_image_is_named_in_one_line(datums, tmp_path, workers, content):
    path = Path(datums[7].impath)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no picture", "empty": b""}[content])
    with pytest.raises(UserError, match="not a readable image") as error:
        encode_datums(Encoder(), datums, Pixels(), tmp_path / "cache", 4, workers)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_image_that_has_gone(datums, tmp_path):
    os.unlink(datums[3].impath)
    with pytest.raises(UserError, match="cannot read the image"):
        encode_datums(Encoder(), datums, Pixels(), tmp_path / "cache", num_workers=0)


def test_features_bring_themselves(feature_file, tmp_path):
    test = build(feature_file).test
    encoder = Encoder()
    assert torch.equal(encode_datums(encoder, test, Pixels(), tmp_path / "cache"), matrix(test))
    assert encoder.seen == 0 and not (tmp_path / "cache").exists()
    assert isinstance(test[0], FeatureDatum)


def test_no_images(tmp_path):
    assert encode_datums(Encoder(), [], Pixels(), tmp_path).shape == (0, 3)
