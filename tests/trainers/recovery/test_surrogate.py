import pytest
import torch
import torch.nn.functional as F
from draws import rng

from dfzsl.trainers.recovery.surrogate import fit_surrogate
from dfzsl.utils.errors import UserError

C, D = 5, 24


def directions(n, seed):
    return F.normalize(torch.randn(n, D, generator=rng(seed)), dim=1)


def teacher():
    weight, bias = directions(C, 1), 0.1 * torch.randn(C, generator=rng(2))
    return weight - weight.mean(0), bias - bias.mean()


@pytest.mark.parametrize(("n", "nearness"), [(300, 0.8), (2000, 0.95), (8000, 0.98)])
def test_it_approaches_the_teacher_with_more_labels(n, nearness):
    weight, bias = teacher()
    x = directions(n, 3)
    surrogate = fit_surrogate(x, (x @ weight.T + bias).argmax(1), C)
    true, estimate = (
        torch.cat([w, b[:, None]], 1) for w, b in ((weight, bias), (surrogate.weight, surrogate.bias))
    )
    assert F.cosine_similarity(estimate.flatten(), true.flatten(), dim=0) > nearness
    assert surrogate.weight.sum(0).abs().max() < 1e-4
    assert surrogate.weight.square().sum(1).mean() == pytest.approx(1, rel=1e-4)
    error = (F.normalize(estimate.flatten(), dim=0) - F.normalize(true.flatten(), dim=0)).norm()
    assert error / 3 < surrogate.error < 3 * error


def test_a_class_without_a_label_has_the_row_0():
    x = directions(500, 3)
    labels = (x @ teacher()[0][:3].T).argmax(1)
    surrogate = fit_surrogate(x, labels, C)
    assert torch.isfinite(surrogate.weight).all() and surrogate.weight[3:].abs().max() < 1e-6
    assert (surrogate.weight @ x.T + surrogate.bias[:, None]).argmax(0).max() < 3


def test_labels_that_are_noise_are_refused():
    with pytest.raises(UserError, match="60 labels"):
        fit_surrogate(directions(60, 3), torch.randint(C, (60,), generator=rng(4)), C)
