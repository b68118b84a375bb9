"""Stage 3 in closed form: what it computes, what it keeps, and that it works on a small world like CLIP's."""

import pytest
import torch
import torch.nn.functional as F
from draws import rng, unit

from dfzsl.trainers.generation.closed_form import closed_form
from dfzsl.trainers.recovery.feature_statistics import measure_feature_statistics
from dfzsl.trainers.recovery.mixture import mix, teacher_rows

DIM, BASE, NEW = 32, 80, 12


@pytest.fixture(scope="module")
def world():
    """(text of base and new classes, true directions of both): text tells of them through a linear map."""
    g = rng(6)
    truth = unit(torch.randn(BASE + NEW, DIM, generator=g))
    turn = torch.linalg.qr(torch.eye(DIM) + 0.7 * torch.randn(DIM, DIM, generator=g) / DIM**0.5).Q
    text = unit(2 * torch.eye(DIM)[0] + truth @ turn + 0.1 * unit(torch.randn(BASE + NEW, DIM, generator=g)))
    return text, truth


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "geometry"])
def geometry(request):
    scale = torch.linspace(0.3, 2, DIM)
    return (
        measure_feature_statistics(torch.randn(500, DIM, generator=rng()) * scale) if request.param else None
    )


def made(world, geometry=None, **options):
    text, truth = world
    return closed_form(text[:BASE], text[BASE:], truth[:BASE], geometry=geometry, **options)


def test_base_decisions_are_those_of_the_mixture(world, geometry):
    text, truth = world
    x = torch.randn(200, DIM, generator=rng(1))
    mixture = mix(text[:BASE], truth[:BASE], torch.linspace(-1, 1, BASE), geometry=geometry)
    rows = closed_form(text[:BASE], text[BASE:], truth[:BASE], torch.linspace(-1, 1, BASE), geometry=geometry)
    expected = (x @ mixture.class_weights.T + mixture.bias).argmax(1)
    assert torch.equal((x @ rows.base_weight.T + rows.base_bias).argmax(1), expected)


def test_either_group_keeps_the_spread_of_its_text(world, geometry):
    text, _ = world
    rows = made(world, geometry)
    middle = text.mean(0)
    for group, own, around in (
        (rows.base_weight, text[:BASE], text[:BASE].mean(0)),
        (rows.new_weight, text[BASE:], middle),
    ):
        lengths = [float((part - around).square().sum(1).mean()) for part in (group, own)]
        assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)


def test_new_rows_are_the_map_of_their_text(world, geometry):
    rows = made(world, geometry)
    assert torch.allclose(world[0][BASE:] @ rows.text_map + rows.text_shift, rows.new_weight, atol=1e-5)


def test_text_that_predicts_the_teacher_improves_new_weights(world):
    """New directions are found far better than by text where the law holds; where it does not, text stays."""
    text, truth = world

    def accuracy(rows):
        return (truth[BASE:] @ (rows - rows.mean(0)).T).argmax(1).eq(torch.arange(NEW)).float().mean()

    by_text = accuracy(text[BASE:])
    assert accuracy(made(world).new_weight) > by_text + 0.2
    shuffled = truth[:BASE][torch.randperm(BASE, generator=rng(2))]
    astray = closed_form(text[:BASE], text[BASE:], shuffled)
    assert torch.allclose(astray.new_weight, text[BASE:], atol=1e-2)


def test_the_owners_weight_decides(world):
    text, truth = world
    rows = made(world, owner_weight=0.0)
    assert torch.allclose(rows.base_weight, text[:BASE], atol=1e-5)
    alone = made(world, owner_weight=1e6).base_weight
    cosine = F.cosine_similarity(alone - alone.mean(0), teacher_rows(truth[:BASE])[0], dim=1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("new", [0, 1])
def test_one_new_class_or_none(world, geometry, new):
    text, truth = world
    rows = closed_form(text[:BASE], text[BASE : BASE + new], truth[:BASE], geometry=geometry)
    assert rows.new_weight.shape == (new, DIM) and torch.isfinite(rows.new_weight).all()
    assert torch.isfinite(rows.text_map).all()
