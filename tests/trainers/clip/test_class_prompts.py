"""Class prompts: templates, the ensemble, sentences, and all of them with a tuned context."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dfzsl
from dfzsl import train
from dfzsl.configs import CONFIGS
from dfzsl.io.results import read_results
from dfzsl.trainers.clip.backbone import FeatureBackbone
from dfzsl.trainers.clip.class_prompts import ClassPrompts
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import UserError

NAMES = ["red star", "blue_circle", "green square"]
SAID = {
    "Red star": ["a red star.", "five red points around a center."],
    "blue circle": "a round blue thing.",
    "green square": ["four green sides."],
    "yellow ring": ["a yellow ring, hollow inside."],
}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("shapes")


@pytest.fixture
def sentences(tmp_path) -> str:
    (tmp_path / "said.json").write_text(json.dumps(SAID))
    return str(tmp_path / "said.json")


def mean(backbone, texts: list[str]) -> torch.Tensor:
    return F.normalize(backbone.encode_text(texts).mean(0), dim=0)


def test_a_template(backbone):
    made = ClassPrompts.parse("a drawing of a {}!").features(backbone, NAMES)
    texts = ["a drawing of a red star!", "a drawing of a blue circle!", "a drawing of a green square!"]
    assert torch.allclose(made, backbone.encode_text(texts), atol=1e-6)
    assert torch.equal(
        ClassPrompts.parse("").features(backbone, NAMES), backbone.class_features(NAMES, ["a photo of a {}."])
    )


def test_the_ensemble_is_clips_eighty(backbone):
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    texts = ClassPrompts.parse("ensemble")
    assert len(texts.templates) == 80
    expected = mean(backbone, [template("red star") for template in OPENAI_IMAGENET_TEMPLATES])
    assert torch.allclose(texts.features(backbone, NAMES)[0], expected, atol=1e-5)


def test_sentences(backbone, sentences):
    made = ClassPrompts.parse(sentences).features(backbone, NAMES)
    assert torch.allclose(made[0], mean(backbone, SAID["Red star"]), atol=1e-6)
    assert torch.allclose(made[1], mean(backbone, [SAID["blue circle"]]), atol=1e-6)
    with pytest.raises(UserError, match="plaid cat, plaid dog"):
        ClassPrompts.parse(sentences).features(backbone, ["plaid cat", "red star", "plaid dog"])


def test_many_texts_are_encoded_once(backbone, monkeypatch):
    names = [f"{color} star" for color in ("red", "blue", "green", "yellow", "white", "black", "pink")]
    first = ClassPrompts.parse("ensemble").features(backbone, names)
    monkeypatch.setattr(type(backbone), "encode_text", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(ClassPrompts.parse("ensemble").features(backbone, names), first)


def test_a_tuned_context_adds_the_offset_of_the_prompts(backbone, sentences):
    start = backbone.tokenize(["a photo of a"])[0, 1:5]
    words = backbone.text_tower.embed(start).detach()
    untuned = ClassPrompts.parse(sentences)
    context = words + 0.05 * torch.randn(words.shape, generator=torch.Generator().manual_seed(0))
    for ctx, said in ((words, untuned), (context, untuned), (context, ClassPrompts.parse(""))):
        texts = ClassPrompts(said.templates, said.sentences, said.source, ctx, "a photo of a")
        made = texts.features(backbone, NAMES)
        in_context = ClassPrompts(("{}",), {}, "", ctx).features(backbone, NAMES)
        if not said.source:
            assert torch.equal(made, in_context)
            continue
        first = backbone.class_features(NAMES, ["a photo of a {}."])
        assert torch.allclose(
            made, F.normalize(in_context + untuned.features(backbone, NAMES) - first, dim=1), atol=1e-6
        )
        if ctx is words:  # untuned, nothing but the texts is left
            assert torch.allclose(made, untuned.features(backbone, NAMES), atol=1e-5)


@pytest.mark.parametrize("prompts", ["a photo", "{} and {}", "{0}", "{name}", "none.json"])
def test_mistakes(prompts):
    with pytest.raises(UserError):
        ClassPrompts.parse(prompts)


@pytest.mark.parametrize(
    "content", ["[1]", "{}", '{"a": []}', '{"a": [1]}', '{"a": [""]}', '{"a": {"b": "c"}}', "nonsense"]
)
def test_files_that_are_none(tmp_path, content, backbone):
    (tmp_path / "said.json").write_text(content)
    with pytest.raises(UserError):
        ClassPrompts.parse(str(tmp_path / "said.json")).features(backbone, ["a"])


def test_features_alone_have_no_texts(sentences):
    backbone = FeatureBackbone(4, {"a": torch.ones(4)})
    with pytest.raises(UserError, match="text encoder"):
        ClassPrompts.parse("ensemble").features(backbone, ["a"])
    assert torch.allclose(ClassPrompts.parse("").features(backbone, ["a"]), torch.full((1, 4), 0.5))


@pytest.fixture
def run(tmp_path, backbone):
    """run(trainer, KEY, VALUE, ...) on three base classes and a new one, each lying at its own sentences."""
    names = [*NAMES, "yellow ring"]
    said = {name.casefold(): [texts] if isinstance(texts, str) else texts for name, texts in SAID.items()}
    x = torch.stack([mean(backbone, said[name.replace("_", " ")]) for name in names]).numpy()
    np.savez(
        tmp_path / "f.npz",
        x_test=x,
        y_test=np.arange(4),
        x_val=x,
        y_val=np.arange(4),
        classnames=names,
        new=[3],
    )
    rows = torch.from_numpy(x[:3])
    Teacher(rows - rows.mean(0), NAMES).save(tmp_path / "t.safetensors")

    def call(trainer: str, *settings: str):
        words = ["--trainer", trainer, "--root", str(tmp_path / "f.npz"), "--seed", "1"]
        words += ["--eval-only"] if trainer in ("ZeroshotCLIP", "TextTeacherMix") else []
        words += ["--dataset-config-file", str(CONFIGS / "datasets/features.yaml"), "--backbone", "shapes"]
        words += ["--config-file", str(CONFIGS / "trainers/DFZSL/dfzsl.yaml")]
        words += ["--output-dir", str(tmp_path / trainer)]
        train.main([*words, "OPTIM.MAX_EPOCH", "1", "RECOVERY.NUM_PER_CLASS", "8", *settings])
        return tmp_path / trainer

    return call


@pytest.mark.parametrize("trainer", ["ZeroshotCLIP", "TextTeacherMix", "DFZSL", "FLPT", "KgCoOp"])
def test_trainers_use_the_prompts(run, tmp_path, sentences, trainer, monkeypatch):
    """Where each class's features lie at its own sentences, a trainer that uses them is right."""
    sources = []
    encode_plain = ClassPrompts.encode_plain
    monkeypatch.setattr(
        ClassPrompts,
        "encode_plain",
        lambda self, *of: (sources.append(self.source), encode_plain(self, *of))[1],
    )
    classes = "all" if trainer == "ZeroshotCLIP" else "base"
    given = ["TEXT.PROMPTS", sentences, "DATASET.SUBSAMPLE_CLASSES", classes]
    if trainer != "ZeroshotCLIP":
        given += ["TEACHER.FILE", str(tmp_path / "t.safetensors")]
    folder = run(trainer, *given)
    assert "sentences" in sources
    assert read_results(folder / "results.json")["accuracy"] == 100


def test_names_added_later(run, tmp_path, sentences, backbone):
    """The classifier keeps its templates; sentences are given again for new classes, and named if missing."""
    made = dfzsl.build(
        tmp_path / "t.safetensors",
        ["yellow ring"],
        "shapes",
        text="a drawing of a {}.",
        settings=("OPTIM.MAX_EPOCH", "1", "GENERATOR.NAME", "none", "GENERATOR.CALIBRATE", "False"),
    )
    made.save(tmp_path / "c.safetensors")
    known = Classifier.load(tmp_path / "c.safetensors")
    assert (known.prompts.source, known.prompts.context_init) == ("a drawing of a {}.", "a photo of a")
    added = known.add(["black cross"], backbone)
    expected = known.prompts.features(backbone, ["black cross"])
    assert torch.allclose(added.weight[-1:], expected, atol=1e-6)
    said = known.add(
        ["yellow  Ring 2"], backbone, ClassPrompts((), {"yellow ring 2": ["a ring."]}, "sentences")
    )
    assert said.prompts.context is not None and said.prompts.source == "sentences"
    said.save(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="black cross"):
        Classifier.load(tmp_path / "c.safetensors").add(["black cross"], backbone)
