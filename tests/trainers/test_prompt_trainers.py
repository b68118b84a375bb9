from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, write_features
from dassl.engine import TRAINER_REGISTRY
from draws import directions
from fake_data import picture
from torch.nn import functional as F
from towers import plain_text_features, tiny

from dfzsl import train
from dfzsl.io.results import read_results
from dfzsl.trainers.clip.learner import PromptLearner
from dfzsl.trainers.cocoop import ConditionalCLIP, ConditionalPromptLearner
from dfzsl.trainers.coop import CoOp, PromptedCLIP
from dfzsl.trainers.flpt import FLPT, FeatureLanguagePromptLearner, ShiftedCLIP
from dfzsl.trainers.kgcoop import KgCoOp
from dfzsl.trainers.prograd import ProGrad, project
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.dassl_plugin import DEFAULTS
from dfzsl.utils.errors import UserError

LEARNERS = ["CoOp", "CoCoOp", "KgCoOp", "ProGrad", "FLPT"]
NAMES = ["cat", "dog", "red fox", "golden retriever"]
ANIMALS = ["cat", "dog", "red fox", "grey wolf", "owl", "snow leopard"]


@pytest.fixture
def backbone():
    return tiny("tiny-vit")


@pytest.fixture
def features(tmp_path, backbone) -> Path:
    """A feature file of the small CLIP's dimension, its classes some way off their text features."""
    text = backbone.class_features(ANIMALS, ["a photo of a {}."])
    means = F.normalize(text + 1.5 * directions(len(ANIMALS), 48), dim=1)
    arrays: dict[str, np.ndarray] = {"classnames": np.array(ANIMALS)}
    for part, seed in (("train", 1), ("test", 2)):
        labels = torch.arange(len(ANIMALS)).repeat_interleave(16)
        x = F.normalize(means[labels] + 0.7 * directions(len(labels), 48, seed=seed), dim=1)
        arrays[f"x_{part}"], arrays[f"y_{part}"] = x.numpy(), labels.numpy()
    np.savez(tmp_path / "animals.npz", **arrays)  # type: ignore[arg-type]
    return tmp_path / "animals.npz"


def words(trainer: str, data: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--trainer", trainer, "--root", str(data), "--seed", "1", "--output-dir", str(output)),
        *("--dataset-config-file", str(ROOT / "configs/datasets/features.yaml")),
        *("--config-file", str(ROOT / f"configs/trainers/{trainer}/shapes.yaml"), *more),
        *("MODEL.BACKBONE.NAME", "tiny-vit", "MODEL.BACKBONE.WEIGHTS", "random"),
        *("DATASET.SUBSAMPLE_CLASSES", "new" if "--eval-only" in more else "base"),
        *("OPTIM.MAX_EPOCH", "3", "DATALOADER.TRAIN_X.BATCH_SIZE", "8"),
    ]


# What the papers define


def test_coop_is_cosine_with_the_learned_prompt(backbone):
    model = PromptedCLIP(PromptLearner(backbone, NAMES, n_ctx=6), backbone.logit_scale)
    x = directions(5, 48)
    text = plain_text_features(backbone, NAMES, model.prompt_learner.ctx, "end")
    expected = backbone.model.logit_scale.exp() * x @ text.T
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_cocoop_makes_one_prompt_an_image(backbone):
    learner = ConditionalPromptLearner(backbone, NAMES, n_ctx=4, ctx_init="a photo of a")
    model = ConditionalCLIP(learner, backbone.logit_scale)
    x = directions(5, 48)
    net = learner.meta_net
    rows = []
    for image in x:
        pi = net.linear2(torch.relu(net.linear1(image)))
        text = plain_text_features(backbone, NAMES, learner.ctx + pi, "end")
        rows.append(backbone.model.logit_scale.exp() * image @ text.T)
    torch.testing.assert_close(model(x), torch.stack(rows), rtol=1e-4, atol=1e-4)
    assert net.linear1.out_features == 48 // 16


@pytest.mark.parametrize("trainer", [KgCoOp, ProGrad])
def test_the_step_follows_the_papers_gradient(trainer, features, tmp_path):
    more = ("LOSS.LAMBDA", "0.8", "LOSS.T", "1.5") if trainer is ProGrad else ("TRAINER.KGCOOP.W", "3.0")
    # A random context: at "a photo of a" the two sides of the distillation would be the same.
    run = built([*words(trainer.__name__, features, tmp_path / "run", *more), "TRAINER.COOP.CTX_INIT", ""])
    x, label = directions(8, 48), torch.arange(8) % 3
    ctx = run.model.prompt_learner.ctx
    names, scale = ANIMALS[:3], run.backbone.logit_scale
    text = plain_text_features(run.backbone, names, ctx, "end")
    fixed = run.backbone.class_features(names, ["a photo of a {}."])
    logits = scale * x @ text.T
    ce = F.cross_entropy(logits, label)
    if trainer is KgCoOp:
        (expected,) = torch.autograd.grad(ce + 3.0 * (text - fixed).square().sum(1).mean() / 2, ctx)
    else:
        teacher = (scale * x @ fixed.T / 1.5).softmax(1)
        kl = -(teacher * (logits / 1.5).log_softmax(1)).sum(1).mean() * 1.5**2
        g, h = (torch.autograd.grad(loss, ctx, retain_graph=True)[0] for loss in (ce, kl))
        against = (g * h).sum() < 0
        expected = g - 0.8 * (g * h).sum() / h.square().sum() * h if against else g
    run.optim.param_groups[0]["lr"] = 0.0
    summary = run.step(x, label)
    assert set(summary) == {"loss", "acc"}
    torch.testing.assert_close(ctx.grad, expected, rtol=1e-3, atol=1e-5)


def test_the_projection_removes_only_what_points_against():
    g, h = torch.tensor([[1.0, 1.0]]), torch.tensor([[-2.0, 0.0]])
    torch.testing.assert_close(project(g, h, 1.0), torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(project(g, h, 0.5), torch.tensor([[0.5, 1.0]]))
    torch.testing.assert_close(project(g, -h, 1.0), g)
    torch.testing.assert_close(project(g, torch.zeros(1, 2), 1.0), g)


def test_flpt_sets_out_from_clip_and_shifts_images(backbone):
    learner = FeatureLanguagePromptLearner(backbone, NAMES, 4, "a photo of a", residual_weight=0.5)
    model = ShiftedCLIP(learner, backbone.logit_scale)
    x = directions(5, 48)
    zero_shot = backbone.logit_scale * x @ backbone.class_features(NAMES, ["a photo of a {}."]).T
    torch.testing.assert_close(model(x), zero_shot, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        learner.mlp.c_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
        learner.mlp.c_proj.bias.fill_(0.1)
    fc, proj = learner.mlp.c_fc, learner.mlp.c_proj
    hidden = learner.ctx @ fc.weight.T + fc.bias
    shift = 0.5 * (hidden * torch.sigmoid(1.702 * hidden) @ proj.weight.T + proj.bias).mean(0)
    assert fc.out_features == 4 * 64
    torch.testing.assert_close(learner.shift(), shift)
    text = plain_text_features(backbone, NAMES, learner.ctx, "end")
    expected = backbone.logit_scale * F.normalize(x + shift, dim=1) @ text.T
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


# Runs


def built(argv: list[str]):
    """The trainer of a command line, built and not trained."""
    cfg = train.setup_cfg(train.parser().parse_args(argv))
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME)(cfg)


@pytest.mark.parametrize("trainer", LEARNERS)
def test_training_helps_and_carries_over_to_new_classes(trainer, features, tmp_path):
    before = built(words(trainer, features, tmp_path / "before", "--no-train"))
    start = before.test()
    train.main(words(trainer, features, tmp_path / "run", "OPTIM.LR", "0.02"))
    assert read_results(tmp_path / "run/results.json")["accuracy"] > start
    state = torch.load(tmp_path / "run/prompt_learner/model.pth.tar-3", weights_only=False)["state_dict"]
    own = {"CoCoOp": {"meta_net.linear1.weight", "meta_net.linear2.bias"}, "FLPT": {"mlp.c_proj.weight"}}
    assert {"ctx", "token_prefix", "token_suffix", *own.get(trainer, set())} <= set(state)
    train.main(
        words(trainer, features, tmp_path / "new", "--eval-only", "--model-dir", str(tmp_path / "run"))
    )
    names = [row["class"] for row in read_results(tmp_path / "new/results.json")["per_class"]]
    assert names == ANIMALS[3:]


@pytest.mark.parametrize("trainer", ["CoOp", "FLPT"])
def test_the_same_seed_gives_the_same_context(trainer, features, tmp_path):
    contexts = []
    for name in ("one", "two"):
        train.main(words(trainer, features, tmp_path / name, "TRAINER.COOP.CTX_INIT", ""))
        path = tmp_path / name / "prompt_learner/model.pth.tar-3"
        contexts.append(torch.load(path, weights_only=False)["state_dict"]["ctx"])
    assert torch.equal(*contexts)


@pytest.mark.parametrize("trainer", ["CoOp", "CoCoOp", "FLPT"])
def test_prompts_are_learned_from_virtual_features(trainer, features, tmp_path):
    owner = words("TeacherZeroshot", features, tmp_path / "owner")
    owner[owner.index("--config-file") + 1] = str(ROOT / "configs/trainers/CoOp/shapes.yaml")
    train.main(owner)
    teacher = str(tmp_path / "owner/teacher.safetensors")
    train.main(words(trainer, features, tmp_path / "client", "TEACHER.FILE", teacher))
    results = read_results(tmp_path / "client/results.json")
    assert results["images_used"] == 0 < results["queries"]


def test_flpt_hands_over_any_classes_and_its_shift(features, tmp_path):
    run: FLPT = built(words("FLPT", features, tmp_path / "run"))
    run.step(directions(8, 48), torch.arange(8) % 3)
    text, shift = run.text_features(["owl", "a class of its own"]), run.shift()
    assert text.shape == (2, 48) and shift.shape == (48,)
    assert not text.requires_grad and shift.abs().max() > 0
    expected = plain_text_features(run.backbone, ["owl"], run.model.prompt_learner.ctx, "end")
    torch.testing.assert_close(text[:1], expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainer", ["ZeroshotCLIP", "ZeroshotCLIP2"])
def test_zero_shot_is_cosine_with_the_template(trainer, features, tmp_path, backbone):
    run = built(words(trainer, features, tmp_path / "run"))
    templates = run.dm.dataset.templates if trainer.endswith("2") else ["a photo of a {}."]
    x = directions(4, 48)
    expected = backbone.logit_scale * x @ backbone.class_features(ANIMALS[:3], templates).T
    torch.testing.assert_close(run.model_inference(x), expected)
    assert len(templates) == (8 if trainer.endswith("2") else 1)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_free_baselines_hear_the_teachers_intercept(features, tmp_path, backbone, normalized):
    rows, bias = 3 * directions(3, 48, seed=5), torch.tensor([0.0, 0.3, -0.2])
    teacher = Teacher(rows, ANIMALS[:3], normalized=normalized, bias=bias)
    teacher.save(tmp_path / "owner/teacher.safetensors")
    x = directions(40, 48)

    def run(trainer: str, *more: str):
        given = words(trainer, features, tmp_path / trainer, *more)
        given[given.index("--config-file") + 1] = str(ROOT / "configs/trainers/CoOp/shapes.yaml")
        return built(given)

    owner = run("TeacherZeroshot")
    owner.load_model(str(tmp_path / "owner"))
    assert torch.equal(owner.model_inference(x).argmax(1), teacher.logits(x).argmax(1))
    file = str(tmp_path / "owner/teacher.safetensors")
    mix = run("TextTeacherMix", "TEACHER.FILE", file)
    text = backbone.class_features(ANIMALS[:3], ["a photo of a {}."])
    scale = 1.0 if normalized else 3.0
    mixed = 0.7 * text + 0.3 * rows / 3
    expected = (x @ mixed.T + 0.3 * bias / scale) / mixed.norm(dim=1)
    torch.testing.assert_close(mix.model_inference(x), backbone.logit_scale * expected, rtol=1e-4, atol=1e-4)


def test_images_and_their_features_make_the_same_step(features, tmp_path):
    run = built(words("CoOp", features, tmp_path / "run"))
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 0])
    run.optim.param_groups[0]["lr"] = 0.0
    run.batch_idx, run.num_batches = 0, 10
    from_images = run.forward_backward({"img": images, "label": labels})
    encoded = run.forward_backward({"img": run.backbone.encode_image(images), "label": labels})
    assert from_images == pytest.approx(encoded)


@pytest.mark.usefixtures("backbone")
@pytest.mark.parametrize("transforms", ["['normalize']", "['random_flip', 'normalize']"])
def test_a_folder_of_images_trains_augmented_or_not(transforms, tmp_path):
    for part in ("train", "test"):
        for number, name in enumerate(ANIMALS[:4] * 2):
            picture(tmp_path / "pictures" / part / name / f"{number}.jpg", number % 4, number)
    argv = words("FLPT", tmp_path / "pictures", tmp_path / "run")
    argv[argv.index("--dataset-config-file") + 1] = str(ROOT / "configs/datasets/folder.yaml")
    train.main([*argv, "INPUT.TRANSFORMS", transforms, "DATALOADER.TRAIN_X.BATCH_SIZE", "2"])
    assert read_results(tmp_path / "run/results.json")["images_used"] == 4


@pytest.mark.parametrize("trainer", LEARNERS)
def test_features_without_a_text_encoder_are_refused(trainer, tmp_path):
    data = write_features(tmp_path / "animals.npz")
    argv = words(trainer, data, tmp_path / "run")
    argv[argv.index("tiny-vit")] = ""
    with pytest.raises(UserError, match=r"MODEL\.BACKBONE\.NAME"):
        built(argv)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("TRAINER.COOP.PREC", "fp8"), "'fp8'"),
        (("TRAINER.COOP.CLASS_TOKEN_POSITION", "back"), "'back'"),
        (("TRAINER.COOP.CTX_INIT", "", "TRAINER.COOP.N_CTX", "77"), "77"),
        (("MODEL.BACKBONE.NAME", "tiny-vlt"), "tiny-vit"),
    ],
)
def test_a_bad_setting_is_one_clear_line(change, message, features, tmp_path):
    with pytest.raises(UserError, match=message):
        built([*words("CoOp", features, tmp_path / "run"), *change])


def test_every_recipe_names_settings_of_its_trainer():
    for trainer in LEARNERS:
        node = TRAINER_REGISTRY.get(trainer).node
        for path in (ROOT / "configs/trainers" / trainer).glob("*.yaml"):
            assert set(yaml.safe_load(path.read_text()).get("TRAINER", {})) <= {node, trainer.upper()}


# The page that says how to add a trainer


def example() -> tuple[str, str]:
    """The name and the code of the file that the page has its reader write."""
    page = (ROOT / "docs/new_trainer.md").read_text(encoding="utf-8")
    ((name, code),) = re.findall(r"`trainers/(\w+\.py)`:\s+```python\n(.*?)```", page, re.DOTALL)
    return name, code


def test_the_example_trainer_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(TRAINER_REGISTRY, "_obj_map", dict(TRAINER_REGISTRY._obj_map))
    before = DEFAULTS.clone()
    name, code = example()
    try:
        exec(compile(code, name, "exec"), {"__name__": f"dfzsl.trainers.{name.removesuffix('.py')}"})
        argv = ["--trainer", "FeatureAdapter", "--root", str(write_features(tmp_path / "animals.npz"))]
        argv += ["--dataset-config-file", str(ROOT / "configs/datasets/features.yaml"), "--seed", "1"]
        run, new = tmp_path / "run", tmp_path / "new"
        train.main([*argv, "--output-dir", str(run), "DATASET.SUBSAMPLE_CLASSES", "base"])
        loaded = ["--output-dir", str(new), "--eval-only", "--model-dir", str(run)]
        train.main([*argv, *loaded, "DATASET.SUBSAMPLE_CLASSES", "new"])
    finally:  # the example adds a config key
        DEFAULTS.clear()
        DEFAULTS.update(before)
    base, new = (read_results(folder / "results.json") for folder in (run, new))
    assert base["trained_parameters"] > 0
    assert base["accuracy"] > 50 and new["accuracy"] > 20


@pytest.mark.slow
def test_a_trainer_is_found_where_it_is_dropped(tmp_path):
    """In a copy of the package, laid out as pip installs it, with the example in its folder."""
    name, code = example()
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dfzsl", tmp_path / "dfzsl", ignore=ignore)
    for part in ("trainers", "datasets", "configs"):
        shutil.copytree(ROOT / part, tmp_path / "dfzsl" / part, ignore=ignore)
    (tmp_path / "dfzsl/trainers" / name).write_text(code, encoding="utf-8")
    (tmp_path / "dfzsl/trainers/apart").mkdir()  # a package in the folder is no trainer
    (tmp_path / "dfzsl/trainers/apart/__init__.py").write_text("raise RuntimeError('taken for a trainer')")
    words = ["base2new", "--methods", "all", "--dry-run", "--", "shapes", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "dfzsl.launch", *words],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--trainer FeatureAdapter" in done.stdout


def test_coop_is_the_base_of_its_relatives():
    assert all(issubclass(TRAINER_REGISTRY.get(name), CoOp) for name in LEARNERS)
