"""Images encoded once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import fake_data
import numpy as np
import pytest
import torch
from conftest import needs_proc
from dassl.data.datasets import Datum
from PIL import Image

from dfzsl.datasets import encoding
from dfzsl.datasets.encoding import encode_datums
from dfzsl.datasets.features import FeatureDatum
from dfzsl.io.tensors import save_tensors
from dfzsl.utils.errors import UserError
from dfzsl.utils.torchvision_import import import_torchvision

import_torchvision()
from torchvision import transforms as T  # noqa: E402


class Encoder:
    """Mean colors: an encoder whose features can be worked out by hand. Counts the images it has seen."""

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


def maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


@pytest.fixture
def datums(tmp_path) -> list[Datum]:
    for number in range(23):
        fake_data.picture(tmp_path / f"{number}.jpg", number, number)
    return [Datum(impath=str(tmp_path / f"{number}.jpg"), label=number) for number in range(23)]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(encoding, "IMAGES_PER_PART", 5)


def by_hand(datums) -> torch.Tensor:
    return Encoder().encode_image(torch.stack([Pixels()(Image.open(d.impath)) for d in datums]))


@pytest.mark.parametrize("workers", [0, 2])
def test_features_equal_a_plain_loop(datums, small_parts, tmp_path, workers):
    for batch_size in (1, 3, 5, 100):
        x = encode_datums(Encoder(), datums, Pixels(), tmp_path / str(batch_size), batch_size, workers)
        assert x.dtype == torch.float16 and torch.equal(x, by_hand(datums).half())


def test_an_image_is_encoded_once(datums, small_parts, tmp_path):
    encoder = Encoder()
    state = torch.get_rng_state()
    first = encode_datums(encoder, datums, Pixels(), tmp_path / "cache", num_workers=0)
    assert torch.equal(torch.get_rng_state(), state), "a run with a filled cache would go on otherwise"
    again = encode_datums(encoder, datums, Pixels(), tmp_path / "cache", num_workers=0)
    assert encoder.seen == len(datums) and torch.equal(first, again)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the parts are gone"


@needs_proc
def test_the_cache_holds_half_of_what_floats_take_and_is_mapped(datums, tmp_path):
    x = encode_datums(Encoder(), datums, Pixels(), tmp_path / "cache", num_workers=0)
    file = next((tmp_path / "cache").iterdir())
    assert file.stat().st_size < x.numel() * 2 + 256
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps() if file.name in line
    ]
    assert any(start <= x.data_ptr() < end for start, end in mapped), "no copy in memory"


def test_a_cache_of_version_0_2_is_read_and_rounded(datums, small_parts, tmp_path):
    """Its files are float32, joined and in parts."""
    encoder = Encoder()
    fresh = encode_datums(encoder, datums, Pixels(), tmp_path / "cache", num_workers=0)
    file = next((tmp_path / "cache").iterdir())
    floats = by_hand(datums)
    save_tensors(file, {"features": floats}, {"kind": "image features"})
    assert torch.equal(encode_datums(encoder, datums, Pixels(), tmp_path / "cache"), fresh)
    file.unlink()
    save_tensors(file.with_suffix(".5"), {"features": floats[5:10]}, {"kind": "part"})
    assert torch.equal(encode_datums(encoder, datums, Pixels(), tmp_path / "cache", num_workers=0), fresh)
    assert encoder.seen == 23 + 18


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_cache_with_a_value_that_is_none(datums, tmp_path, value, dtype):
    rows = encode_datums(Encoder(), datums, Pixels(), tmp_path / "cache", num_workers=0).to(dtype)
    rows[22, 1] = value
    save_tensors(next((tmp_path / "cache").iterdir()), {"features": rows}, {"kind": "image features"})
    with pytest.raises(UserError, match=str(tmp_path / "cache")):
        encode_datums(Encoder(), datums, Pixels(), tmp_path / "cache")


def steps(*last: object) -> T.Compose:
    return T.Compose([T.Resize(20, T.InterpolationMode.BICUBIC), T.CenterCrop(16), *last])


TRANSFORMS = {
    "bytes": steps(T.ToTensor(), T.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))),
    "gray": steps(T.Grayscale(), T.ToTensor(), T.Normalize((0.5,), (0.2,))),
    "a wide mode": steps(T.Grayscale(), lambda x: x.convert("F"), T.ToTensor(), T.Normalize((9.0,), (7.0,))),
    "not normalized": steps(T.ToTensor()),
    "not last": steps(T.ToTensor(), T.Normalize((0.5,) * 3, (0.2,) * 3), torch.neg),
    "no list of steps": Pixels(),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_images_equal_the_transforms_to_the_last_bit(datums, name, workers):
    """Wherever its last steps are computed."""

    class Sees(Encoder):
        transform = TRANSFORMS[name]
        batches: ClassVar[list[torch.Tensor]] = []

        def encode_image(self, images):
            self.batches.append(images.clone())
            return images.flatten(1)

    paths = [datum.impath for datum in datums]
    list(encoding.encode_files(Sees(), paths, 5, workers))
    plain = torch.stack([Sees.transform(Image.open(path).convert("RGB")) for path in paths])
    assert torch.equal(torch.cat(Sees.batches), plain)


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


def test_an_interrupted_encoding_resumes(datums, small_parts, tmp_path):
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
    assert torch.equal(x, by_hand(datums).half())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_a_broken_image_is_named_in_one_line(datums, tmp_path, workers, content):
    path = Path(datums[7].impath)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no picture", "empty": b""}[content])
    with pytest.raises(UserError, match=str(path)) as error:
        encode_datums(Encoder(), datums, Pixels(), tmp_path / "cache", 4, workers)
    assert "\n" not in str(error.value)


def test_an_image_that_has_gone(datums, tmp_path):
    os.unlink(datums[3].impath)
    with pytest.raises(UserError, match=datums[3].impath):
        encode_datums(Encoder(), datums, Pixels(), tmp_path / "cache", num_workers=0)


def test_features_bring_themselves(feature_file, tmp_path):
    rows = torch.eye(3)
    datums = [FeatureDatum(row, str(feature_file), 0) for row in rows]
    encoder = Encoder()
    assert torch.equal(encode_datums(encoder, datums, Pixels(), tmp_path / "cache"), rows)
    assert encoder.seen == 0 and not (tmp_path / "cache").exists()


def test_no_images(tmp_path):
    assert encode_datums(Encoder(), [], Pixels(), tmp_path).shape == (0, 3)
