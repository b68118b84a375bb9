"""Every data set, from a miniature copy in its true layout: CoOp's classes, splits and draws; bad input."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import fake_data
import numpy as np
import pytest
from dassl.config import get_cfg_default
from dassl.data import DataManager
from dassl.data.datasets import DATASET_REGISTRY, Datum
from hypothesis import given, settings
from hypothesis import strategies as st

from dfzsl.configs import CONFIGS
from dfzsl.datasets.features import FeatureDatum
from dfzsl.io.class_names import normalize_class_name
from dfzsl.utils.errors import UserError

# These data sets draw their own images: see test_shapes.py.
RENDERED = {"Shapes", "ShapesDark", "ShapesDrawing", "ShapesPainting", "ShapesPixel"}
OURS = [
    name
    for name in DATASET_REGISTRY.registered_names()
    if DATASET_REGISTRY.get(name).__module__.startswith("dfzsl.")
]
NAMES = sorted(set(OURS) - RENDERED)
SPLIT = ["Caltech101", "OxfordPets", "StanfordCars", "OxfordFlowers", "Food101", "SUN397"]
SPLIT += ["DescribableTextures", "EuroSAT", "UCF101"]
GZSL = ["AWA2", "CUB", "SUN", "FLO", "APY"]
TEST_ONLY = ["ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR"]


def config(
    name: str, root: Path, subsample: str = "all", shots: int = -1, seed: int = 1, teacher: str = "", **keys
):
    """A data set's config: its shipped file, then what a test sets."""
    cfg = get_cfg_default()
    for path in (CONFIGS / "datasets").glob("*.yaml"):
        if f'NAME: "{name}"' in path.read_text():
            cfg.merge_from_file(str(path))
    assert name == cfg.DATASET.NAME
    pairs = ["DATASET.ROOT", str(root), "DATASET.SUBSAMPLE_CLASSES", subsample, "DATASET.NUM_SHOTS", shots]
    pairs += ["SEED", seed, "TEACHER.FILE", teacher, "DATALOADER.NUM_WORKERS", 0, "INPUT.SIZE", (16, 16)]
    cfg.merge_from_list(
        pairs + [word for key, value in keys.items() for word in (key.replace("__", "."), value)]
    )
    return cfg


def build(name: str, root: Path, *args, **kwargs):
    return DATASET_REGISTRY.get(name)(config(name, root, *args, **kwargs))


def facts(datums) -> list[tuple[str, int, str]]:
    return [(datum.impath, datum.label, datum.classname) for datum in datums]


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """DATASET.ROOT of a fake copy of every data set, written when it is asked for."""

    class Roots(dict):
        def __missing__(self, name: str) -> Path:
            return self.setdefault(name, fake_data.make(name, tmp_path_factory.mktemp(name)))

    return Roots()


def test_every_data_set_has_a_fake_and_a_config():
    assert set(NAMES) == set(fake_data.FAKES)
    assert set(SPLIT + GZSL + TEST_ONLY + ["ImageNet", "FGVCAircraft", "Folder", "Csv", "Features"]) == set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_base_new_and_all_through_the_data_manager(name, roots):
    managers = {part: DataManager(config(name, roots[name], part)) for part in ("all", "base", "new")}
    whole, base, new = (managers[part].dataset for part in ("all", "base", "new"))
    assert (
        whole.classnames == whole.all_classnames and len(set(whole.classnames)) == managers["all"].num_classes
    )
    assert base.classnames == whole.base_classnames and new.classnames == whole.new_classnames
    assert sorted(base.classnames + new.classnames) == sorted(whole.classnames)
    assert len(base.classnames) == math.ceil(len(whole.classnames) / 2)
    assert len(base.test) + len(new.test) == len(whole.test) > 0

    for part, manager in managers.items():
        dataset = manager.dataset
        assert manager.num_classes == len(dataset.classnames) == len(manager.lab2cname)
        assert {datum.label for datum in dataset.test} == set(range(manager.num_classes))
        for datum in [*dataset.train_x, *dataset.val, *dataset.test]:
            assert dataset.classnames[datum.label] == datum.classname == manager.lab2cname[datum.label]
        assert dataset.test_only == (name in TEST_ONLY or (name in GZSL and part == "new"))
        if not dataset.test_only:
            assert (
                not {d.impath for d in dataset.train_x} & {d.impath for d in dataset.test}
                or name == "Features"
            )
        if not isinstance(dataset.test[0], FeatureDatum):
            seen = [batch for batch in manager.test_loader]
            assert sum(len(batch["label"]) for batch in seen) == len(dataset.test)
            assert seen[0]["img"].shape[1:] == (3, 16, 16)
    if name not in GZSL:
        assert whole.base_classnames == whole.classnames[: len(base.classnames)]
    assert whole.template.count("{}") == 1 and whole.template in whole.templates


@pytest.mark.parametrize("name", NAMES)
def test_a_data_free_run_needs_no_training_file(name, roots, tmp_path):
    """Nothing but names, splits and test images lies on the client's machine."""
    with_images = build(name, roots[name], "base")
    keep = {datum.impath for datum in build(name, roots[name]).test}
    root = roots[name]
    for directory, _, files in os.walk(root if root.is_dir() else root.parent):
        for file in files:
            path = Path(directory, file)
            picture = path.suffix.lower() in {".jpg", ".jpeg", ".png"}
            if (not picture and not path.name.endswith(("_train.txt", "_val.txt"))) or str(path) in keep:
                copy = tmp_path / path.relative_to(root if root.is_dir() else root.parent)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
    root = tmp_path / root.name if root.is_file() else tmp_path
    if name == "Features":
        arrays = dict(np.load(root))
        arrays["x_train"][:] = np.nan
        np.savez(root, **arrays)
    free = build(name, root, "base", shots=2, teacher="teacher.safetensors")
    assert free.train_x == [] and free.val == [] and not free.test_only
    assert free.classnames == with_images.classnames and free.num_classes == with_images.num_classes
    assert free.new_classnames == with_images.new_classnames
    assert [d.label for d in free.test] == [d.label for d in with_images.test]


def naive_coop(folder: Path, images: str, name: str, subsample: str, shots: int, seed: int):
    """CoOp's definition written out: the split's order, Python's random, then the halves, relabelled."""
    split = json.loads((folder / f"split_zhou_{name}.json").read_text())
    parts = {p: [(str(folder / images / path), label, c) for path, label, c in split[p]] for p in split}
    if shots > 0:
        random.seed(seed)
        for part, k in (("train", shots), ("val", min(shots, 4))):
            order = list(dict.fromkeys(label for _, label, _ in parts[part]))
            groups = [[row for row in parts[part] if row[1] == label] for label in order]
            parts[part] = [row for g in groups for row in (random.sample(g, k) if len(g) >= k else g)]
    labels = sorted({label for _, label, _ in parts["train"]})
    m = math.ceil(len(labels) / 2)
    kept = {"all": labels, "base": labels[:m], "new": labels[m:]}[subsample]
    return {p: [(i, kept.index(y), c) for i, y, c in rows if y in kept] for p, rows in parts.items()}


@pytest.mark.parametrize("name", SPLIT)
def test_splits_order_and_draws_are_coops(name, roots):
    dataset_class = DATASET_REGISTRY.get(name)
    folder = roots[name] / dataset_class.folder
    for subsample in ("base", "new", "all"):
        for shots, seed in ((-1, 1), (1, 1), (2, 3), (16, 2)):
            expected = naive_coop(folder, dataset_class.images, name, subsample, shots, seed)
            random.seed(99)
            before = random.getstate()
            dataset = build(name, roots[name], subsample, shots, seed)
            assert random.getstate() == before, "the draw must not disturb the rest of the run"
            assert facts(dataset.train_x) == expected["train"]
            assert facts(dataset.val) == expected["val"]
            assert facts(dataset.test) == expected["test"]


@pytest.mark.parametrize(
    "name", ["OxfordPets", "FGVCAircraft", "ImageNet", "Folder", "Csv", "Features", "AWA2"]
)
def test_few_shots_are_drawn_for_every_data_set(name, roots):
    base = build(name, roots[name], "base", shots=2, seed=5)
    counts = np.bincount([datum.label for datum in base.train_x], minlength=base.num_classes)
    assert counts.tolist() == [2] * base.num_classes
    again = build(name, roots[name], "base", shots=2, seed=5)
    other = build(name, roots[name], "base", shots=2, seed=6)
    key = (lambda d: d.feature.sum().item()) if name == "Features" else (lambda d: d.impath)
    assert [key(d) for d in base.train_x] == [key(d) for d in again.train_x]
    assert [key(d) for d in base.train_x] != [key(d) for d in other.train_x]


def test_class_names_of_the_halves(roots):
    """Spot checks by hand, so that no shared mistake of reader and test can hide."""
    assert build("Caltech101", roots["Caltech101"], "base").classnames == ["face", "leopard", "motorbike"]
    assert build("EuroSAT", roots["EuroSAT"], "new").classnames == ["River", "Sea or Lake"]
    assert build("FGVCAircraft", roots["FGVCAircraft"], "new").classnames == ["Cessna 172", "F/A-18"]
    assert build("ImageNetV2", roots["ImageNetV2"], "base").classnames == [
        "tench",
        "goldfish",
        "great white shark",
    ]
    assert build("ImageNetA", roots["ImageNetA"]).classnames == list(fake_data.NAMES[1:])
    assert build("Folder", roots["Folder"], "new").classnames == ["näher", "Äpfel & Birnen"]
    assert build("CUB", roots["CUB"], "new").classnames == ["Laysan Albatross", "Groove billed Ani"]


def test_templates_are_coops():
    expected = {
        "OxfordPets": "a photo of a {}, a type of pet.",
        "OxfordFlowers": "a photo of a {}, a type of flower.",
        "FGVCAircraft": "a photo of a {}, a type of aircraft.",
        "DescribableTextures": "{} texture.",
        "EuroSAT": "a centered satellite photo of {}.",
        "Food101": "a photo of {}, a type of food.",
        "UCF101": "a photo of a person doing {}.",
        **dict.fromkeys(["StanfordCars", "SUN397", "Caltech101", "ImageNet", *TEST_ONLY], "a photo of a {}."),
    }
    assert {name: DATASET_REGISTRY.get(name).template for name in expected} == expected


def test_imagenets_twins_get_names_of_their_own(tmp_path):
    """CoOp's classnames.txt calls two classes 'missile' and two 'sunglasses'."""
    root = fake_data.make("ImageNetR", tmp_path)
    names = tmp_path / "imagenet-rendition/classnames.txt"
    text = names.read_text().replace("n01440764", "n03773504").replace("n01443537", "n04008634")
    names.write_text(text.replace("tench", "missile").replace("goldfish", "missile"))
    images = tmp_path / "imagenet-rendition/imagenet-r"
    (images / "n01440764").rename(images / "n03773504")
    (images / "n01443537").rename(images / "n04008634")
    assert set(build("ImageNetR", root).classnames) >= {"missile", "projectile"}


# ---------------------------------------------------------------- CoOp's few-shot files


def coop_pickle(path: Path, train: list, val: list) -> None:
    path.parent.mkdir()
    path.write_bytes(pickle.dumps({"train": train, "val": val}, protocol=pickle.HIGHEST_PROTOCOL))


@pytest.mark.parametrize("moved", [False, True])
def test_a_few_shot_file_of_coops_decides(tmp_path, moved):
    root = fake_data.make("OxfordPets", tmp_path / "here")
    whole = build("OxfordPets", root)
    train = [d for d in whole.train_x if d.impath.endswith(("_1.jpg", "_3.jpg"))]
    coop_pickle(root / "oxford_pets/split_fewshot/shot_2-seed_1.pkl", train, whole.val[::-1])
    if moved:
        root = root.rename(tmp_path / "there")
        assert not Path(train[0].impath).exists()
    dataset = build("OxfordPets", root, shots=2)
    assert [d.impath for d in dataset.train_x] == [
        d.impath.replace("/here/", f"/{root.name}/") for d in train
    ]
    assert [d.label for d in dataset.val] == [d.label for d in whole.val[::-1]]
    assert facts(build("OxfordPets", root, shots=2, seed=2).train_x) != facts(dataset.train_x)


def test_a_hostile_few_shot_file_runs_nothing(tmp_path):
    root = fake_data.make("OxfordPets", tmp_path)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    coop_pickle(root / "oxford_pets/split_fewshot/shot_2-seed_1.pkl", [Hostile()], [])
    with pytest.raises(UserError, match=r"shot_2-seed_1\.pkl"):
        build("OxfordPets", root, shots=2)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", pickle.dumps({"train": 3}), pickle.dumps({}), pickle.dumps([1])]
)
def test_a_broken_few_shot_file(tmp_path, content):
    root = fake_data.make("OxfordPets", tmp_path)
    path = root / "oxford_pets/split_fewshot/shot_2-seed_1.pkl"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shot_2-seed_1\.pkl"):
        build("OxfordPets", root, shots=2)


def test_a_few_shot_file_of_another_split(tmp_path):
    root = fake_data.make("OxfordPets", tmp_path)
    strange = root / "strange.jpg"
    fake_data.picture(strange, 0, 0)
    datum = Datum(impath=str(strange), label=0, classname="x")
    coop_pickle(root / "oxford_pets/split_fewshot/shot_2-seed_1.pkl", [datum], [])
    with pytest.raises(UserError, match=r"strange\.jpg"):
        build("OxfordPets", root, shots=2)


# ---------------------------------------------------------------- bad input: one clear line each


def test_a_missing_data_set_says_which_where_and_how(tmp_path):
    for name in sorted(set(NAMES) - {"Folder", "Csv", "Features"}):
        with pytest.raises(UserError, match=f"python -m dfzsl.prepare {name}") as error:
            build(name, tmp_path)
        assert str(tmp_path / DATASET_REGISTRY.get(name).folder) in str(error.value)
        assert "\n" not in str(error.value)


def test_no_root():
    with pytest.raises(UserError, match=r"DATASET\.ROOT"):
        build("OxfordPets", "")


def test_unknown_part(roots):
    with pytest.raises(UserError, match="base, new or all"):
        build("OxfordPets", roots["OxfordPets"], "old")


@pytest.mark.parametrize("name", ["OxfordPets", "FGVCAircraft", "Csv", "AWA2"])
def test_a_missing_image_is_named(name, tmp_path):
    root = fake_data.make(name, tmp_path)
    gone = build(name, root).test[-1].impath
    os.unlink(gone)
    with pytest.raises(UserError, match=re.escape(gone)):
        build(name, root)


def break_split(root: Path, change) -> None:
    path = root / "oxford_pets/split_zhou_OxfordPets.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def drop_class(split: dict) -> dict:
    return {part: [row for row in rows if part == "test" or row[1] != 2] for part, rows in split.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [], "'train'"),
        (lambda s: {k: s[k] for k in ("train", "test")}, "'val'"),
        (lambda s: {**s, "train": [["a.jpg", 0]]}, "train"),
        (lambda s: {**s, "train": [["a.jpg", "x", "y"]]}, "train"),
        (lambda s: {**s, "train": [["../../secret", 0, "abyssinian"]]}, "secret|passwd"),
        (lambda s: {**s, "train": [["/etc/passwd", 0, "abyssinian"]]}, "secret|passwd"),
        (lambda s: {**s, "val": [["a.jpg", 0, "lion"]]}, "lion"),
        (lambda s: {**s, "val": [["a.jpg", 9, "lion"]]}, "label"),
        (drop_class, "training image"),
        (lambda s: {**s, "test": []}, "test image"),
    ],
)
def test_a_broken_split(tmp_path, change, message):
    root = fake_data.make("OxfordPets", tmp_path)
    break_split(root, change)
    with pytest.raises(UserError, match=message) as error:
        build("OxfordPets", root)
    assert "\n" not in str(error.value)


def test_a_truncated_split(tmp_path):
    root = fake_data.make("OxfordPets", tmp_path)
    path = root / "oxford_pets/split_zhou_OxfordPets.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(UserError, match=path.name):
        build("OxfordPets", root)


def test_a_class_without_images(tmp_path):
    root = fake_data.make("ImageNetSketch", tmp_path)
    folder = tmp_path / "imagenet-sketch/images/n01443537"
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(UserError, match="'goldfish'"):
        build("ImageNetSketch", root)


def test_a_folder_that_classnames_txt_does_not_know(tmp_path):
    root = fake_data.make("ImageNetSketch", tmp_path)
    fake_data.picture(tmp_path / "imagenet-sketch/images/n99999999/a.JPEG", 0, 0)
    with pytest.raises(UserError, match="'n99999999'"):
        build("ImageNetSketch", root)


def test_imagenet_with_half_of_its_training_folders(tmp_path):
    root = fake_data.make("ImageNet", tmp_path)
    shutil.rmtree(tmp_path / "imagenet/images/train/n01443537")
    with pytest.raises(UserError, match=r"train.*val|val.*train"):
        build("ImageNet", root)


def test_a_read_only_data_folder(tmp_path):
    root = fake_data.make("OxfordPets", tmp_path)
    before = sorted(path for path in root.rglob("*"))
    for path in [root, *before]:
        if path.is_dir():
            path.chmod(0o555)
    try:
        build("OxfordPets", root, shots=2)
        assert sorted(root.rglob("*")) == before, "nothing is written into the data folder"
    finally:
        for path in [root, *before]:
            if path.is_dir():
                path.chmod(0o755)


# ---------------------------------------------------------------- your own images

ANY_NAME = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1).filter(
    normalize_class_name
)


def test_undivided_folders_are_shared_out(tmp_path):
    for label, name in enumerate(["ant", "bee"]):
        for number in range(10):
            fake_data.picture(tmp_path / name / f"{number}.jpg", label, number)
    (tmp_path / "ant" / "Thumbs.db").write_text("no image")
    (tmp_path / ".cache").mkdir()
    dataset = build("Folder", tmp_path)
    assert [len(part) for part in (dataset.train_x, dataset.val, dataset.test)] == [10, 4, 6]
    paths = [datum.impath for datum in [*dataset.train_x, *dataset.val, *dataset.test]]
    assert len(set(paths)) == 20 and facts(build("Folder", tmp_path, seed=2).test) == facts(dataset.test)


def test_folders_take_names_and_order_from_classnames_txt(tmp_path):
    root = fake_data.make("Folder", tmp_path)
    folders = ["dog_(big)", "elk"]  # a name ends at the first blank, so these folders have none
    shutil.rmtree(root)
    for label, name in enumerate(folders):
        fake_data.picture(root / "val" / name / "1.png", label, 0)
    (root / "classnames.txt").write_text("elk the elk\ndog_(big) a big dog\n")
    dataset = build("Folder", root)
    assert dataset.classnames == ["the elk", "a big dog"] and dataset.test_only


def test_a_training_class_that_is_never_tested(tmp_path):
    root = fake_data.make("Folder", tmp_path)
    fake_data.picture(root / "train" / "yak" / "1.png", 0, 0)
    with pytest.raises(UserError, match="'yak'"):
        build("Folder", root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "path.*label"),
        ("a,b\n1,2\n", "path.*label"),
        ("path,label\n", r"own\.csv"),
        ("path,label\na.jpg,\n", "line 2"),
        ("path,label,split\na.jpg,cat,dev\n", "line 2"),
        ("path,label,classname\na.jpg,1,cat\nb.jpg,2,dog\n", "label"),
        ("path,label,classname\na.jpg,0,cat\nb.jpg,0,dog\n", "label"),
        ("path,label,split\na.jpg,cat,test\nb.jpg,dog,test\n", r"[ab]\.jpg"),
    ],
)
def test_a_broken_csv(tmp_path, text, message):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        build("Csv", tmp_path / "own.csv")


def test_csv_with_numbers_and_names(tmp_path):
    lines = ["path,label,classname,split"]
    for label, name in enumerate(["zebra", "ant"]):
        for part in ("train", "test"):
            fake_data.picture(tmp_path / f"{name}-{part}.jpg", label, 0)
            lines.append(f"{name}-{part}.jpg,{label},{name},{part}")
    (tmp_path / "own.csv").write_text("\n".join(lines))
    assert build("Csv", tmp_path / "own.csv").classnames == ["zebra", "ant"]


def test_a_csv_that_is_a_picture(tmp_path):
    fake_data.picture(tmp_path / "own.csv", 0, 0)
    with pytest.raises(UserError, match=r"own\.csv"):
        build("Csv", tmp_path / "own.csv")


@settings(max_examples=15, deadline=None)
@given(st.sets(ANY_NAME, min_size=2).filter(lambda names: len(set(map(normalize_class_name, names))) > 1))
def test_class_names_of_a_csv_may_be_any_text(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("csv")
    names = list({normalize_class_name(name): name for name in names}.values())
    with open(folder / "own.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for number, name in enumerate(names):
            fake_data.picture(folder / f"{number}.jpg", 0, 0)
            writer.writerow([f"{number}.jpg", name, "test"])
    assert build("Csv", folder / "own.csv").classnames == sorted(names)
