"""On a GPU the same as on a CPU, as far as rounding goes. benchmarks/gpu.sh runs them; skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import fake_data
import pytest
import torch
import torch.nn.functional as F

from dfzsl.datasets.encoding import encode_files
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.generation.closed_form import closed_form
from dfzsl.trainers.generation.generators import NeuralGenerator, build_generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(("precision", "lowest"), [("fp32", 0.9999), ("amp", 0.999), ("bf16", 0.99)])
def test_cuda_encoders(precision, lowest):
    here, there = load_backbone("shapes"), load_backbone("shapes", device="cuda", precision=precision)
    pictures, names = torch.rand(8, 3, 64, 64), ["striped teal leaf", "dotted red star"]
    for ours, theirs in (
        (there.encode_image(pictures.cuda()), here.encode_image(pictures)),
        (there.class_features(names, ["a photo of a {}."]), here.class_features(names, ["a photo of a {}."])),
    ):
        assert (ours.cpu() * theirs).sum(1).min() > lowest


@pytest.mark.parametrize("workers", [0, 2])
def test_cuda_extraction(workers, tmp_path):
    """Bytes through pinned memory, floats made on the device."""
    paths = [str(tmp_path / f"{number}.jpg") for number in range(20)]
    for number, path in enumerate(paths):
        fake_data.picture(Path(path), number, number)
    rows = []
    for device in ("cpu", "cuda"):
        encoder = load_backbone("shapes", device=device)
        found = encode_files(encoder, paths, 8, workers, device)
        rows.append(torch.cat([features.cpu() for _, features, _ in found]))
    assert (rows[0] * rows[1]).sum(1).min() > 0.9999


def test_cuda_closed_form():
    tensors = drawn(12, 32), drawn(5, 32, seed=1), drawn(12, 32, seed=2)
    here, there = closed_form(*tensors), closed_form(*(tensor.cuda() for tensor in tensors))
    for name in ("base_weight", "new_weight", "base_bias"):
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["cvae", "clswgan", "tfvaegan"])
def test_cuda_generators_learn_and_go_on_from_a_checkpoint(name, tmp_path, monkeypatch):
    labels = torch.arange(8).repeat_interleave(40).cuda()
    conditions = drawn(8, 16).cuda()
    features = F.normalize(conditions[labels] + 0.2 * drawn(320, 16, seed=1).cuda(), dim=1)
    keep, path = NeuralGenerator._save_checkpoint, tmp_path / "kept.safetensors"

    def killed(*args) -> None:
        keep(*args)
        raise KeyboardInterrupt

    def fit(checkpoint):
        model = build_generator(name, 16, 16, hidden=32, epochs=3, lr=1e-3, holdout=0.0)
        return model.fit(features, labels, conditions, torch.Generator().manual_seed(0), checkpoint)

    whole = fit(None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(NeuralGenerator, "_save_checkpoint", killed)
        fit(path)
    # Sums over rows come in another order each time.
    assert fit(path).history == pytest.approx(whole.history, rel=0.05)
