"""Test `dfzsl geometry` on folders of images, labeled or not, and on feature files."""

import numpy as np
import pytest
import torch
from PIL import Image

from dfzsl.cli.inspect_files import geometry
from dfzsl.cli.main import invoke
from dfzsl.client.measure import measure_encoder
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.recovery.feature_statistics import FeatureStatistics, measure_feature_statistics
from dfzsl.utils.errors import UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of 55 noisy pictures each, in a folder."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("one", "two")):
        (folder / name).mkdir()
        for number in range(55):
            pixels = rng.integers(0, 128 + 127 * label, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder


def test_folders_of_pictures_are_classes(pictures, tmp_path):
    invoke(geometry, [str(pictures), "--backbone", "shapes", "-o", str(tmp_path / "g.safetensors")])
    found = FeatureStatistics.load(tmp_path / "g.safetensors")
    encoder = load_backbone("shapes")
    paths = sorted(pictures.glob("*/*.png"))
    images = torch.stack([encoder.transform(Image.open(path)) for path in paths])
    with torch.no_grad():
        features = encoder.encode_image(images)
    expected = measure_feature_statistics(features, torch.arange(2).repeat_interleave(55))
    assert torch.allclose(found.scatter, expected.scatter, atol=1e-5)
    assert (found.images, found.classes, found.backbone) == (110, 2, encoder.identity)


def test_unlabeled_images_and_mistakes(pictures, tmp_path):
    with pytest.raises(UserError, match="got 55"):
        measure_encoder([pictures / "one"], "shapes")
    both = measure_encoder([pictures / "one", pictures / "two"], "shapes")
    assert (both.images, both.classes) == (110, 0)
    with pytest.raises(UserError, match="labeled"):
        measure_encoder([pictures, pictures / "one"], "shapes")
    with pytest.raises(UserError, match="--backbone"):
        measure_encoder([pictures])
    with pytest.raises(UserError, match="nowhere"):
        measure_encoder([tmp_path / "nowhere"], "shapes")
    with pytest.raises(UserError, match="no images"):
        measure_encoder([tmp_path], "shapes")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        measure_encoder([tmp_path], "shapes")


def test_classes_of_two_feature_files_stay_apart(tmp_path):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(120, 8)).astype(np.float32), np.arange(120) % 6
    for name, part in (("a", slice(0, 60)), ("b", slice(60, 120))):
        np.savez(tmp_path / f"{name}.npz", x=x[part], y=y[part])
    found = measure_encoder([tmp_path / "a.npz", tmp_path / "b.npz"])
    expected = measure_feature_statistics(torch.from_numpy(x), torch.from_numpy(np.r_[y[:60], y[60:] + 6]))
    assert torch.allclose(found.scatter, expected.scatter) and found.classes == 12
