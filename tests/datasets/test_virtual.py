import sys
from collections import Counter

import fake_data
import pytest
import torch
import torch.nn.functional as F
from dassl.config import get_cfg_default
from dassl.data import DataManager
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from draws import rng
from hypothesis import given, settings
from hypothesis import strategies as st

import dfzsl.datasets  # noqa: F401  (registers the data sets)
from dfzsl.datasets.virtual_features import DataFreeManager, VirtualLoader
from dfzsl.trainers.recovery.virtual_classes import VirtualClasses
from dfzsl.utils.errors import UserError

NAMES = ["ant", "bee", "cat"]


def classes(kappa=50.0, weight=None):
    mu = F.normalize(torch.randn(3, 8, generator=rng(9)), dim=1)
    return VirtualClasses(mu, torch.full((3,), kappa), NAMES, mu if weight is None else weight)


def whole_pass(loader):
    batches = list(loader)
    return {key: torch.cat([b[key] for b in batches]) for key in ("img", "label", "index")}


@given(batch_size=st.integers(1, 50), num=st.integers(1, 20), filter=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_pass_is_made_of_dassls_batches(batch_size, num, filter):
    loader = VirtualLoader(classes(), batch_size, num, filter=filter, generator=rng())
    batches = list(loader)
    whole = 3 * num >= batch_size
    assert len(batches) == len(loader) == (3 * num // batch_size if whole else 1)
    for batch in batches:
        n = batch_size if whole else 3 * num
        assert set(batch) == {"img", "label", "domain", "impath", "index"}
        assert batch["img"].shape == (n, 8) and batch["label"].shape == batch["domain"].shape == (n,)
        assert len(batch["impath"]) == n and not any(batch["impath"])
        assert torch.allclose(batch["img"].norm(dim=1), torch.ones(n), atol=1e-5)
    places = torch.cat([batch["index"] for batch in batches]).tolist()
    assert len(set(places)) == len(places)


def test_classes_are_balanced_and_shuffled():
    seen = whole_pass(VirtualLoader(classes(), 10, 20, generator=rng()))
    assert Counter(seen["label"].tolist()) == {0: 20, 1: 20, 2: 20}
    assert seen["label"].tolist() != sorted(seen["label"].tolist())


def test_fresh_draws_or_a_fixed_pool():
    fresh = VirtualLoader(classes(), 10, 20, fresh=True, generator=rng())
    first, second = whole_pass(fresh), whole_pass(fresh)
    assert not torch.equal(first["img"].sort(0)[0], second["img"].sort(0)[0])
    pool = VirtualLoader(classes(), 10, 20, fresh=False, generator=rng())
    first, second = whole_pass(pool), whole_pass(pool)
    assert torch.equal(first["img"].sort(0)[0], second["img"].sort(0)[0])
    assert not torch.equal(first["index"], second["index"])


@pytest.mark.parametrize("fresh", (True, False))
def test_the_seed_decides_every_pass(fresh):
    one, two = (VirtualLoader(classes(), 7, 5, fresh=fresh, generator=rng(3)) for _ in range(2))
    for _ in range(3):
        a, b = whole_pass(one), whole_pass(two)
        assert torch.equal(a["img"], b["img"]) and torch.equal(a["label"], b["label"])
    other = whole_pass(VirtualLoader(classes(), 7, 5, fresh=fresh, generator=rng(4)))
    assert not torch.equal(other["img"], a["img"])


def test_the_filter_keeps_samples_that_the_teacher_recognizes(caplog):
    caplog.set_level("INFO", logger="dfzsl")
    loose = classes(kappa=4.0)
    loader = VirtualLoader(loose, 10, 200, filter=True, generator=rng())
    features, labels = loader.draw()
    assert ((features @ loose.weight.T).argmax(1) == labels).all()
    assert torch.bincount(labels).tolist() == [200] * 3
    unfiltered, truth = loose.sample(2000, rng(5))
    assert loader.acceptance_rate == pytest.approx(
        float(loose.assigned_to_own_class(unfiltered, truth).float().mean()), abs=0.06
    )
    assert loader.acceptance_rate < 0.9
    next(iter(loader))
    assert f"{loader.acceptance_rate:.1%}" in caplog.text
    plain = VirtualLoader(loose, 10, 200, filter=False, generator=rng())
    features, labels = plain.draw()
    assert ((features @ loose.weight.T).argmax(1) != labels).any()
    next(iter(plain))
    assert "not filtered" in caplog.text


def test_a_class_that_the_teacher_rejects_stays_unfiltered(caplog):
    mu = classes().mu
    rejected = classes(1000.0, weight=torch.stack([mu[0], -mu[1], mu[2]]))
    loader = VirtualLoader(rejected, 10, 10, filter=True, generator=rng())
    batch = whole_pass(loader)
    assert torch.bincount(batch["label"]).tolist() == [10] * 3
    assert (batch["img"][batch["label"] == 1] @ mu.T).argmax(1).eq(1).all()
    assert loader.unfiltered_classes == [rejected.classnames[1]]
    assert loader.unfiltered_classes[0] in caplog.text
    with pytest.raises(UserError):
        VirtualLoader(classes(), 10, 0)


def config(root, teacher, name="DescribableTextures", subsample="base"):
    cfg = get_cfg_default()
    cfg.merge_from_list(
        [
            "DATASET.NAME",
            name,
            "DATASET.ROOT",
            str(root),
            "TEACHER.FILE",
            teacher,
            "DATALOADER.NUM_WORKERS",
            0,
        ]
    )
    cfg.DATASET.SUBSAMPLE_CLASSES = subsample
    return cfg


OPENED: list[str] | None = None


def _note(event, arguments):
    if OPENED is not None and event == "open":
        OPENED.append(str(arguments[0]))


@pytest.fixture
def opened(monkeypatch):
    """The paths of all files that are opened in the test, by whatever library."""
    sys.addaudithook(_note)
    monkeypatch.setattr(sys.modules[__name__], "OPENED", [])
    return OPENED


def test_no_training_image_can_be_reached(tmp_path, opened):
    root = fake_data.make("DescribableTextures", tmp_path)
    real = DataManager(config(root, teacher=""))
    training = {datum.impath for datum in [*real.dataset.train_x, *real.dataset.val]}
    tests = {datum.impath for datum in real.dataset.test}
    assert training and tests and not training & tests
    # Not even their presence matters: they are gone before the data-free manager is built.
    for path in training:
        (tmp_path / path).unlink()
    opened.clear()
    manager = DataFreeManager(config(root, teacher="teacher.safetensors"))
    assert manager.train_loader_x is manager.train_loader_u is None
    assert manager.val_loader is manager.test_loader is None
    assert not manager.dataset.train_x and not manager.dataset.val
    assert {datum.impath for datum in manager.dataset.test} == tests
    assert not training & set(opened)
    assert manager.num_classes == real.num_classes == 3
    assert manager.lab2cname == real.lab2cname
    assert manager.num_source_domains == real.num_source_domains
    held = [vars(value) for value in (manager, manager.dataset) if hasattr(value, "__dict__")]
    assert not any(path in repr(held) for path in training)


def test_a_data_set_that_reads_training_images_is_refused(tmp_path, monkeypatch):
    (tmp_path / "one.jpg").write_bytes(b"")

    class Careless(DatasetBase):
        def __init__(self, cfg):
            item = Datum(str(tmp_path / "one.jpg"), 0, 0, "one")
            super().__init__(train_x=[item], test=[item])

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Careless", Careless)
    with pytest.raises(UserError, match="Careless"):
        DataFreeManager(config(tmp_path, "teacher.safetensors", "Careless"))
