"""Test fitting a teacher on images and on feature files."""

from __future__ import annotations

from pathlib import Path

import fake_data
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dfzsl.datasets.labeled_images import read_labeled_features
from dfzsl.owner.fit import fit_teacher_on
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.recovery.teacher import fit_teacher
from dfzsl.utils.errors import UserError

NAMES = ["red star", "blue circle", "green square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(NAMES):
        (root / name).mkdir()
        for number in range(5):
            pixels = np.random.default_rng((label, number)).integers(0, 256, (32, 32, 3), dtype="uint8")
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_a_feature_file_is_fitted_with_its_own_text(tmp_path):
    data = np.load(fake_data.make("Features", tmp_path))
    x, text = (F.normalize(torch.from_numpy(a).float(), dim=1) for a in (data["x_train"], data["text"]))
    x = torch.cat([x, F.normalize(torch.from_numpy(data["x_val"]).float(), dim=1)])
    y = torch.from_numpy(np.concatenate([data["y_train"], data["y_val"]]))
    expected = fit_teacher(x, y, fake_data.NAMES, text=text, normalized=False)
    teacher = fit_teacher_on(tmp_path / "features.npz", normalized=False)
    assert torch.equal(teacher.weight, expected.weight) and not teacher.normalized
    assert teacher.card.strength == expected.card.strength and "a photo of a {}" in teacher.card.text
    names = list(reversed(fake_data.NAMES[:2]))
    few = [fit_teacher_on(tmp_path / "features.npz", classnames=names, shots=3, seed=s) for s in (1, 1, 2)]
    assert few[0].classnames == names
    assert torch.equal(few[0].weight, few[1].weight) and not torch.equal(few[0].weight, few[2].weight)


def test_images_are_encoded_once_and_fitted_with_the_text_of_their_names(folder):
    teacher = fit_teacher_on(folder, backbone="shapes", text="a drawn {}", num_workers=0)
    backbone = load_backbone("shapes")
    images = read_labeled_features(folder, lambda: backbone, num_workers=0)
    text = backbone.class_features(images.classnames, ["a drawn {}"])
    expected = fit_teacher(
        images.features, images.labels, images.classnames, text=text, prompts="'a drawn {}'"
    )
    assert torch.equal(teacher.weight, expected.weight) and teacher.card == expected.card
    assert teacher.backbone == backbone.identity


def test_mistakes_name_the_data(folder, tmp_path):
    fake_data.make("Features", tmp_path)
    with pytest.raises(UserError, match="red sun"):
        fit_teacher_on(folder, classnames=["red sun"], backbone="shapes", num_workers=0)
    with pytest.raises(UserError, match="backbone"):  # the file does not name the encoder of its features
        fit_teacher_on(tmp_path / "features.npz", text="a drawn {}")
    broken = tmp_path / "images" / "ant" / "broken.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not an image")
    (broken.parent / "good.png").write_bytes((folder / NAMES[0] / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"broken\.png"):
        fit_teacher_on(tmp_path / "images", backbone="shapes", num_workers=0)
