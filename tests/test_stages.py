"""The three stages called one by one, and through `build`, make the same classifier."""

from __future__ import annotations

import logging
import random
import sys

import pytest
import torch
from conftest import CLASSES, unit

import dfzsl
from dfzsl.datasets.names_only import ClassNames
from dfzsl.trainers.clip.loading import BUILT_IN_FOLDER, load_backbone
from dfzsl.trainers.recovery.feature_statistics import FeatureStatistics
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import UserError

BASE, NEW = list(CLASSES[:5]), list(CLASSES[5:])
QUICK = ("OPTIM.MAX_EPOCH", "2", "RECOVERY.NUM_PER_CLASS", "16", "DATALOADER.TRAIN_X.BATCH_SIZE", "16")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("shapes")


@pytest.fixture(scope="module")
def teacher(backbone) -> Teacher:
    """Class weights near the text embeddings of their classes, off by noise."""
    text = backbone.class_features(BASE, ["a photo of a {}."])
    noise = torch.randn(text.shape, generator=torch.Generator().manual_seed(0)) / text.shape[1] ** 0.5
    return Teacher(torch.from_numpy(unit((text + 0.5 * noise).numpy())), BASE, backbone.identity)


@pytest.mark.parametrize("level", ["weights", "logits"])
def test_stages_by_hand_equal_build(teacher, backbone, level):
    built = dfzsl.build(teacher, NEW, access=level, seed=3, settings=QUICK)

    statistics = FeatureStatistics.load(BUILT_IN_FOLDER / "geometry.safetensors")
    text = [backbone.class_features(names, [ClassNames.template]) for names in (BASE, NEW)]
    virtual = dfzsl.recover(
        dfzsl.open_oracle(teacher, level),
        text[0],
        BASE,
        new_text=text[1],
        generator=torch.Generator().manual_seed(3),
        geometry=statistics,
    )
    aligned = dfzsl.align(virtual, NEW, seed=3, settings=QUICK)
    classifier = dfzsl.generate(virtual, aligned, generator=torch.Generator().manual_seed(3))

    for name in ("weight", "bias", "shift", "text_map", "text_shift"):
        assert torch.equal(getattr(classifier, name), getattr(built, name)), name
    assert classifier.decision == built.decision
    assert classifier.decision.new_classes == len(NEW)
    assert classifier.decision.teacher_weight > 0


def test_a_finished_build_is_read_from_its_folder(teacher, tmp_path):
    built = dfzsl.build(teacher, NEW, folder=tmp_path, settings=QUICK)
    again = dfzsl.build(teacher, NEW, folder=tmp_path, settings=QUICK)
    assert torch.equal(built.weight, again.weight)
    assert built.decision and again.decision is None


def test_a_folder_keeps_what_it_was_made_of(teacher, backbone, tmp_path):
    other = Teacher(teacher.weight.flip(0), BASE, backbone.identity)
    dfzsl.build(teacher, NEW, folder=tmp_path / "build", settings=QUICK)
    was = (tmp_path / "build/teacher.safetensors").read_bytes()
    with pytest.raises(UserError, match="another teacher"):
        dfzsl.build(other, NEW, folder=tmp_path / "build", settings=QUICK)
    assert (tmp_path / "build/teacher.safetensors").read_bytes() == was

    text = backbone.class_features(BASE, [ClassNames.template])
    first, second = (dfzsl.recover(dfzsl.open_oracle(t, "weights"), text, BASE) for t in (teacher, other))
    dfzsl.align(first, NEW, folder=tmp_path / "align", settings=QUICK)
    with pytest.raises(UserError, match="virtual classes"):
        dfzsl.align(second, NEW, folder=tmp_path / "align", settings=QUICK)


def test_calls_leave_the_process_as_it_was(teacher, capfd):
    torch.manual_seed(7)
    random.seed(7)
    expected = torch.rand(1), random.random()
    torch.manual_seed(7)
    random.seed(7)
    log = logging.getLogger("dfzsl")
    before = log.level, list(log.handlers), sys.stdout
    dfzsl.build(teacher, NEW, settings=QUICK)
    assert (torch.rand(1), random.random()) == expected
    assert (log.level, list(log.handlers), sys.stdout) == before
    assert capfd.readouterr() == ("", "")


def test_a_classifier_of_base_classes_alone(teacher):
    built = dfzsl.build(teacher, [], settings=QUICK)
    assert built.classnames == BASE and not built.is_new.any()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(teacher, seed):
    with pytest.raises(UserError, match=str(seed)):
        dfzsl.build(teacher, NEW, seed=seed, settings=QUICK)


def test_an_integer_is_a_value_of_a_float_key(teacher):
    built = dfzsl.build(teacher, NEW, settings=(*QUICK, "RECOVERY.THETA", "2"))
    assert torch.equal(
        built.weight, dfzsl.build(teacher, NEW, settings=(*QUICK, "RECOVERY.THETA", "2.0")).weight
    )


def test_class_names_are_a_data_set_without_images():
    names = ClassNames(BASE, NEW)
    assert names.classnames == BASE and names.num_classes == len(BASE)
    assert names.new_classnames == NEW and names.all_classnames == [*BASE, *NEW]
    assert not (names.train_x or names.train_u or names.val or names.test)
