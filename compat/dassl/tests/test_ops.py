"""dassl.modeling.ops against the formulas, written out for one image or pair at a time."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dassl.modeling import ops
from dassl.modeling.ops import utils
from torch import nn
from torch.distributions import Beta


def test_probabilities_and_labels():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    sharp = utils.sharpen_prob(p, 3)
    for row, got in zip(p.tolist(), sharp, strict=True):
        cubes = [value**3 for value in row]
        assert got.tolist() == pytest.approx([cube / sum(cubes) for cube in cubes])
    assert torch.allclose(utils.sharpen_prob(p), p**2 / (p**2).sum(1, keepdim=True))
    label = torch.tensor([2, 0, 1])
    onehot = utils.create_onehot(label, 4)
    assert onehot.dtype == torch.float32 and torch.equal(onehot, F.one_hot(label, 4).float())
    data = torch.arange(6).view(3, 2)
    torch.manual_seed(3)
    order = torch.randperm(3)
    torch.manual_seed(3)
    shuffled = utils.shuffle_index(data, label)
    assert torch.equal(shuffled[0], data[order]) and torch.equal(shuffled[1], label[order])
    reverse = utils.reverse_index(data, label)
    assert reverse[0].tolist() == [[4, 5], [2, 3], [0, 1]] and reverse[1].tolist() == [1, 0, 2]


def test_rampups():
    assert [utils.linear_rampup(step, 4) for step in (-1, 0, 1, 4, 9)] == [0, 0, 0.25, 1, 1]
    assert utils.sigmoid_rampup(0, 5) == pytest.approx(math.exp(-5)) and utils.sigmoid_rampup(7, 5) == 1
    assert utils.sigmoid_rampup(2, 5) == pytest.approx(math.exp(-5 * 0.36))
    for rampup in (utils.linear_rampup, utils.sigmoid_rampup):
        with pytest.raises(AssertionError):
            rampup(1, 0)


def test_moving_average():
    model, mean = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(model.weight, 3.0)
    model.running_mean += 1
    utils.ema_model_update(model, mean, 0.75)
    assert mean.weight.tolist() == [1.5, 1.5] and mean.running_mean.tolist() == [0, 0]
    assert mean.weight.requires_grad and mean.weight.grad_fn is None


def test_mixup():
    x1, x2, y1, y2 = torch.rand(5, 3, 2, 2), torch.rand(5, 3, 2, 2), torch.eye(5), torch.rand(5, 5)
    for keep in (False, True):
        torch.manual_seed(1)
        x, y = ops.mixup(x1, x2, y1, y2, 0.4, preserve_order=keep)
        torch.manual_seed(1)
        shares = Beta(0.4, 0.4).sample([5, 1, 1, 1]).flatten().tolist()
        for i, share in enumerate(shares):
            share = max(share, 1 - share) if keep else share
            assert torch.allclose(x[i], x1[i] * share + x2[i] * (1 - share))
            assert torch.allclose(y[i], y1[i] * share + y2[i] * (1 - share))


def restyled(x, other, share, eps=1e-6):
    """MixStyle of one channel."""
    own, its = (x.mean(), math.sqrt(x.var(ddof=1) + eps)), (other.mean(), math.sqrt(other.var(ddof=1) + eps))
    mean, deviation = (a * share + b * (1 - share) for a, b in zip(own, its, strict=True))
    return (x - own[0]) / own[1] * deviation + mean


def exchanged(x, other, share):
    """EFDMix of one channel: each value and the other image's value of the same rank."""
    ranks = x.flatten().argsort(kind="stable").argsort(kind="stable")
    return x * share + np.sort(other.flatten())[ranks].reshape(x.shape) * (1 - share)


@pytest.mark.parametrize("mix", ["random", "crossdomain"])
@pytest.mark.parametrize("kind, one", [(ops.MixStyle, restyled), (ops.EFDMix, exchanged)])
def test_mixed_features(kind, one, mix):
    layer, x = kind(p=0.7, alpha=0.3, mix=mix), torch.randn(6, 2, 4, 5)
    untouched = 0
    for seed in range(20):
        random.seed(seed)
        torch.manual_seed(seed)
        got = layer(x)
        random.seed(seed)
        torch.manual_seed(seed)
        if random.random() > 0.7:
            assert got is x
            untouched += 1
            continue
        shares = Beta(0.3, 0.3).sample((6, 1, 1, 1)).flatten().tolist()
        if mix == "random":
            partners = torch.randperm(6).tolist()
        else:
            partners = [[5, 4, 3][i] for i in torch.randperm(3)] + [[2, 1, 0][i] for i in torch.randperm(3)]
        for i, (share, partner) in enumerate(zip(shares, partners, strict=True)):
            for channel in range(2):
                expected = one(x[i, channel].double().numpy(), x[partner, channel].double().numpy(), share)
                assert np.allclose(got[i, channel], expected, atol=1e-4)
    assert 0 < untouched < 20


@pytest.mark.parametrize("name", ["mixstyle", "efdmix"])
def test_switches(name):
    kind = {"mixstyle": ops.MixStyle, "efdmix": ops.EFDMix}[name]
    layer = kind(p=1.0)
    model, x = nn.Sequential(nn.Identity(), layer), torch.randn(4, 2, 3, 3)
    assert repr(layer) == f"{kind.__name__}(p=1.0, alpha=0.1, eps=1e-06, mix=random)"

    def changes():
        return model(x) is not x

    assert changes()
    model.eval()
    assert not changes()
    model.train()
    with getattr(ops, f"run_without_{name}")(model):
        assert not changes()
    assert changes()
    model.apply(getattr(ops, f"deactivate_{name}"))
    assert not changes()
    with getattr(ops, f"run_with_{name}")(model, mix="crossdomain"):
        assert changes() and layer.mix == "crossdomain"
    assert not changes()
    model.apply(getattr(ops, f"activate_{name}"))
    model.apply(getattr(ops, f"random_{name}"))
    assert changes() and layer.mix == "random"
    model.apply(getattr(ops, f"crossdomain_{name}"))
    assert layer.mix == "crossdomain"
    layer.update_mix_method("other")
    with pytest.raises(NotImplementedError, match="random or crossdomain"):
        model(x)
    try:
        with getattr(ops, f"run_without_{name}")(model):
            raise KeyError
    except KeyError:
        assert layer._activated, "switched back after an error"


def test_gradients_of_mixed_features():
    """EFDMix: an image's values count whole, and by their share where they are lent."""
    x = torch.randn(3, 1, 4, 4, requires_grad=True)
    torch.manual_seed(0)
    ops.EFDMix(p=1.0)(x).sum().backward()
    torch.manual_seed(0)
    shares, partners = Beta(0.1, 0.1).sample((3, 1, 1, 1)).flatten(), torch.randperm(3)
    expected = torch.ones(3).index_add(0, partners, 1 - shares)
    assert torch.allclose(x.grad, expected[:, None, None, None].expand_as(x))
    x.grad = None
    ops.MixStyle(p=1.0)(x).sum().backward()
    each = x.grad.flatten(1)
    assert torch.allclose(each, each[:, :1].expand_as(each)), "one factor an image"


KERNELS = {
    "linear": lambda a, b: a @ b,
    "poly": lambda a, b: (a @ b + 2) ** 2,
    "rbf": lambda a, b: sum(math.exp(-((a - b) ** 2).sum() / (2 * s * s)) for s in (1, 5, 10)),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_maximum_mean_discrepancy(name, normalize):
    x, y = torch.randn(4, 3), torch.randn(5, 3) + 1
    got = ops.MaximumMeanDiscrepancy(name, normalize)(x, y)
    a, b = (rows.double().numpy() for rows in ((F.normalize(x), F.normalize(y)) if normalize else (x, y)))
    kernel = KERNELS[name]
    within = [
        np.mean([kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j])
        for rows in (a, b)
    ]
    between = np.mean([kernel(p, q) for p in a for q in b])
    assert got.item() == pytest.approx(sum(within) - 2 * between, rel=1e-4, abs=1e-5)


def test_unknown_kernel():
    with pytest.raises(NotImplementedError, match="kernel_type"):
        ops.MaximumMeanDiscrepancy("laplace")(torch.ones(2, 2), torch.ones(2, 2))


def test_reversed_gradient():
    x = torch.randn(3, requires_grad=True)
    out = ops.ReverseGrad()(x, 0.3)
    assert torch.equal(out, x)
    (out * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == pytest.approx([-0.3, -0.6, -0.9])
    with pytest.raises(AssertionError, match="non-negative"):
        ops.ReverseGrad()(x, -1.0)


@pytest.mark.parametrize("smooth", [0, 0.2])
def test_cross_entropy(smooth):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    target = F.one_hot(labels, 3) * (1 - smooth) + smooth / 3
    each = -(target * logits.log_softmax(1)).sum(1)
    assert torch.allclose(ops.cross_entropy(logits, labels, smooth, "none"), each)
    assert torch.allclose(ops.cross_entropy(logits, labels, smooth), each.mean())
    assert torch.allclose(ops.cross_entropy(logits, labels, smooth, reduction="sum"), each.sum())
    with pytest.raises(ValueError):
        ops.cross_entropy(logits, labels, smooth, "all")


def test_normalisation_by_domain():
    layer, x = ops.DSBN2d(3, 2), torch.randn(4, 3, 2, 2) + 5
    layer.select_bn(1)
    assert torch.allclose(layer(x), nn.BatchNorm2d(3)(x))
    assert layer.bn[0].running_mean.abs().sum() == 0 and layer.bn[1].running_mean.min() > 0.3
    assert isinstance(ops.DSBN1d(3, 2).bn[0], nn.BatchNorm1d)
    with pytest.raises(AssertionError, match="2 domains"):
        layer.select_bn(2)


def test_sequence_of_several_values():
    class Pair(nn.Module):
        def forward(self, a, b):
            return a + b, a - b

    assert ops.Sequential2(Pair(), Pair())(torch.tensor(3), torch.tensor(1)) == (6, 2)
