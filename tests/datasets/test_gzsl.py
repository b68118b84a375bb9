"""The xlsa17 format: seen and unseen classes, features or images, and broken files."""

from __future__ import annotations

from pathlib import Path

import fake_data
import numpy as np
import pytest
import torch
from conftest import ROOT
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from scipy.io import loadmat, savemat

from dfzsl.datasets.gzsl import readable_name
from dfzsl.utils.errors import UserError

SETS = ["AWA2", "CUB", "SUN", "FLO", "APY"]


def build(name: str, root: Path, subsample: str = "all", features: str = "", teacher: str = ""):
    cfg = get_cfg_default()
    pairs = ["DATASET.NAME", name, "DATASET.ROOT", str(root), "DATASET.SUBSAMPLE_CLASSES", subsample]
    cfg.merge_from_list([*pairs, "DATASET.FEATURES", features, "TEACHER.FILE", teacher])
    return DATASET_REGISTRY.get(name)(cfg)


def change(root: Path, file: str, **arrays) -> None:
    """Replace arrays of a .mat file of the fake AWA2; None drops one."""
    path = root / "AWA2" / file
    content = {name: array for name, array in loadmat(path).items() if not name.startswith("__")} | arrays
    savemat(path, {name: array for name, array in content.items() if array is not None})


@pytest.mark.parametrize("name", SETS)
def test_seen_is_base_and_unseen_is_new(name, tmp_path):
    root = fake_data.make(name, tmp_path)
    base, new, whole = (build(name, root, part) for part in ("base", "new", "all"))
    assert [whole.classnames.index(c) for c in base.classnames] == [0, 2, 4]
    assert [whole.classnames.index(c) for c in new.classnames] == [1, 3]
    assert whole.base_classnames == base.classnames and whole.new_classnames == new.classnames
    assert {d.classname for d in whole.train_x} == set(base.classnames), "no unseen class is trained on"
    assert len(base.test) == 3 * 2 and len(new.test) == 2 * 9 and len(whole.test) == 24
    assert {d.impath for d in base.test} | {d.impath for d in new.test} == {d.impath for d in whole.test}
    assert not {d.impath for d in whole.train_x} & {d.impath for d in whole.test}
    assert new.test_only and not base.test_only


@pytest.mark.parametrize("name", SETS)
def test_features_and_images_are_the_same_split(name, tmp_path):
    root = fake_data.make(name, tmp_path)
    mat, splits = loadmat(root / name / "ViTB16.mat"), loadmat(root / name / "att_splits.mat")
    for part in ("base", "new", "all"):
        images, rows = build(name, root, part), build(name, root, part, "ViTB16.mat")
        for which in ("train_x", "test"):
            assert [(d.label, d.classname) for d in getattr(rows, which)] == [
                (d.label, d.classname) for d in getattr(images, which)
            ]
    x = torch.stack([d.feature for d in rows.train_x])
    expected = mat["features"].T[splits["trainval_loc"].ravel() - 1]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(x, expected, atol=1e-6)
    files = [str(mat["image_files"][i - 1, 0][0]) for i in splits["trainval_loc"].ravel()]
    assert all(f.endswith(Path(d.impath).name) for f, d in zip(files, images.train_x, strict=True))


def test_text_features_of_clip_splits(tmp_path):
    root = fake_data.make("AWA2", tmp_path)
    text = build("AWA2", root, features="ViTB16.mat").text_features
    columns = loadmat(root / "AWA2/clip_splits.mat")["cls_features"]
    assert list(text) == ["antelope", "grizzly bear", "killer whale", "beaver", "dalmatian"]
    expected = columns[:, 1] / np.linalg.norm(columns[:, 1])
    assert np.allclose(text["grizzly bear"], expected, atol=1e-6)
    (root / "AWA2/clip_splits.mat").unlink()
    assert build("AWA2", root, features="ViTB16.mat").text_features is None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("grizzly+bear", "grizzly bear"),
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        (" apse_indoor ", "apse indoor"),
        ("707-320", "707-320"),
    ],
)
def test_class_names_are_made_readable(written, read):
    assert readable_name(written) == read


def test_the_real_awa2_split(tmp_path):
    """The authors' own split file, with stand-ins for the features, which are not in it."""
    real = ROOT.parent / "shared/data/awa2_clip_splits.mat"
    if not real.exists():
        pytest.skip("the real split file is not on this machine")
    (tmp_path / "AWA2").mkdir()
    (tmp_path / "AWA2/clip_splits.mat").symlink_to(real)
    splits = loadmat(real)
    n = 37322
    # Any labels do whose seen and unseen images are those of 40 and 10 different classes.
    labels = np.zeros(n, int)
    unseen = splits["test_unseen_loc"].ravel() - 1
    labels[:] = np.arange(n) % 40 + 1
    labels[unseen] = np.arange(len(unseen)) % 10 + 41
    features = np.random.default_rng(0).normal(size=(4, n)).astype("float32")
    savemat(tmp_path / "AWA2/ViTB16.mat", {"features": features, "labels": labels[:, None]})
    whole = build("AWA2", tmp_path, features="ViTB16.mat")
    assert (len(whole.base_classnames), len(whole.new_classnames)) == (40, 10)
    assert (len(whole.train_x), len(whole.test)) == (23527, 5882 + 7913)
    assert len(build("AWA2", tmp_path, "new", "ViTB16.mat").test) == 7913
    assert whole.text_features["grizzly bear"].shape == (512,)


LOC = "test_unseen_loc"
BROKEN = [
    ("att_splits.mat", {"test_seen_loc": np.array([[0], [1]])}, "test_seen_loc.* 0"),
    ("att_splits.mat", {LOC: np.array([[46]])}, "46 of 45"),
    ("att_splits.mat", {LOC: np.array([[1.5]])}, LOC),
    ("att_splits.mat", {LOC: np.array([[1, 2], [3, 4]])}, LOC),
    ("att_splits.mat", {LOC: np.zeros((0, 0))}, LOC),
    ("att_splits.mat", {LOC: None}, LOC),
    ("att_splits.mat", {"allclasses_names": None}, "allclasses_names"),
    ("att_splits.mat", {"allclasses_names": fake_data.column(["a", "b"])}, "labels.* 1 to 2"),
    ("res101.mat", {"labels": np.zeros((45, 1))}, "labels.* 1 to 5"),
    ("res101.mat", {"labels": np.ones((45, 2))}, "labels"),
    ("res101.mat", {"labels": None}, "'labels'"),
    ("res101.mat", {"image_files": None}, "'image_files'"),
    ("res101.mat", {"image_files": fake_data.column(["a.jpg"] * 3)}, "3 image_files.* 45"),
    ("res101.mat", {"image_files": fake_data.column(["/x/a.jpg"] * 45)}, "/x/a.jpg"),
    ("res101.mat", {"image_files": fake_data.column(["../../../etc/passwd"] * 45)}, "passwd"),
]


@pytest.mark.parametrize(("file", "arrays", "message"), BROKEN)
def test_a_broken_file(tmp_path, file, arrays, message):
    root = fake_data.make("AWA2", tmp_path)
    (root / "AWA2/clip_splits.mat").unlink()
    change(root, file, **arrays)
    with pytest.raises(UserError, match=message) as error:
        build("AWA2", root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "arrays", "message"),
    [
        ("ViTB16.mat", {"features": np.ones((45, 16))}, r"features.*\(d, 45\)"),
        ("ViTB16.mat", {"features": np.zeros((16, 45))}, r"ViTB16\.mat"),
        ("ViTB16.mat", {"features": None}, "'features'"),
        ("clip_splits.mat", {"cls_features": np.ones((5, 16))}, r"cls_features.*\(d, 5\)"),
    ],
)
def test_broken_features(tmp_path, file, arrays, message):
    root = fake_data.make("AWA2", tmp_path)
    change(root, file, **arrays)
    with pytest.raises(UserError, match=message):
        build("AWA2", root, features="ViTB16.mat")


def test_splits_that_share_images(tmp_path):
    root = fake_data.make("AWA2", tmp_path)
    splits = loadmat(root / "AWA2/clip_splits.mat")
    change(
        root, "clip_splits.mat", trainval_loc=np.vstack([splits["trainval_loc"], splits["test_seen_loc"][:1]])
    )
    with pytest.raises(UserError, match=r"clip_splits\.mat"):
        build("AWA2", root)


def test_a_class_both_seen_and_unseen(tmp_path):
    root = fake_data.make("AWA2", tmp_path)
    splits = loadmat(root / "AWA2/clip_splits.mat")
    places = splits["test_unseen_loc"]
    change(
        root,
        "clip_splits.mat",
        trainval_loc=np.vstack([splits["trainval_loc"], places[:1]]),
        test_unseen_loc=places[1:],
    )
    with pytest.raises(UserError, match="seen and unseen"):
        build("AWA2", root)


def test_a_truncated_mat_file(tmp_path):
    root = fake_data.make("AWA2", tmp_path)
    path = root / "AWA2/res101.mat"
    whole = path.read_bytes()
    for length in (len(whole) - 20, 300, 60):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"res101\.mat"):
            build("AWA2", root)
    path.unlink()
    with pytest.raises(UserError, match=r"res101\.mat.*dfzsl\.prepare"):
        build("AWA2", root)


def test_a_missing_feature_file_is_named(tmp_path):
    root = fake_data.make("AWA2", tmp_path)
    with pytest.raises(UserError, match=r"ViTL14\.mat"):
        build("AWA2", root, features="ViTL14.mat")
