"""Data sets in a CoOp checkout, whose own data sets create a missing split."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from pathlib import Path

import fake_data
import pytest
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.utils import Registry, mkdir_if_missing, set_random_seed, write_json

import dfzsl.datasets  # noqa: F401
from dfzsl.utils.dassl_plugin import register
from dfzsl.utils.errors import UserError


class CheckoutDataset(DatasetBase):
    """Makes its split of the folders, 50 : 20 : 30 of each, shuffled by `random`, and keeps the shots."""

    folder, images = "dtd", "images"

    def __init__(self, cfg):
        self.dataset_dir = os.path.join(cfg.DATASET.ROOT, self.folder)
        self.image_dir = os.path.join(self.dataset_dir, self.images)
        split = os.path.join(self.dataset_dir, f"split_zhou_{type(self).__name__}.json")
        assert not os.path.exists(split), "these tests have none"
        parts = self.make_split()
        rows = [
            [[os.path.relpath(i.impath, self.image_dir), i.label, i.classname] for i in part]
            for part in parts
        ]
        write_json(dict(zip(("train", "val", "test"), rows, strict=True)), split)
        train, val, test = parts
        if cfg.DATASET.NUM_SHOTS >= 1:
            train = self.generate_fewshot_dataset(train, num_shots=cfg.DATASET.NUM_SHOTS)
            val = self.generate_fewshot_dataset(val, num_shots=min(cfg.DATASET.NUM_SHOTS, 4))
            fewshot_dir = os.path.join(self.dataset_dir, "split_fewshot")
            mkdir_if_missing(fewshot_dir)
            with open(
                os.path.join(fewshot_dir, f"shot_{cfg.DATASET.NUM_SHOTS}-seed_{cfg.SEED}.pkl"), "wb"
            ) as file:
                pickle.dump({"train": train, "val": val}, file, protocol=pickle.HIGHEST_PROTOCOL)
        super().__init__(train_x=train, val=val, test=test)

    def make_split(self):
        print("Splitting into 50% train, 20% val, and 30% test")
        parts: tuple[list[Datum], ...] = ([], [], [])
        for label, name in enumerate(sorted(os.listdir(self.image_dir))):
            paths = [
                os.path.join(self.image_dir, name, image)
                for image in sorted(os.listdir(os.path.join(self.image_dir, name)))
            ]
            random.shuffle(paths)
            ends = round(len(paths) * 0.5), round(len(paths) * 0.5) + round(len(paths) * 0.2), len(paths)
            for part, start, end in zip(parts, (0, *ends[:2]), ends, strict=True):
                part += [Datum(impath=path, label=label, classname=name) for path in paths[start:end]]
        return parts


NAMES = ["DescribableTextures", "EuroSAT", "Food101"]  # a folder a class


def pair(name):
    """Return the checkout's data set and the one of dfzsl that replaces it."""
    own_class = DATASET_REGISTRY.get(name)
    checkout_class = type(name, (CheckoutDataset,), {"folder": own_class.folder, "images": own_class.images})
    registry = Registry("DATASET")
    registry.register(checkout_class)
    plugged = register(registry, replace=True)(type(name, (own_class,), {}))
    assert registry.get(name) is plugged
    return checkout_class, plugged


def config(root, shots=-1, **keys):
    cfg = get_cfg_default()
    cfg.merge_from_list(["DATASET.ROOT", str(root), "DATASET.NUM_SHOTS", shots, "SEED", 1])
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def shown(dataset, root):
    return [
        [(os.path.relpath(i.impath, root), i.label, i.classname) for i in part]
        for part in (dataset.train_x, dataset.val, dataset.test)
    ]


def without_split(name, root):
    """The folder of a data set as it is before anybody has divided it."""
    fake_data.make(name, root)
    folder = root / DATASET_REGISTRY.get(name).folder
    (folder / f"split_zhou_{name}.json").unlink()
    return folder


@pytest.mark.parametrize("shots", [-1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_the_split_is_the_checkouts(name, shots, tmp_path):
    """The same items in the same order, the same files, and as much drawn from `random`."""
    folder = without_split(name, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    checkout_class, plugged = pair(name)
    results = []
    for kind, root in ((checkout_class, tmp_path / "a"), (plugged, tmp_path / "b")):
        set_random_seed(1)
        dataset = kind(config(root, shots))
        results.append((shown(dataset, root), random.random()))
    assert results[0] == results[1]
    files = [{p.relative_to(root) for p in root.rglob("*")} for root in (tmp_path / "a", tmp_path / "b")]
    split = f"{folder.name}/split_zhou_{name}.json"
    assert files[0] == files[1] and Path(split) in files[0]
    assert (tmp_path / "a" / split).read_bytes() == (tmp_path / "b" / split).read_bytes()
    again = plugged(config(tmp_path / "b", shots))
    assert shown(again, tmp_path / "b") == results[1][0], "a second run reads what the first has made"


def test_a_data_free_run_makes_no_split(tmp_path, monkeypatch):
    folder = without_split("DescribableTextures", tmp_path)
    checkout_class, plugged = pair("DescribableTextures")
    monkeypatch.setattr(
        checkout_class, "make_split", lambda self: pytest.fail("it looked at training images")
    )
    with pytest.raises(UserError, match=r"split_zhou_DescribableTextures\.json"):
        plugged(config(tmp_path, TEACHER__FILE="teacher.safetensors"))
    assert [path.name for path in folder.iterdir()] == ["images"]


def test_a_checkout_that_cannot_make_it_says_why(tmp_path, monkeypatch):
    without_split("OxfordPets", tmp_path)
    checkout_class, plugged = pair("OxfordPets")

    def make_split(self):
        raise FileNotFoundError("annotations/trainval.txt")

    monkeypatch.setattr(checkout_class, "make_split", make_split)
    with pytest.raises(UserError, match=r"annotations/trainval\.txt"):
        plugged(config(tmp_path))


def test_alone_there_is_no_split_to_make(tmp_path):
    without_split("OxfordPets", tmp_path)
    with pytest.raises(UserError, match=r"dfzsl\.prepare OxfordPets"):
        DATASET_REGISTRY.get("OxfordPets")(config(tmp_path))
