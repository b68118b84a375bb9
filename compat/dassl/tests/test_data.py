import random

import numpy as np
import pytest
import torch
from dassl.data import DataManager, DatasetWrapper
from dassl.data.data_manager import build_data_loader
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum, build_dataset
from dassl.data.samplers import build_sampler
from dassl.data.transforms import build_transform
from PIL import Image


@pytest.fixture
def items(images):
    """Labels 0 0 0 0 0 2 1 1 ... in an order which is not that of the labels; domains in turn."""
    paths = sorted((images / "tiny_pets" / "images").glob("*/*.png"))
    labels = [0] * 5 + [2] + [1] * 4 + [2] * 7
    return [
        Datum(str(path), label, i % 3, f"name {label}")
        for i, (path, label) in enumerate(zip(paths, labels, strict=False))
    ]


def test_datum_is_checked(items):
    datum = items[0]
    assert vars(datum) == {
        "_impath": datum.impath,
        "_label": 0,
        "_domain": 0,
        "_classname": "name 0",
    }
    with pytest.raises(AssertionError, match="no file"), pytest.warns(UserWarning):
        Datum("/none.png")
    with pytest.raises(AssertionError, match="string"):
        Datum(3)


def test_dataset_base(items):
    dataset = DatasetBase(train_x=items, train_u=items[:2], val=None, test=items[2:3])
    assert dataset.num_classes == 3
    assert dataset.lab2cname == {0: "name 0", 1: "name 1", 2: "name 2"}
    assert dataset.classnames == ["name 0", "name 1", "name 2"]
    assert dataset.train_x is items and dataset.val is None
    assert len(dataset.train_u) == 2 and dataset.test == items[2:3]
    assert list(dataset.split_dataset_by_label(items)) == [0, 2, 1]
    assert [len(v) for v in dataset.split_dataset_by_domain(items).values()] == [6, 6, 5]
    dataset.domains = ["a", "b"]
    dataset.check_input_domains(["a"], ["b"])
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*\[c\]"):
        dataset.check_input_domains(["a"], ["c"])


def test_empty_classes_are_named(items):
    with pytest.raises(ValueError, match="class 1"):
        DatasetBase(train_x=[item for item in items if item.label != 1])
    with pytest.raises(ValueError, match="training set"):
        DatasetBase(train_x=[])


def test_a_subclass_may_say_its_classes_itself(items):
    class NamesOnly(DatasetBase):
        @staticmethod
        def get_num_classes(data_source):
            return 2

        @staticmethod
        def get_lab2cname(data_source):
            return {0: "a", 1: "b"}, ["a", "b"]

    dataset = NamesOnly(train_x=[], test=items)
    assert dataset.num_classes == 2 and dataset.classnames == ["a", "b"]


def test_few_shot_draws(items, capsys):
    dataset = DatasetBase(train_x=items)
    by_label = {label: [i for i in items if i.label == label] for label in (0, 2, 1)}
    random.seed(1)
    drawn = dataset.generate_fewshot_dataset(items, num_shots=2)
    random.seed(1)
    assert drawn == [item for label in (0, 2, 1) for item in random.sample(by_label[label], 2)]
    assert capsys.readouterr().out == "Creating a 2-shot dataset\n"

    # Fewer than asked for: all of them, in their order, without a draw.
    random.seed(1)
    drawn = dataset.generate_fewshot_dataset(items, num_shots=5)
    random.seed(1)
    expected = random.sample(by_label[0], 5) + random.sample(by_label[2], 5) + by_label[1]
    assert drawn == expected
    note = "Note: fewer than 5 items in 1 of 3 classes, all of them taken: name 1 (4)\n"
    assert capsys.readouterr() == ("Creating a 5-shot dataset\n", note)

    random.seed(1)
    drawn = dataset.generate_fewshot_dataset(items, num_shots=5, repeat=True)
    random.seed(1)
    sampled = random.sample(by_label[0], 5) + random.sample(by_label[2], 5)
    assert drawn == sampled + random.choices(by_label[1], k=5)


def test_few_shot_sources(items):
    dataset = DatasetBase(train_x=items)
    assert dataset.generate_fewshot_dataset(items) is items
    assert list(dataset.generate_fewshot_dataset(items, items[:1], num_shots=0)) == [items, items[:1]]
    train, val = dataset.generate_fewshot_dataset(items, items[:6], num_shots=1)
    assert [i.label for i in train] == [0, 2, 1] and [i.label for i in val] == [0, 2]


def test_unknown_dataset(make_cfg):
    with pytest.raises(ValueError, match="TinyPets"):
        build_dataset(make_cfg("DATASET.NAME", "TinyPet"))


# Samplers


def test_domain_samplers(items):
    random.seed(0)
    sampler = build_sampler("RandomDomainSampler", data_source=items, batch_size=4, n_domain=2)
    order = list(sampler)
    assert len(order) % 4 == 0 and len(set(order)) == len(order)
    for i in range(0, len(order), 4):
        domains = [items[j].domain for j in order[i : i + 4]]
        assert domains[0] == domains[1] != domains[2] == domains[3]
    sampler = build_sampler("SeqDomainSampler", data_source=items, batch_size=6)
    order = list(sampler)
    # Domain 2 has five items, so two batches of two each.
    assert len(sampler) == len(order) == 12
    assert [items[j].domain for j in order] == [0, 0, 1, 1, 2, 2] * 2
    for n_domain, batch_size in ((2, 5), (4, 4), (3, 30)):
        with pytest.raises(ValueError, match="domain"):
            build_sampler("RandomDomainSampler", data_source=items, batch_size=batch_size, n_domain=n_domain)


def test_class_sampler(items):
    random.seed(0)
    np.random.seed(0)
    sampler = build_sampler("RandomClassSampler", data_source=items, batch_size=10, n_ins=5)
    order = list(sampler)
    assert len(order) % 10 == 0 and len(sampler) == 10
    for i in range(0, len(order), 5):
        labels = {items[j].label for j in order[i : i + 5]}
        assert len(labels) == 1
        # Class 1 has four items: drawn with replacement; the others without.
        assert labels == {1} or len(set(order[i : i + 5])) == 5
    with pytest.raises(ValueError, match="classes"):
        build_sampler("RandomClassSampler", data_source=items, batch_size=40, n_ins=10)


def test_unknown_sampler(items):
    with pytest.raises(ValueError, match="Random"):
        build_sampler("Random", data_source=items)


# Loaders


def test_data_manager(make_cfg, capsys):
    cfg = make_cfg("DATALOADER.TEST.BATCH_SIZE", 5)
    dm = DataManager(cfg)
    out = capsys.readouterr().out
    assert "Loading dataset: TinyPets\nBuilding transform_train\n" in out
    assert out.endswith(
        "---------  --------\n"
        "Dataset    TinyPets\n"
        "# classes  4\n"
        "# train_x  20\n"
        "# val      8\n"
        "# test     12\n"
        "---------  --------\n"
    )
    assert (dm.num_classes, dm.num_source_domains) == (4, 0)
    assert dm.lab2cname == {i: f"class_{i}" for i in range(4)} and dm.dataset.classnames[3] == "class_3"
    # Training drops the last incomplete batch (20 = 3 * 6 + 2), testing does not.
    assert (len(dm.train_loader_x), len(dm.val_loader), len(dm.test_loader)) == (3, 2, 3)
    assert dm.train_loader_u is None
    batch = next(iter(dm.test_loader))
    assert list(batch) == ["label", "domain", "impath", "index", "img"]
    assert batch["img"].shape == (5, 3, 8, 8) and batch["img"].dtype == torch.float32
    assert batch["label"].tolist() == [0, 0, 0, 1, 1] and batch["index"].tolist() == [0, 1, 2, 3, 4]
    assert isinstance(batch["impath"], list) and batch["impath"][0] == dm.dataset.test[0].impath


def test_small_training_set_keeps_its_only_batch(make_cfg):
    dm = DataManager(make_cfg("DATALOADER.TRAIN_X.BATCH_SIZE", 32, "VERBOSE", False))
    assert [len(batch["label"]) for batch in dm.train_loader_x] == [20]


def test_train_u_and_domains(make_cfg, capsys):
    cfg = make_cfg(
        *("DATASET.NAME", "TinyUnlabelled", "DATASET.SOURCE_DOMAINS", "['odd']"),
        *("DATASET.TARGET_DOMAINS", "['even']"),
    )
    dm = DataManager(cfg)
    assert len(dm.train_loader_u.dataset) == 22 and dm.train_loader_u.batch_size == 6
    assert dm.num_source_domains == 1
    out = capsys.readouterr().out
    assert "\nSource     ('odd',)\nTarget     ('even',)\n# classes  4\n# train_x  20\n# train_u  22\n" in out
    cfg.defrost()
    cfg.DATALOADER.TRAIN_U.SAME_AS_X = False
    cfg.DATALOADER.TRAIN_U.BATCH_SIZE = 11
    cfg.DATALOADER.TRAIN_U.SAMPLER = "SequentialSampler"
    dm = DataManager(cfg)
    assert [len(batch["index"]) for batch in dm.train_loader_u] == [11, 11]


def test_custom_transforms_and_wrapper(make_cfg, capsys):
    class Wrapper(DatasetWrapper):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "extra": index}

    def to_size(image):
        return torch.tensor(image.size)

    dm = DataManager(
        make_cfg(),
        custom_tfm_train=[to_size, lambda image: to_size(image) + 1],
        custom_tfm_test=to_size,
        dataset_wrapper=Wrapper,
    )
    out = capsys.readouterr().out
    assert "* Using custom transform for training\n* Using custom transform for testing\n" in out
    batch = next(iter(dm.train_loader_x))
    assert batch["img"][0].tolist() == [24, 20] and batch["img2"][0].tolist() == [25, 21]
    assert torch.equal(batch["extra"], batch["index"])


def test_wrapper_options(make_cfg, items):
    cfg = make_cfg("DATALOADER.K_TRANSFORMS", 3, "DATALOADER.RETURN_IMG0", True)
    transform = build_transform(cfg, is_train=True)
    item = DatasetWrapper(cfg, items, transform=transform, is_train=True)[1]
    assert len(item["img"]) == 3 and not torch.equal(item["img"][0], item["img"][1])
    assert item["img0"].shape == (3, 8, 8) and item["index"] == 1 and item["label"] == 0
    image = Image.open(items[1].impath).convert("RGB")
    plain = build_transform(cfg, is_train=True, choices=["normalize"])(image)
    assert torch.equal(item["img0"], plain)
    # Several draws are for training alone.
    assert DatasetWrapper(cfg, items, transform=transform, is_train=False)[1]["img"].dim() == 3
    with pytest.raises(ValueError, match="3"):
        DatasetWrapper(cfg, items, is_train=True)
    cfg = make_cfg("INPUT.NO_TRANSFORM", True)
    assert build_transform(cfg) is None
    assert isinstance(DatasetWrapper(cfg, items)[0]["img"], Image.Image)


def test_lpclips_way(make_cfg):
    """lpclip's feature extractor builds its own loader."""
    cfg = make_cfg()
    dataset = build_dataset(cfg)
    wrapper = DatasetWrapper(
        cfg, dataset.test, transform=build_transform(cfg, is_train=False), is_train=False
    )
    loader = torch.utils.data.DataLoader(wrapper, batch_size=4, sampler=None, shuffle=False, drop_last=False)
    labels = [label for batch in loader for label in batch["label"].numpy().tolist()]
    assert labels == [item.label for item in dataset.test]


def test_random_stream_of_a_loader(make_cfg):
    """torch's global generator: the loader's seed, the sampler's seed, then the transforms, item by item."""
    dm = DataManager(make_cfg())
    torch.manual_seed(3)
    batches = list(dm.train_loader_x)
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
    wrapper = dm.train_loader_x.dataset
    for i, batch in enumerate(batches):
        assert batch["index"].tolist() == order[6 * i : 6 * i + 6]
        assert torch.equal(batch["img"], torch.stack([wrapper[j]["img"] for j in batch["index"].tolist()]))


def test_bad_data(make_cfg, tmp_path, items):
    for empty in ([], None):
        with pytest.raises(ValueError, match="items"):
            build_data_loader(make_cfg(), data_source=empty)
    # Four of the five items are drawn, one less than a batch.
    with pytest.raises(ValueError, match="batch"):
        build_data_loader(make_cfg(), "RandomClassSampler", items[:5], batch_size=5, n_ins=4)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    loader = build_data_loader(make_cfg(), data_source=[Datum(str(bad))], is_train=False)
    with pytest.raises(OSError, match=r"bad\.png"):
        next(iter(loader))


def test_download(tmp_path, capsys, items):
    import tarfile
    import zipfile

    source = tmp_path / "source.txt"
    source.write_text("content")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(source, "one.txt")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(source, "two.txt")
    dataset = DatasetBase(train_x=items)
    for kind in ("zip", "tar.gz"):
        target = tmp_path / kind / f"data.{kind}"
        dataset.download_data((tmp_path / f"a.{kind}").as_uri(), str(target), from_gdrive=False)
    assert (tmp_path / "zip" / "one.txt").read_text() == "content"
    assert (tmp_path / "tar.gz" / "two.txt").read_text() == "content"
    assert f"File extracted to {tmp_path / 'zip'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="zip"):
        dataset.download_data(source.as_uri(), str(tmp_path / "x.zip"), from_gdrive=False)


def test_download_without_gdown(items, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(ImportError, match="gdown"):
        DatasetBase(train_x=items).download_data("id", str(tmp_path / "x.zip"))


def test_registry_holds_third_parties():
    assert {"TinyPets", "TinyUnlabelled"} <= set(DATASET_REGISTRY.registered_names())
