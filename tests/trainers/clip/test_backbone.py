from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import socket
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from towers import CONFIGS, tiny

import dfzsl.utils.torchvision_import as guard
from dfzsl.trainers.clip.backbone import FeatureBackbone, import_open_clip
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.utils.errors import UserError

TEXTS = ["a photo of a cat.", "an itap of the golden retriever in the snow, blurred", ""]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and no cache that could hide it."""

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))


# Encoding


@pytest.mark.parametrize("name", list(CONFIGS))
def test_text_features_are_those_of_open_clip(name):
    backbone = tiny(name)
    expected = backbone.model.encode_text(backbone.tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(backbone.encode_text(TEXTS), expected)


def test_many_texts_are_encoded_in_portions(monkeypatch):
    backbone = tiny("tiny-vit")
    expected = backbone.encode_text(TEXTS)
    monkeypatch.setattr("dfzsl.trainers.clip.backbone.TEXT_BATCH_SIZE", 2)
    torch.testing.assert_close(backbone.encode_text(TEXTS), expected)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_images_become_unit_rows_and_features_pass(name):
    backbone = tiny(name)
    images = torch.randn(3, 3, 32, 32)
    features = backbone.encode_image(images)
    torch.testing.assert_close(features, F.normalize(backbone.model.encode_image(images), dim=1).detach())
    assert backbone.encode_image(features) is features
    assert features.shape == (3, backbone.dim)
    with pytest.raises(UserError, match=r"47.*tiny-.*48"):
        backbone.encode_image(torch.ones(2, 47))


def test_class_features_are_the_normalized_mean_over_templates():
    backbone = tiny("tiny-vit")
    templates = ["a photo of a {}.", "art of the {}."]
    rows = torch.stack([backbone.encode_text([t.format(n) for n in ("cat", "red fox")]) for t in templates])
    expected = F.normalize(rows.mean(0), dim=1)
    torch.testing.assert_close(backbone.class_features(["cat", "red_fox"], templates), expected)


def test_the_model_stays_frozen_and_in_evaluation_mode():
    backbone = tiny("tiny-rn")
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_the_transform_is_that_of_the_model():
    backbone = tiny("tiny-vit")
    assert backbone.preprocess_cfg["size"] == (32, 32)
    assert backbone.transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


def test_the_last_text_that_fits_and_the_first_that_does_not():
    backbone = tiny("tiny-vit")
    backbone.encode_text(["word " * 75])
    with pytest.raises(UserError, match=r"word word .*77"):
        backbone.encode_text(["short", "word " * 76])


def test_random_weights_are_always_the_same_and_leave_the_random_stream_alone():
    tiny("tiny-vit")
    state = torch.random.get_rng_state()
    one, two = (load_backbone("tiny-vit", "random") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.identity == "tiny-vit (random)"
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_cpu_says_that_it_runs_in_fp32(caplog):
    backbone = load_backbone("shapes", precision="fp16")
    assert "fp32" in caplog.text
    assert backbone.precision == "fp32"
    with pytest.raises(UserError, match=r"'fp64'.*fp32, fp16, amp, bf16"):
        backbone.use_precision("fp64")


def photographs(size: int, count: int = 16) -> torch.Tensor:
    """Smooth pictures with grain, as a transform leaves them (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    grain = 0.05 * torch.randn(count, 3, size, size, generator=generator)
    return (F.interpolate(coarse, size, mode="bicubic") + grain - 0.45) / 0.27


@pytest.mark.parametrize("name", ["shapes", "shapes-vit"])
def test_image_features_are_open_clips_own(name):
    """To 1e-5, whatever the layout in memory."""
    encoder = load_backbone(name)
    pictures = photographs(encoder.preprocess_cfg["size"][0])
    plain = F.normalize(encoder.model.encode_image(pictures), dim=1)
    assert (encoder.encode_image(pictures) - plain).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["shapes", "shapes-vit"])
def test_bf16_on_a_cpu_that_has_it(name, monkeypatch):
    """Torch computes in it on any CPU, only slowly."""
    monkeypatch.setattr("dfzsl.trainers.clip.backbone.cpu_has_bf16", lambda: True)
    exact, wide = load_backbone(name), load_backbone(name, precision="bf16")
    pictures = photographs(exact.preprocess_cfg["size"][0])
    one, two = exact.encode_image(pictures), wide.encode_image(pictures)
    assert wide.precision == "bf16" and two.dtype == torch.float32 and not torch.equal(one, two)
    assert (one * two).sum(1).min() > 0.999


def test_bf16_on_a_cpu_that_has_it_not(monkeypatch, caplog):
    monkeypatch.setattr("dfzsl.trainers.clip.backbone.cpu_has_bf16", lambda: False)
    assert load_backbone("shapes", precision="bf16").precision == "fp32"
    assert "fp32" in caplog.text


# Weights


def openai_state() -> dict[str, torch.Tensor]:
    """The weights of a small CLIP as OpenAI's archives have them: half precision, three marks."""
    state = {k: v.clone() for k, v in tiny("tiny-openai").model.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    state = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    half = {k: v.half() if "weight" in k and v.ndim > 1 else v for k, v in state.items()}
    marks = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    return {**half, **{k: torch.tensor(v) for k, v in marks.items()}}


def archive(state: dict[str, torch.Tensor]) -> torch.jit.ScriptModule:
    """A TorchScript archive with this state dict."""
    root = nn.Module()
    for key, value in state.items():
        *parents, leaf = key.split(".")
        place = root
        for name in parents:
            if name not in dict(place.named_children()):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.register_buffer(leaf, value)
    return torch.jit.script(root)


def write(kind: str, path: Path) -> Path:
    state = openai_state()
    if kind == "archive":
        torch.jit.save(archive(state), path)
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif kind == "nested":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("kind", ["archive", "plain", "nested", "safetensors"])
def test_an_openai_state_dict_loads_from_a_file(kind, tmp_path):
    """CLIP written out: quick GELU, layer norms, causal attention, end token, projection."""
    path = write(kind, tmp_path / "clip.pt")
    backbone = load_backbone("tiny-openai", str(path))
    state = {k: v.float() for k, v in openai_state().items()}
    ids = backbone.tokenizer(TEXTS)
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((77, 77), float("-inf")).triu(1)
    for layer in range(3):
        p = {k.removeprefix(f"transformer.resblocks.{layer}."): v for k, v in state.items()}
        h = F.layer_norm(x, (64,), p["ln_1.weight"], p["ln_1.bias"])
        q, k, v = F.linear(h, p["attn.in_proj_weight"], p["attn.in_proj_bias"]).chunk(3, -1)
        h = (q @ k.mT / 64**0.5 + mask).softmax(-1) @ v
        x = x + F.linear(h, p["attn.out_proj.weight"], p["attn.out_proj.bias"])
        h = F.layer_norm(x, (64,), p["ln_2.weight"], p["ln_2.bias"])
        h = F.linear(h, p["mlp.c_fc.weight"], p["mlp.c_fc.bias"])
        h = h * torch.sigmoid(1.702 * h)
        x = x + F.linear(h, p["mlp.c_proj.weight"], p["mlp.c_proj.bias"])
    x = F.layer_norm(x, (64,), state["ln_final.weight"], state["ln_final.bias"])
    x = x[torch.arange(3), ids.argmax(1)] @ state["text_projection"]
    torch.testing.assert_close(backbone.encode_text(TEXTS), F.normalize(x, dim=1), rtol=1e-4, atol=1e-5)
    assert backbone.logit_scale == pytest.approx(float(state["logit_scale"].exp()))
    assert len(backbone.weights_id) == 16


def test_weights_of_open_clip_load_into_either_kind_of_tower(tmp_path):
    """A CLIP's weights also fit the same model with its text tower apart."""
    path = tmp_path / "model.safetensors"
    state = tiny("tiny-openai").model.state_dict()
    save_file(state, path)
    config = {**CONFIGS["tiny-openai"], "custom_text": True, "embed_dim": 48}
    (tmp_path / "tiny-apart.json").write_text(json.dumps(config))
    import_open_clip().add_model_config(tmp_path / "tiny-apart.json")
    apart, whole = load_backbone("tiny-apart", str(path)), load_backbone("tiny-openai", str(path))
    torch.testing.assert_close(apart.encode_text(TEXTS), whole.encode_text(TEXTS))
    assert apart.weights_id == whole.weights_id


def test_the_same_file_has_the_same_identity_and_another_has_not(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        state = {k: v + (i == 2) for k, v in tiny("tiny-openai").model.state_dict().items()}
        save_file(state, path)
    one, two, three = (load_backbone("tiny-openai", str(path)).weights_id for path in paths)
    assert one == two != three


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / ("weights.safetensors" if kind.startswith("safe") else "weights.pt")
    state = dict(tiny("tiny-openai").model.state_dict())
    if kind == "missing":
        return path
    if kind in ("safe garbage", "garbage"):
        path.write_bytes(b"\x93 this is no weights file" * 50)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    elif kind == "no tensors":
        torch.save({"lr": 0.1}, path)
    elif kind == "safe cut":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "not finite":
        state["ln_final.weight"] = torch.full((64,), float("nan"))
        torch.save(state, path)
    elif kind == "other model":
        torch.save(tiny("tiny-rn").model.state_dict(), path)
    elif kind == "part":
        torch.save({"ln_final.weight": torch.ones(64)}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "fact"),
    [
        ("missing", ""),
        ("garbage", ""),
        ("empty", ""),
        ("safe garbage", ""),
        ("safe cut", ""),
        ("code", ""),
        ("no tensors", ""),
        ("not finite", "ln_final.weight"),
        ("other model", ""),
        ("part", ""),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bad_weights_file_is_one_clear_line(kind, fact, tmp_path):
    tiny("tiny-openai")
    path = bad_file(kind, tmp_path)
    with pytest.raises(UserError, match=str(path)) as error:
        load_backbone("tiny-openai", str(path))
    assert fact in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


def test_an_unknown_name_shows_the_nearest():
    with pytest.raises(UserError, match=r"'ViT-B-61'.*ViT-B-16"):
        load_backbone("ViT-B/61")
    with pytest.raises(UserError, match="shapes"):
        load_backbone("shape")


def test_an_unknown_tag_shows_the_known_ones():
    with pytest.raises(UserError, match=r"'openia'.*ViT-B-16.*openai, laion"):
        load_backbone("ViT-B/16", "openia")


@pytest.mark.parametrize("tag", ["openai", "laion2b_s34b_b88k"])
def test_no_network_says_how_to_get_the_file(tag, offline):
    with pytest.raises(UserError, match=r"MODEL\.BACKBONE\.WEIGHTS") as error:
        load_backbone("ViT-B/16", tag)
    assert "\n" not in str(error.value)


# The built-in model


@pytest.fixture
def built_in(tmp_path, monkeypatch):
    """A folder that stands for datasets/shapes, with the token embedding stored sparsely."""
    config = {**CONFIGS["tiny-vit"], "embed_dim": 48}
    (tmp_path / "clip.json").write_text(json.dumps(config))
    backbone = tiny("tiny-vit")
    state = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    ids = backbone.tokenizer(TEXTS).unique()
    state["token_embedding.rows"] = state.pop("token_embedding.weight")[ids].contiguous()
    state["token_embedding.ids"] = ids.int()
    save_file(state, tmp_path / "clip.safetensors")
    monkeypatch.setattr("dfzsl.trainers.clip.loading.BUILT_IN_FOLDER", tmp_path)
    yield tmp_path, state
    with contextlib.suppress(OSError):
        import_open_clip().add_model_config(ROOT / "datasets/shapes/clip.json")


def test_the_sparse_token_embedding_is_expanded(built_in):
    backbone = load_backbone("shapes")
    torch.testing.assert_close(backbone.encode_text(TEXTS), tiny("tiny-vit").encode_text(TEXTS))
    seen = built_in[1]["token_embedding.ids"].long()
    table = backbone.model.token_embedding.weight
    assert table.abs().sum(1).nonzero().flatten().tolist() == seen.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"token_embedding.ids": torch.tensor([-1, 2], dtype=torch.int32)},
        {"token_embedding.rows": torch.ones(2, 64)},
        {
            "token_embedding.ids": torch.tensor([49408], dtype=torch.int32),
            "token_embedding.rows": torch.ones(1, 64),
        },
    ],
)
def test_a_sparse_embedding_that_does_not_fit(built_in, change):
    folder, state = built_in
    save_file({**state, **change}, folder / "clip.safetensors")
    with pytest.raises(UserError, match=r"clip\.safetensors"):
        load_backbone("shapes")


# Features without a model


def test_features_stand_for_the_model():
    rows = F.normalize(torch.randn(2, 8), dim=1)
    backbone = FeatureBackbone(8, {"cat": rows[0], "dog": 3 * rows[1]})
    assert backbone.encode_image(rows) is rows
    torch.testing.assert_close(backbone.class_features(["dog", "cat"], ["a {}."]), rows[[1, 0]])
    for misuse, said in (
        (lambda: backbone.class_features(["bird"]), "'bird'"),
        (lambda: backbone.encode_image(torch.ones(2, 3, 8, 8)), "backbone"),
        (lambda: backbone.encode_image(torch.ones(2, 7)), "8"),
        (lambda: backbone.encode_text(["a cat"]), "text encoder"),
    ):
        with pytest.raises(UserError, match=said):
            misuse()


# The guard


def test_the_guard_gives_torchvision():
    module, _ = guard.import_torchvision()
    assert importlib.import_module("torchvision") is module


def test_the_guard_lets_other_errors_pass(monkeypatch):
    def broken(name):
        raise RuntimeError("something else")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="something else"):
        guard.import_torchvision.__wrapped__()
