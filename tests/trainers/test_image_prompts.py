"""MaPLe and PromptSRC against plain implementations of their papers' equations, and as runs on images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_features
from dassl.engine import TRAINER_REGISTRY
from fake_data import picture
from sweeps import planned_jobs
from torch import Tensor
from torch.nn import functional as F
from towers import tiny

from dfzsl import train
from dfzsl.io.results import VOLATILE_KEYS, read_results
from dfzsl.trainers.clip.deep import require_vision_transformer
from dfzsl.trainers.clip.loading import BUILT_IN_FOLDER, load_backbone
from dfzsl.trainers.maple import CoupledPromptLearner
from dfzsl.trainers.promptsrc import IndependentPromptLearner
from dfzsl.utils.errors import UserError

LEARNERS = [
    name
    for name in TRAINER_REGISTRY.registered_names()
    if getattr(TRAINER_REGISTRY.get(name), "image_prompts", False)
]
NAMES = ["cat", "dog", "red fox", "golden retriever"]


# The papers' encoders, by their definition


def norm(layer, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return (
        centered / (centered.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias
    )


def attention(layer, x: Tensor, causal: bool) -> Tensor:
    n, length, width = x.shape
    heads = layer.num_heads
    q, k, v = (
        part.reshape(n, length, heads, width // heads).transpose(1, 2)
        for part in (x @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, dim=-1)
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(width // heads)
    if causal:
        later = torch.arange(length)[None] > torch.arange(length)[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)
    return mixed @ layer.out_proj.weight.T + layer.out_proj.bias


def block(layer, x: Tensor, causal: bool = False) -> Tensor:
    x = x + attention(layer.attn, norm(layer.ln_1, x), causal)
    fc, projection = layer.mlp.c_fc, layer.mlp.c_proj
    hidden = norm(layer.ln_2, x) @ fc.weight.T + fc.bias
    return x + (hidden * torch.sigmoid(1.702 * hidden)) @ projection.weight.T + projection.bias


def plain_text(model, tokenizer, sentences: list[str], prompts: list[Tensor]) -> Tensor:
    """g~ of whole sentences whose first words after the start are P_0, in layer i P_i."""
    ids = tokenizer(sentences)
    x = model.token_embedding(ids)
    for layer, resblock in enumerate(model.transformer.resblocks):
        if layer < len(prompts):
            m = len(prompts[layer])
            x = torch.stack([torch.cat([row[:1], prompts[layer], row[1 + m :]]) for row in x])
        if layer == 0:
            x = x + model.positional_embedding
        x = block(resblock, x, causal=True)
    ends = torch.stack([row[int(of.argmax())] for row, of in zip(x, ids, strict=True)])
    return F.normalize(norm(model.ln_final, ends) @ model.text_projection, dim=1)


def plain_image(visual, images: Tensor, prompts: list[Tensor]) -> Tensor:
    """f~: [class, patches, P_0] through the tower, in layer i P_i in the place of what became of P_i-1."""
    size = visual.conv1.kernel_size[0]
    patches = F.unfold(images, size, stride=size).transpose(1, 2) @ visual.conv1.weight.flatten(1).T
    x = torch.cat([visual.class_embedding.expand(len(x := patches), 1, -1), x], dim=1)
    x = x + visual.positional_embedding
    own = x.shape[1]
    for layer, resblock in enumerate(visual.transformer.resblocks):
        if layer < len(prompts):
            x = torch.stack([torch.cat([row[:own], prompts[layer]]) for row in x])
        if layer == 0:
            x = norm(visual.ln_pre, x)
        x = block(resblock, x)
    return F.normalize(norm(visual.ln_post, x[:, 0]) @ visual.proj, dim=1)


@pytest.fixture
def backbone():
    return tiny("tiny-deep")


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def disturbed(learner):
    """Parameters as they may be after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return learner


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_maple_is_the_papers_formula(depth, backbone):
    learner = disturbed(CoupledPromptLearner(backbone, NAMES, 2, "a photo of a", depth))
    model = backbone.model
    text_prompts = [learner.ctx, *learner.deep]
    image_prompts = [p @ f.weight.T + f.bias for p, f in zip(text_prompts, learner.couplings, strict=True)]
    assert len(text_prompts) == min(depth, 3)  # the text tower has three layers
    text = plain_text(model, backbone.tokenizer, [f"a photo of a {name}." for name in NAMES], text_prompts)
    image = plain_image(model.visual, images(), image_prompts)
    torch.testing.assert_close(learner(), text, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learner.encode_image(images()), image, rtol=1e-4, atol=1e-4)
    labels = torch.arange(5) % 4
    scale = model.logit_scale.exp()
    actual = F.cross_entropy(scale * learner.encode_image(images()) @ learner().T, labels)
    papers = F.cross_entropy(scale * image @ text.T, labels)
    parameters = list(learner.parameters())
    expected = torch.autograd.grad(papers, parameters)
    for name, one, other in zip(
        dict(learner.named_parameters()), torch.autograd.grad(actual, parameters), expected, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
        assert other.abs().max() > 0, name


def test_maple_sets_out_from_the_words_it_does_not_learn(backbone):
    """One layer deep, its text is at first zero-shot CLIP's."""
    learner = CoupledPromptLearner(backbone, NAMES, 2, "a photo of a", 1)
    text = backbone.class_features(NAMES, ["a photo of a {}."])
    torch.testing.assert_close(learner(), text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        learner.text_features(["owl"]), backbone.class_features(["owl"], ["a photo of a {}."])
    )
    assert learner.fixed_words == "of a"


@pytest.mark.parametrize(("depth", "depth_vision"), [(1, 3), (9, 9), (2, 1)])
def test_promptsrc_prompts_each_encoder_by_itself(depth, depth_vision, backbone):
    learner = disturbed(IndependentPromptLearner(backbone, NAMES, 4, "a photo of a", depth, 3, depth_vision))
    model = backbone.model
    text_prompts = [learner.ctx, *learner.deep]
    assert (len(text_prompts), len(learner.image_ctx)) == (min(depth, 3), min(depth_vision, 4))
    text = plain_text(model, backbone.tokenizer, [f"a photo of a {name}." for name in NAMES], text_prompts)
    torch.testing.assert_close(learner(), text, rtol=1e-4, atol=1e-4)
    image = plain_image(model.visual, images(), list(learner.image_ctx))
    torch.testing.assert_close(learner.encode_image(images()), image, rtol=1e-4, atol=1e-4)


def test_many_classes_in_chunks_have_the_same_gradients(backbone, monkeypatch):
    """Where activations are not kept but computed again, the deep tokens' share is too."""
    gradients = []
    for rows in (8192, 20):
        monkeypatch.setattr(backbone, "chunk_tokens", rows)
        torch.manual_seed(0)
        learner = CoupledPromptLearner(backbone, NAMES, 2, "a photo of a", 3)
        assert (len(learner.prompts.blocks) > 1) == (rows == 20)
        weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(2))
        gradients.append(torch.autograd.grad((learner() * weight).sum(), [learner.ctx, *learner.deep]))
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)


def test_without_prompts_it_is_the_frozen_encoder(backbone):
    learner = IndependentPromptLearner(backbone, NAMES, 4, "a photo of a", 1, 2, 0)
    torch.testing.assert_close(learner.encode_image(images()), backbone.encode_image(images()))


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for part, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(NAMES):
            for number in range(count):
                picture(root / part / name / f"{number}.jpg", label, number + len(part))
    tiny("tiny-deep")
    return root


def words(trainer: str, data: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--trainer", trainer, "--root", str(data), "--seed", "1", "--output-dir", str(output)),
        *("--dataset-config-file", str(ROOT / "configs/datasets/folder.yaml")),
        *("--config-file", str(ROOT / f"configs/trainers/{trainer}/shapes.yaml"), *more),
        *("MODEL.BACKBONE.NAME", "tiny-deep", "MODEL.BACKBONE.WEIGHTS", "random", "OPTIM.LR", "0.01"),
        *("DATASET.SUBSAMPLE_CLASSES", "new" if "--eval-only" in more else "base"),
        *(
            "INPUT.TRANSFORMS",
            "['random_flip', 'normalize']",
            "OPTIM.MAX_EPOCH",
            "3",
            "TRAIN.CHECKPOINT_FREQ",
            "1",
        ),
    ]


def built(argv: list[str]):
    """The trainer of a command line, built and not trained."""
    cfg = train.setup_cfg(train.parser().parse_args(argv))
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME)(cfg)


def learned(folder: Path, epoch: int) -> dict[str, Tensor]:
    state = torch.load(folder / f"prompt_learner/model.pth.tar-{epoch}", weights_only=False)["state_dict"]
    return {name: value for name, value in state.items() if not name.startswith("token_")}


def test_both_methods_are_here():
    assert LEARNERS == ["MaPLe", "PromptSRC"]


def test_a_step_of_promptsrc_is_the_papers_loss(folder, tmp_path):
    run = built([*words("PromptSRC", folder, tmp_path), "TEXT.PROMPTS", "a sketch of a {}."])
    learner, backbone = disturbed(run.learner), run.backbone
    model, names, x, label = backbone.model, run.classnames, images(4), torch.tensor([0, 1, 1, 0])
    text = plain_text(
        model, backbone.tokenizer, [f"a photo of a {name}." for name in names], [learner.ctx, *learner.deep]
    )
    image = plain_image(model.visual, x, list(learner.image_ctx))
    with torch.no_grad():
        fixed_text = plain_text(model, backbone.tokenizer, [f"a sketch of a {name}." for name in names], [])
        fixed_image = plain_image(model.visual, x, [])
    scale = model.logit_scale.exp()
    logits, fixed_logits = scale * image @ text.T, scale * fixed_image @ fixed_text.T
    p, q = logits.softmax(1), fixed_logits.softmax(1)
    loss = -p[torch.arange(4), label].log().mean()
    loss = loss + 25 * (text - fixed_text).abs().mean() + 10 * (image - fixed_image).abs().mean()
    loss = loss + (q * (q.log() - p.log())).sum() / q.numel()
    expected = torch.autograd.grad(loss, list(learner.parameters()))
    run.optim.param_groups[0]["lr"] = 0.0
    run.batch_idx, run.num_batches = 0, 10
    summary = run.forward_backward({"img": x, "label": label})
    assert summary["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for parameter, gradient in zip(learner.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_promptsrc_without_a_text_of_its_own_is_held_near_the_ensemble(folder, tmp_path):
    run = built(words("PromptSRC", folder, tmp_path))
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    ensemble = run.backbone.class_features(
        run.classnames, [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    )
    torch.testing.assert_close(run.fixed_text, ensemble, rtol=1e-4, atol=1e-5)


def test_promptsrc_ends_with_the_gaussian_mean_of_its_epochs(folder, tmp_path, monkeypatch):
    seen = []
    accumulate = IndependentPromptLearner.accumulate

    def noted(self, weight):
        seen.append([parameter.detach().clone() for parameter in self.parameters()])
        accumulate(self, weight)

    monkeypatch.setattr(IndependentPromptLearner, "accumulate", noted)
    more = ("TRAINER.PROMPTSRC.GPA_MEAN", "2", "TRAINER.PROMPTSRC.GPA_STD", "1")
    train.main([*words("PromptSRC", folder, tmp_path), *more])
    assert len(seen) == 3
    density = [math.exp(-((epoch - 2) ** 2) / 2) for epoch in (1, 2, 3)]
    weights = [value / sum(density) for value in density]
    state = learned(tmp_path, 3)
    names = [name for name in state if name != "aggregate"]
    for place, name in enumerate(names):
        mean = sum(weight * parameters[place] for weight, parameters in zip(weights, seen, strict=True))
        torch.testing.assert_close(state[name], mean, rtol=1e-5, atol=1e-6)
        assert not torch.equal(state[name], seen[-1][place])


@pytest.mark.parametrize("trainer", LEARNERS)
def test_only_prompts_are_learned_and_they_carry_over_to_new_classes(trainer, folder, tmp_path):
    before = {name: value.clone() for name, value in tiny("tiny-deep").model.state_dict().items()}
    run = built(words(trainer, folder, tmp_path / "built"))
    start = {name: value.clone() for name, value in run.learner.state_dict().items()}
    train.main(words(trainer, folder, tmp_path / "run"))
    results = read_results(tmp_path / "run/results.json")
    assert results["images_used"] == 12
    assert results["trained_parameters"] == sum(p.numel() for p in run.learner.parameters())
    state = learned(tmp_path / "run", 3)
    assert all(not torch.equal(state[name], start[name]) for name in state)
    after = built(words(trainer, folder, tmp_path / "again"))
    after.load_model(str(tmp_path / "run"))
    assert all(torch.equal(value, before[name]) for name, value in after.backbone.model.state_dict().items())
    train.main(words(trainer, folder, tmp_path / "new", "--eval-only", "--model-dir", str(tmp_path / "run")))
    rows = read_results(tmp_path / "new/results.json")["per_class"]
    assert [(row["class"], row["total"]) for row in rows] == [("golden retriever", 3), ("red fox", 3)]


@pytest.mark.parametrize("trainer", LEARNERS)
def test_an_interrupted_run_ends_as_one_that_was_not(trainer, folder, tmp_path, monkeypatch):
    train.main(words(trainer, folder, tmp_path / "whole"))
    save = TRAINER_REGISTRY.get(trainer).save_model

    def cut(self, epoch, *rest, **more):
        save(self, epoch, *rest, **more)
        if epoch == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TRAINER_REGISTRY.get(trainer), "save_model", cut)
        train.main(words(trainer, folder, tmp_path / "cut"))
    train.main(words(trainer, folder, tmp_path / "cut"))
    whole, resumed = learned(tmp_path / "whole", 3), learned(tmp_path / "cut", 3)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    one, two = (read_results(tmp_path / name / "results.json") for name in ("whole", "cut"))
    for key in ("accuracy", "per_class", "curves"):
        assert one[key] == two[key]
        assert key not in VOLATILE_KEYS


# What is refused, in one line


@pytest.mark.parametrize("trainer", LEARNERS)
def test_data_without_images_or_a_vision_transformer_are_refused(trainer, folder, tmp_path):
    given = words(trainer, folder, tmp_path / "run")
    (tmp_path / "teacher.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"{trainer}.*TEACHER"):
        train.main([*given, "TEACHER.FILE", str(tmp_path / "teacher.safetensors")])
    with pytest.raises(UserError, match=r"shapes.*ModifiedResNet"):
        built([*given, "MODEL.BACKBONE.NAME", "shapes", "MODEL.BACKBONE.WEIGHTS", "openai"])
    features = words(trainer, write_features(tmp_path / "a.npz", dim=48), tmp_path / "run")
    features[features.index("--dataset-config-file") + 1] = str(ROOT / "configs/datasets/features.yaml")
    with pytest.raises(UserError, match="features"):
        built(features)
    with pytest.raises(UserError, match=trainer):
        planned_jobs(["base2new", "--methods", f"{trainer}@virtual", "shapes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("TRAINER.MAPLE.N_CTX", "5"), "5"),
        (("TRAINER.MAPLE.PROMPT_DEPTH", "0"), "PROMPT_DEPTH"),
        (("TRAINER.MAPLE.CTX_INIT", "photographicallyness of a"), "2"),
    ],
)
def test_a_bad_setting_is_one_clear_line(change, message, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        built([*words("MaPLe", folder, tmp_path / "run"), *change])


def test_a_text_tower_that_is_read_elsewhere_is_refused():
    with pytest.raises(UserError, match="causal"):
        CoupledPromptLearner(tiny("tiny-last"), NAMES, 2, "a photo of a", 9)
    require_vision_transformer(tiny("tiny-last"))


# In comparisons, and on Shapes


def test_a_comparison_has_them_where_it_is_asked_for_them():
    def methods(*words: str) -> set[str]:
        given = ["base2new", "--methods", "all", *words, "dtd", "1"]
        return {job.method.name for job in planned_jobs(given)}

    assert methods("--image-prompts") - methods() == set(LEARNERS)


@pytest.mark.parametrize("trainer", LEARNERS)
def test_their_recipe_for_the_built_in_world_brings_a_vision_transformer(trainer):
    (job,) = planned_jobs(["base2new", "--methods", trainer, "shapes", "1"])
    for _, arguments in job.parts():
        cfg = train.setup_cfg(train.parser().parse_args(arguments))
        assert cfg.MODEL.BACKBONE.NAME == "shapes-vit"
        assert cfg.INPUT.SIZE == (64, 64)


def test_the_built_in_vision_transformer_has_the_built_in_text_tower():
    assert (BUILT_IN_FOLDER / "vit.safetensors").stat().st_size < 4e6
    one, other = load_backbone("shapes"), load_backbone("shapes-vit")
    assert torch.equal(one.encode_text(["a red star"]), other.encode_text(["a red star"]))
    assert other.identity.startswith("shapes-vit (")
    require_vision_transformer(other)


@pytest.mark.slow
def test_the_built_in_vision_transformer_sees_what_the_first_tower_sees():
    from dfzsl.datasets.shapes.train_clip import MEAN, STD, CaptionedImages

    examples = CaptionedImages(2, 0, 200)  # none that it was trained on
    x = (torch.stack([examples[i][0] for i in range(200)]) / 255 - MEAN) / STD
    one, other = (load_backbone(name).encode_image(x) for name in ("shapes", "shapes-vit"))
    assert (one * other).sum(1).mean() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("trainer", LEARNERS)
def test_it_is_above_zero_shot_on_the_base_classes_of_the_built_in_world(trainer, tmp_path):
    """With the settings of the shipped recipe, which are the paper's."""
    given = [
        *("--root", str(tmp_path / "data"), "--seed", "1"),
        *("--dataset-config-file", str(ROOT / "configs/datasets/shapes.yaml")),
        *("--config-file", str(ROOT / f"configs/trainers/{trainer}/shapes.yaml")),
        *("DATASET.SUBSAMPLE_CLASSES", "base", "DATASET.NUM_SHOTS", "16"),
    ]
    train.main(["--trainer", "ZeroshotCLIP", "--output-dir", str(tmp_path / "zero"), "--eval-only", *given])
    train.main(["--trainer", trainer, "--output-dir", str(tmp_path / "run"), *given])
    zero, run = (read_results(tmp_path / name / "results.json") for name in ("zero", "run"))
    assert run["accuracy"] > zero["accuracy"] + 5
