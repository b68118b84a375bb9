"""The rest of the original's surface: backbones, networks, trainers, data sets of several domains."""

import importlib
import subprocess
import sys
from pathlib import Path

import dassl.data.datasets as datasets
import dassl.engine as engine
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum, build_dataset
from dassl.data.transforms import transforms
from dassl.engine import TrainerX, build_trainer
from dassl.engine.trainer import load_checkpoint
from dassl.modeling import BACKBONE_REGISTRY, NETWORK_REGISTRY, backbone, build_backbone, build_network, head
from dassl.modeling.backbone.build import BACKBONE_REGISTRY as SAME
from dassl.modeling.backbone.resnet import BasicBlock, ResNet
from dassl.modeling.ops import EFDMix, MixStyle
from dassl.optim.radam import AdamW, PlainRAdam, RAdam
from dassl.utils import Registry
from dassl.utils.torchtools import adjust_learning_rate, partial, set_bn_to_eval
from dassl.utils.vision import import_torchvision
from PIL import Image
from torch import nn

MODELS = import_torchvision().models
LEFT_OUT = [
    *((f"engine.{package}", name) for package, names in engine.build.LEFT_OUT.items() for name in names),
    *(
        (f"data.datasets.{package}", name)
        for package, names in datasets.build.LEFT_OUT.items()
        for name in names
    ),
    *(("modeling.backbone", name) for name in backbone.build.LEFT_OUT),
    ("modeling.network", "fcn_3x64_gctx"),
    ("modeling.ops", "SinkhornDivergence"),
    ("engine", "DANN"),
    ("data.datasets", "CIFAR10"),
]


@pytest.mark.parametrize("module, name", LEFT_OUT)
def test_what_is_left_out_says_so(module, name):
    with pytest.raises(ImportError) as error:
        exec(f"from dassl.{module} import {name}")
    assert str(error.value) == (
        f"dassl.{module}.{name} is not in this drop-in for Dassl (see its README: what is left out)"
    )
    assert not hasattr(importlib.import_module(f"dassl.{module}"), "nothing_of_the_kind")


@pytest.mark.parametrize(
    "key, name, build",
    [
        ("TRAINER.NAME", "MCD", build_trainer),
        ("DATASET.NAME", "STL10", build_dataset),
        ("MODEL.BACKBONE.NAME", "vgg16", lambda cfg: build_backbone(cfg.MODEL.BACKBONE.NAME)),
    ],
)
def test_names_that_are_left_out(key, name, build):
    cfg = get_cfg_default()
    cfg.merge_from_list([key, name])
    with pytest.raises(ValueError, match=f"^{name}"):
        build(cfg)


# Backbones and networks


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_resnets_are_torchvisions(name):
    assert SAME is BACKBONE_REGISTRY
    model = build_backbone(name, verbose=False, pretrained=False).eval()
    theirs = getattr(MODELS, name)(weights=None).eval()
    assert list(model.state_dict()) == [key for key in theirs.state_dict() if not key.startswith("fc.")]
    model.load_state_dict(theirs.state_dict(), strict=False)
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model(x), theirs(x), atol=1e-5)
        assert model.featuremaps(x).shape == (2, model.out_features, 2, 2)
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.1), "fan out"


def test_pretrained_weights_are_torchvisions(monkeypatch):
    weights = MODELS.resnet18(weights=None).state_dict()
    enum = type(MODELS.get_weight("ResNet18_Weights.IMAGENET1K_V1"))
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **_: weights)
    model = backbone.resnet18()
    assert torch.equal(model.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


@pytest.mark.parametrize("name, kind", [("ms", MixStyle), ("efdmix", EFDMix)])
def test_resnets_that_mix(name, kind, capsys):
    for last in (1, 2, 3):
        model = getattr(backbone, f"resnet18_{name}_l{'123'[:last]}")(pretrained=False)
        layers = ["layer1", "layer2", "layer3"][:last]
        assert capsys.readouterr().out == f"Insert {kind.__name__} after {layers}\n"
        assert type(model.mixstyle) is kind and model.ms_layers == layers
        calls = []
        model.mixstyle.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(torch.randn(2, 3, 32, 32))
        assert len(calls) == last
    with pytest.raises(ValueError, match="layer4"):
        ResNet(BasicBlock, (1, 1, 1, 1), ms_class=kind, ms_layers=["layer4"])


def test_networks_and_heads(capsys):
    @NETWORK_REGISTRY.register()
    def tiny(width):
        return nn.Linear(width, 1)

    try:
        assert build_network("tiny", width=3).in_features == 3
        assert capsys.readouterr().out == "Network: tiny\n"
        with pytest.raises(ValueError, match="tiny"):
            build_network("tine")
    finally:
        del NETWORK_REGISTRY._obj_map["tiny"]
    assert importlib.import_module("dassl.modeling.head.build").build_head is head.build_head
    assert importlib.import_module("dassl.modeling.head.mlp").MLP is head.MLP


# Trainers


class Half(DatasetBase):
    """Half of the pictures labelled, the others not."""

    def __init__(self, cfg):
        items = [
            Datum(str(path), label, classname=folder.name)
            for label, folder in enumerate(sorted((self.root / "tiny_pets/images").iterdir()))
            for path in sorted(folder.iterdir())
        ]
        super().__init__(train_x=items[::2], train_u=items[1::2], val=items[::5], test=items[::4])


@pytest.fixture
def half(images, tmp_path, monkeypatch):
    """A configuration for `Half` and a tiny backbone."""
    monkeypatch.setattr(Half, "root", images, raising=False)
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Half", Half)

    class Tiny(backbone.Backbone):
        def __init__(self):
            super().__init__()
            self._out_features = 8
            self.layers = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
            )

        def forward(self, x):
            return self.layers(x).flatten(1)

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "tiny", lambda pretrained, **_: Tiny())
    cfg = get_cfg_default()
    settings = {
        "DATASET.NAME": "Half",
        "DATASET.ROOT": str(images),
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MODEL.BACKBONE.NAME": "tiny",
        "INPUT.SIZE": (16, 16),
        "INPUT.TRANSFORMS": ["random_flip", "normalize"],
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.TRAIN_X.BATCH_SIZE": 8,
        "DATALOADER.TRAIN_U.SAME_AS_X": False,
        "DATALOADER.TRAIN_U.BATCH_SIZE": 6,
        "OPTIM.LR": 0.02,
        "OPTIM.MAX_EPOCH": 6,
        "TRAINER.FIXMATCH.STRONG_TRANSFORMS": ["randaugment_fixmatch", "normalize"],
        "TRAINER.FIXMATCH.CONF_THRE": 0.5,
        "TRAINER.MIXMATCH.RAMPUP": 10,
        "TRAINER.MIXMATCH.WEIGHT_U": 1.0,
        "USE_CUDA": False,
        "VERBOSE": False,
    }
    cfg.merge_from_list([word for pair in settings.items() for word in pair])
    return cfg


TRAINERS = ["Vanilla", "SourceOnly", "SupBaseline", "EntMin", "FixMatch", "MixMatch", "MeanTeacher"]


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_learn(name, half, capsys):
    """From their names alone; the pictures of a class are of one colour."""
    half.merge_from_list(["TRAINER.NAME", name, "DATALOADER.K_TRANSFORMS", 2 if name == "MixMatch" else 1])
    torch.manual_seed(0)
    trainer = build_trainer(half)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.test() > 60
    out = capsys.readouterr().out
    assert "loss" in out and "Finish training" in out
    assert getattr(engine, name) is type(trainer)
    if name == "FixMatch":
        assert all(f"y_u_pred_{part}" in out for part in ("acc_raw", "acc_thre", "keep"))


def one_step(name, half, **settings):
    """A trainer of `name`, its two batches, and what its loss adds to the mean cross-entropy."""
    half.merge_from_list(["TRAINER.NAME", name, *(word for pair in settings.items() for word in pair)])
    torch.manual_seed(0)
    trainer = build_trainer(half)
    trainer.set_model_mode("eval")  # so that no statistics move between two passes
    trainer.batch_idx, trainer.num_batches, trainer.epoch = 0, 100, 3
    return trainer, next(iter(trainer.train_loader_x)), next(iter(trainer.train_loader_u))


def test_losses(half, monkeypatch):
    """Of one step, against the papers' formulas."""
    losses = []
    for kind in (TrainerX, engine.TrainerXU):
        monkeypatch.setattr(
            kind, "model_backward_and_update", lambda self, loss, names=None: losses.append(loss.item())
        )

    trainer, x, u = one_step("EntMin", half, **{"TRAINER.ENTMIN.LMDA": 0.3})
    trainer.forward_backward(x, u)
    supervised = nn.functional.cross_entropy(trainer.model(x["img"]), x["label"]).item()
    p = trainer.model(u["img"]).softmax(1)
    assert losses[-1] == pytest.approx(supervised + 0.3 * -(p * p.log()).sum(1).mean().item(), rel=1e-3)

    trainer, x, u = one_step("MeanTeacher", half)
    trainer.teacher.eval()
    nn.init.normal_(trainer.teacher.classifier.weight)
    target = trainer.teacher(u["img"]).softmax(1)
    trainer.forward_backward(x, u)
    difference = (trainer.model(u["img"]).softmax(1) - target).square().sum(1).mean().item()
    supervised = nn.functional.cross_entropy(trainer.model(x["img"]), x["label"]).item()
    weight = 2.718281828 ** (-5 * (1 - 3 / 5) ** 2)
    assert losses[-1] == pytest.approx(supervised + weight * difference, rel=1e-4)
    assert not any(p.requires_grad for p in trainer.teacher.parameters())

    trainer, x, u = one_step("FixMatch", half, **{"TRAINER.FIXMATCH.CONF_THRE": 0.26})
    shown = trainer.forward_backward(x, u)
    weak = torch.cat([x["img"], u["img"]])
    strong = trainer.model(torch.cat([x["img2"], u["img2"]])).log_softmax(1)
    confidence, guess = trainer.model(weak).softmax(1).max(1)
    each = [-strong[i, g].item() for i, g in enumerate(guess) if confidence[i] >= 0.26]
    supervised = nn.functional.cross_entropy(trainer.model(x["img"]), x["label"]).item()
    assert each and losses[-1] == pytest.approx(supervised + sum(each) / len(weak), rel=1e-4)
    assert shown["y_u_pred_acc_raw"] == pytest.approx((guess[8:] == u["label"]).float().mean().item())


def test_fixmatch_needs_strong_transforms(half):
    half.merge_from_list(["TRAINER.NAME", "FixMatch", "TRAINER.FIXMATCH.STRONG_TRANSFORMS", ()])
    with pytest.raises(AssertionError, match="STRONG_TRANSFORMS"):
        build_trainer(half)


def test_ones_own_come_first():
    """A repository's own class of such a name is not replaced by ours."""
    registry = Registry("THING")
    theirs, ours = type("OfficeHome", (), {}), type("OfficeHome", (), {})
    registry.register(theirs)
    assert registry.offer(ours) is ours and registry.get("OfficeHome") is theirs


# Data sets of several domains


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{image} {label}\n" for image, label in rows))


def folders(root, parts):
    """Two pictures each of classes b and Cup; Cup is label 0."""
    for part in parts:
        for name in ("b", "Cup"):
            for number in (1, 2):
                picture(root / part / name / f"{number}.jpg")
    (root / parts[0] / ".hidden").mkdir(exist_ok=True)


def make(name, root):
    if name in ("OfficeHome", "Office31"):
        domains = {"OfficeHome": ["art", "clipart"], "Office31": ["amazon", "webcam"]}[name]
        folders(root / {"OfficeHome": "office_home", "Office31": "office31"}[name], domains)
        return domains
    if name in ("DigitsDG", "OfficeHomeDG"):
        domains = {"DigitsDG": ["svhn", "mnist"], "OfficeHomeDG": ["art", "product"]}[name]
        folder = root / {"DigitsDG": "digits_dg", "OfficeHomeDG": "office_home_dg"}[name]
        folders(folder, [f"{domain}/{part}" for domain in domains for part in ("train", "val")])
        return domains
    if name == "VLCS":
        parts = ("train", "crossval", "test")
        folders(root / "VLCS", [f"{domain}/{part}" for domain in ("SUN", "PASCAL") for part in parts])
        return ["sun", "pascal"]
    rows = {
        domain: [(f"{domain}/{c}/{n}.jpg", label) for label, c in enumerate(("b", "Cup")) for n in (1, 2)]
        for domain in ("sketch", "real", "photo")
    }
    if name in ("DomainNet", "miniDomainNet"):
        splits = root / "domainnet" / ("splits" if name == "DomainNet" else "splits_mini")
        for domain in ("sketch", "real"):
            for image, _ in rows[domain]:
                picture(root / "domainnet" / image)
            lines(splits / f"{domain}_train.txt", rows[domain][::2])
            lines(splits / f"{domain}_test.txt", rows[domain][1::2])
        return ["sketch", "real"]
    if name == "PACS":
        for domain in ("sketch", "photo"):
            for image, _ in rows[domain]:
                picture(root / "pacs/images" / image)
            counted = [(image, label + 1) for image, label in rows[domain]]
            broken = [("sketch/dog/n02103406_4068-1.png", 1)] if domain == "sketch" else []
            lines(root / f"pacs/splits/{domain}_train_kfold.txt", counted[::2] + broken)
            lines(root / f"pacs/splits/{domain}_crossval_kfold.txt", counted[1::2])
        return ["sketch", "photo"]
    assert name == "VisDA17"
    for part in ("train", "validation"):
        for image, _ in rows["real"]:
            picture(root / "visda17" / part / image.removeprefix("real/"))
        lines(
            root / f"visda17/{part}/image_list.txt",
            [(i.removeprefix("real/"), label) for i, label in rows["real"]],
        )
    return ["synthetic", "real"]


# For each part: whose pictures (source 0, target 1), and how many.
EXPECTED = {
    "OfficeHome": {"train_x": (0, 4), "train_u": (1, 4), "test": (1, 4)},
    "Office31": {"train_x": (0, 4), "train_u": (1, 4), "test": (1, 4)},
    "DomainNet": {"train_x": (0, 2), "train_u": (1, 2), "val": (0, 2), "test": (1, 2)},
    "miniDomainNet": {"train_x": (0, 2), "train_u": (1, 2), "test": (1, 2)},
    "VisDA17": {"train_x": (0, 4), "train_u": (1, 4), "test": (1, 4)},
    "DigitsDG": {"train_x": (0, 4), "val": (0, 4), "test": (1, 8)},
    "OfficeHomeDG": {"train_x": (0, 4), "val": (0, 4), "test": (1, 8)},
    "PACS": {"train_x": (0, 2), "val": (0, 2), "test": (1, 4)},
    "VLCS": {"train_x": (0, 4), "val": (0, 4), "test": (1, 4)},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_domains(name, tmp_path):
    domains = make(name, tmp_path)
    cfg = get_cfg_default()
    cfg.merge_from_list(["DATASET.NAME", name, "DATASET.ROOT", str(tmp_path), "VERBOSE", False])
    cfg.merge_from_list(["DATASET.SOURCE_DOMAINS", domains[:1], "DATASET.TARGET_DOMAINS", domains[1:]])
    dataset = build_dataset(cfg)
    assert type(dataset) is getattr(datasets, name)
    for part in ("train_x", "train_u", "val", "test"):
        items = getattr(dataset, part)
        which, count = EXPECTED[name].get(part, (0, 0))
        assert len(items or []) == count, part
        folder = {"synthetic": "train", "real": "validation"} if name == "VisDA17" else {}
        word = folder.get(domains[which], domains[which]).lower()
        assert all(f"/{word}/" in item.impath.lower() and item.domain == 0 for item in items or [])
    assert dataset.num_classes == 2
    labels = {(item.label, item.impath.split("/")[-2]) for item in dataset.test}
    listed = name in ("DomainNet", "miniDomainNet", "VisDA17", "PACS")
    assert labels == ({(0, "b"), (1, "Cup")} if listed else {(0, "Cup"), (1, "b")})
    names = {item.classname for item in dataset.train_x}
    assert names == ({"b", "Cup"} if listed or name == "Office31" else {"b", "cup"})
    if name != "VisDA17":
        cfg.merge_from_list(["DATASET.SOURCE_DOMAINS", domains])
        assert {item.domain for item in build_dataset(cfg).train_x} == {0, 1}
    cfg.merge_from_list(["DATASET.SOURCE_DOMAINS", ["moon"]])
    with pytest.raises(ValueError, match="moon"):
        build_dataset(cfg)


def test_a_missing_folder_is_downloaded(tmp_path, monkeypatch):
    def download(self, url, dst, from_gdrive=True):
        assert url.startswith("https://drive.google.com/uc?id=") and dst == str(tmp_path / "digits_dg.zip")
        make("DigitsDG", tmp_path)

    monkeypatch.setattr(DatasetBase, "download_data", download)
    cfg = get_cfg_default()
    cfg.merge_from_list(["DATASET.NAME", "DigitsDG", "DATASET.ROOT", str(tmp_path)])
    cfg.merge_from_list(["DATASET.SOURCE_DOMAINS", ["svhn"], "DATASET.TARGET_DOMAINS", ["mnist"]])
    assert len(build_dataset(cfg).train_x) == 4
    both = datasets.dg.DigitsDG.read_data(str(tmp_path / "digits_dg"), ["svhn", "mnist"], "train")
    assert [item.domain for item in both] == [0] * 4 + [1] * 4


# Small things


def test_torchtools(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout())
    model.apply(set_bn_to_eval)
    assert model[0].training and not model[1].training and model[2].training
    assert model[1].weight.requires_grad
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    rates = []
    for epoch in (0, 19, 20, 40):
        adjust_learning_rate(optimizer, 0.5, epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.005])
    adjust_learning_rate(optimizer, 0.5, 25, linear_decay=True, final_lr=0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)
    assert partial(int, base=2)("101") == 5
    torch.save({"a": 1}, tmp_path / "c")
    assert load_checkpoint(str(tmp_path / "c")) == {"a": 1}


def steps(kind, gradients, **settings):
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = kind([parameter], **settings)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter.detach()


GRADIENTS = [[0.5, -1.0], [0.1, 3.0], [-0.7, 0.2], [1.0, 1.0], [0.3, -0.3], [2.0, 0.1], [-1.0, 0.4]]


def test_optimizers_of_radam():
    assert torch.equal(
        steps(PlainRAdam, GRADIENTS, lr=0.1, weight_decay=0.1),
        steps(RAdam, GRADIENTS, lr=0.1, weight_decay=0.1),
    )
    ours = steps(AdamW, GRADIENTS, lr=0.01, weight_decay=0.1)
    assert torch.allclose(ours, steps(torch.optim.AdamW, GRADIENTS, lr=0.01, weight_decay=0.1), atol=1e-6)
    # In the first of ten steps the rate is a tenth, and Adam's step is the sign of the gradient.
    warm = steps(AdamW, GRADIENTS[:1], lr=0.1, warmup=10)
    assert warm.tolist() == pytest.approx([1 - 0.01, -2 + 0.01], abs=1e-6)
    with pytest.raises(ValueError, match=r"beta.* 1"):
        AdamW([nn.Parameter(torch.ones(1))], betas=(0.9, 1.0))


def test_builders_of_transforms(capsys):
    cfg = get_cfg_default()
    cfg.INPUT.SIZE = (16, 12)
    halve = lambda x: x / 2  # noqa: E731
    image = Image.new("RGB", (12, 16), (255, 255, 255))
    for build in (transforms._build_transform_train, transforms._build_transform_test):
        x = build(cfg, ["normalize"], "16x12", halve)(image)
        assert x.shape == (3, 16, 12) and x.mean() == 0.5
    assert "+ resize to 16x12" in capsys.readouterr().out
    assert transforms.INTERPOLATION_MODES["bilinear"].value == "bilinear"


def test_registries_are_empty_at_first():
    """Asking for one of ours fills them; importing does not, so that a repository's own can come first."""
    script = (
        "from dassl.engine import TRAINER_REGISTRY as a; "
        "from dassl.data.datasets import DATASET_REGISTRY as b; "
        "print(a.registered_names(), b.registered_names())"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout == "[] []\n"
