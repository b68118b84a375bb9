"""Images encoded once."""

from __future__ import annotations

import os
from pathlib import Path

import fake_data
import numpy as np
import pytest
import torch
from dassl.data.datasets import Datum
from PIL import Image

from dfzsl.datasets import encoding
from dfzsl.datasets.encoding import encode_datums
from dfzsl.datasets.features import FeatureDatum
from dfzsl.errors import UserError


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
    monkeypatch.setattr(encoding, "PART", 5)


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
    rows = torch.eye(3)
    datums = [FeatureDatum(row, str(feature_file), 0) for row in rows]
    encoder = Encoder()
    assert torch.equal(encode_datums(encoder, datums, Pixels(), tmp_path / "cache"), rows)
    assert encoder.seen == 0 and not (tmp_path / "cache").exists()


def test_no_images(tmp_path):
    assert encode_datums(Encoder(), [], Pixels(), tmp_path).shape == (0, 3)
