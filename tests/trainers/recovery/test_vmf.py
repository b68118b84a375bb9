import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from draws import rng
from torch.distributions import kl_divergence

from dfzsl.trainers.recovery.vmf import (
    VonMisesFisher,
    concentration,
    fit,
    fit_classes,
    mean_resultant_length,
    sample_cosine,
)

DIMENSIONS = (3, 64, 512, 768)
KAPPAS = (1e-3, 50.0, 205.0, 1000.0, 1e4, 1e6)


def direction(d, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(d, generator=rng(seed), dtype=dtype), dim=0)


def cosine_density(d, kappa):
    """(1 - w, cdf) for w = mu.x on a fine grid, by quadrature of exp(kappa w) (1 - w^2)^((d-3)/2)."""
    a = float(mean_resultant_length(kappa, d))
    sd = math.sqrt(max(1 - a * a - (d - 1) * a / kappa, 1e-18)) if kappa > 1 else 1.0
    gap = np.linspace(max(1e-12, 1 - a - 40 * sd), min(2 - 1e-12, 1 - a + 40 * sd), 200_001)
    log_density = -kappa * gap + (d - 3) / 2 * np.log(gap * (2 - gap))
    density = np.exp(log_density - log_density.max())
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return gap, mass / mass[-1]


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_draws_follow_the_exact_law(d, kappa):
    mu = direction(d)
    x = VonMisesFisher(mu, kappa).sample((4000,), rng(1))
    assert torch.allclose(x.norm(dim=1), torch.ones(4000), atol=1e-5)
    # 1 - w = |x - mu|^2 / 2 keeps its digits in float32 where w does not.
    gap = 0.5 * (x.double() - mu.double()).square().sum(1)
    a = mean_resultant_length(kappa, d)
    assert abs((1 - gap).mean() - a) < 4 * gap.std() / math.sqrt(len(x)) + 1e-12
    grid, cdf = cosine_density(d, kappa)
    p = scipy.stats.kstest(gap.numpy(), lambda g: np.interp(g, grid, cdf)).pvalue
    assert p > 1e-3


@pytest.mark.parametrize("d", (2, 3, 7, 512))
def test_the_tangent_part_is_uniform(d):
    mu = direction(d)
    x = VonMisesFisher(mu, 5.0).sample((4000,), rng(2))
    tangent = F.normalize(x - (x @ mu)[:, None] * mu, dim=1)
    assert (tangent @ mu).abs().max() < 1e-2
    assert tangent.mean(0).norm() < 4 / math.sqrt(len(x))
    second = d - 1 if d > 2 else 1
    projected = tangent @ F.normalize(direction(d, 9) - (direction(d, 9) @ mu) * mu, dim=0)
    assert abs(projected.square().mean() * second - 1) < 0.15


def test_draws_repeat_with_the_seed_and_broadcast_over_the_batch():
    loc = torch.randn(3, 2, 8, generator=rng())
    vmf = VonMisesFisher(loc, torch.tensor([10.0, 1000.0]))
    x = vmf.sample((5, 4), rng(3))
    assert x.shape == (5, 4, 3, 2, 8)
    assert torch.equal(x, vmf.sample((5, 4), rng(3)))
    assert vmf.expand((7, 3, 2)).sample().shape == (7, 3, 2, 8)
    assert vmf.log_prob(x).shape == (5, 4, 3, 2)
    spread = (x - vmf.loc).norm(dim=-1).mean(dim=(0, 1, 2))
    assert spread[0] > 3 * spread[1]


@pytest.mark.parametrize("d", (2, 5, 40))
@pytest.mark.parametrize("kappa", (0.5, 100.0))
def test_gradients_in_mu_match_finite_differences(d, kappa):
    mu = direction(d, dtype=torch.float64).requires_grad_()
    target = direction(d, 5, torch.float64)

    def loss(mu):
        x = VonMisesFisher(mu, torch.tensor(kappa, dtype=torch.float64)).rsample((6,), rng(4))
        return (x @ target).square().sum() + VonMisesFisher(mu, kappa).log_prob(target)

    assert torch.autograd.gradcheck(loss, (mu,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("d", (3, 40, 512))
def test_gradient_of_log_prob_in_kappa_is_the_mean_cosine_gap(d):
    kappa = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    x, mu = direction(d, 1, torch.float64), direction(d, 2, torch.float64)
    VonMisesFisher(mu, kappa).log_prob(x).backward()
    assert kappa.grad == pytest.approx(float(x @ mu - mean_resultant_length(30.0, d)), rel=1e-9)


@pytest.mark.parametrize("d", (2, 3, 5, 10, 51, 64, 300))
@pytest.mark.parametrize("kappa", (1e-6, 1e-3, 0.7, 12.0, 205.0, 3e3, 1e6))
def test_against_scipys_bessel_functions_where_they_are_finite(d, kappa):
    nu = d / 2 - 1
    i0, i1 = scipy.special.ive(nu, kappa), scipy.special.ive(nu + 1, kappa)
    if not (i0 > 1e-290 and i1 > 1e-290):
        pytest.skip("underflows in scipy")
    vmf = VonMisesFisher(direction(d, dtype=torch.float64), kappa)
    assert mean_resultant_length(kappa, d) == pytest.approx(i1 / i0, rel=1e-11)
    log_peak = nu * math.log(kappa) - d / 2 * math.log(2 * math.pi) - math.log(i0)
    assert vmf.log_prob(vmf.loc) == pytest.approx(log_peak, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("d", (2, 3, 30, 512, 4096))
@pytest.mark.parametrize("kappa", (1e-6, 1e-2, 3.0, 500.0, 1e6))
def test_scalar_functions_are_finite_and_consistent_everywhere(d, kappa):
    a = mean_resultant_length(kappa, d)
    # Amos (1974): the bounds meet both for small and for large kappa.
    nu = d / 2 - 1
    lower = kappa / (nu + 0.5 + math.hypot(nu + 1.5, kappa))
    upper = min(kappa / (nu + math.hypot(nu + 2, kappa)), kappa / (nu + 0.5 + math.hypot(nu + 0.5, kappa)))
    assert lower * (1 - 1e-12) <= a <= upper * (1 + 1e-12)
    assert concentration(a, d) == pytest.approx(kappa, rel=1e-6)
    vmf = VonMisesFisher(direction(d, dtype=torch.float64), kappa)
    log_area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
    assert vmf.entropy() <= log_area + 1e-9
    assert vmf.kl_to_uniform() == pytest.approx(log_area - float(vmf.entropy()), rel=1e-9, abs=1e-7)


def test_in_three_dimensions_the_closed_form():
    for kappa in (0.01, 1.0, 30.0):
        assert mean_resultant_length(kappa, 3) == pytest.approx(1 / math.tanh(kappa) - 1 / kappa, rel=1e-10)


def test_in_two_dimensions_the_von_mises_distribution():
    mu = torch.tensor([math.cos(0.3), math.sin(0.3)], dtype=torch.float64)
    x = torch.tensor([math.cos(2.0), math.sin(2.0)], dtype=torch.float64)
    reference = torch.distributions.VonMises(torch.tensor(0.3).double(), torch.tensor(4.0).double())
    assert VonMisesFisher(mu, 4.0).log_prob(x) == pytest.approx(
        float(reference.log_prob(torch.tensor(2.0).double())), rel=1e-6
    )


@pytest.mark.parametrize("d", (3, 64, 512))
def test_moments_entropy_and_divergence_match_draws(d):
    p = VonMisesFisher(direction(d, dtype=torch.float64), 80.0)
    q = VonMisesFisher(direction(d, 1, torch.float64), 20.0)
    x = p.sample((10_000,), rng(6))
    assert (x.mean(0) - p.mean).norm() < 4 / math.sqrt(len(x))
    assert torch.allclose(x.var(0), p.variance, rtol=0.2, atol=2e-4)
    a, b = p.second_moment
    probe = direction(d, 8, torch.float64)
    assert (x @ probe).square().mean() == pytest.approx(float(a + b * (probe @ p.loc) ** 2), rel=0.06)
    log_ratio = p.log_prob(x) - q.log_prob(x)
    error = 4 * log_ratio.std() / math.sqrt(len(x))
    assert abs(kl_divergence(p, q) - log_ratio.mean()) < error
    assert abs(p.entropy() + p.log_prob(x).mean()) < error
    assert kl_divergence(p, p) == pytest.approx(0, abs=1e-9)


def test_float32_log_prob_keeps_its_digits_at_large_kappa():
    mu = direction(512, dtype=torch.float64)
    x = VonMisesFisher(mu, 1e6).sample((100,), rng())
    exact = VonMisesFisher(mu, 1e6).log_prob(x)
    single = VonMisesFisher(mu.float(), 1e6).log_prob(x.float())
    assert (single - exact).abs().max() < 0.05


@pytest.mark.parametrize("d", (64, 512, 768))
@pytest.mark.parametrize("kappa", (50.0, 205.0, 1000.0, 1e4, 1e6))
def test_fit_returns_the_concentration_of_its_draws(d, kappa):
    mu = direction(d)
    estimated_mu, estimate = fit(VonMisesFisher(mu, kappa).sample((10_000,), rng(7)))
    assert estimate == pytest.approx(kappa, rel=0.02)
    assert (estimated_mu - mu).norm() < 2 * math.sqrt(
        d / (10_000 * kappa * float(mean_resultant_length(kappa, d)))
    )


def test_fit_corrects_for_few_rows():
    vmf = VonMisesFisher(direction(512), 300.0)
    kappas = [float(fit(vmf.sample((16,), rng(seed)))[1]) for seed in range(40)]
    assert np.mean(kappas) == pytest.approx(300, rel=0.05)  # plug-in: 1.18 times too large


def test_fit_classes_and_the_pooled_concentration():
    loc = F.normalize(torch.randn(3, 64, generator=rng()), dim=1)
    x = VonMisesFisher(loc, torch.tensor([100.0, 400.0, 900.0])).sample((3000,), rng(1))
    x, y = x.transpose(0, 1).reshape(-1, 64), torch.arange(3).repeat_interleave(3000)
    mu, kappa = fit_classes(x, y, 3)
    assert kappa.tolist() == pytest.approx([100, 400, 900], rel=0.03)
    assert (mu * loc).sum(1).min() > 0.999
    pooled = fit_classes(x, y, 3, pooled=True)[1]
    assert (pooled == pooled[0]).all() and 100 < pooled[0] < 900
    one = fit(x[:3000])
    assert torch.equal(one[1], kappa[0])


def test_sample_cosine_returns_sine_and_cosine():
    w, sine = sample_cosine(torch.tensor([1e-3, 50.0, 1e6]), 16, torch.Size((1000,)), rng())
    assert w.shape == (1000, 3)
    assert torch.allclose(w**2 + sine**2, torch.ones_like(w))


@pytest.mark.parametrize("kappa", (0.0, -1.0, math.nan, math.inf))
def test_a_concentration_that_is_not_positive_and_finite_is_refused(kappa):
    with pytest.raises(ValueError, match="kappa must be finite and greater than 0"):
        VonMisesFisher(direction(8), kappa)
    with pytest.raises(ValueError, match="kappa"):
        mean_resultant_length(kappa, 8)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="non-zero length"):
        VonMisesFisher(torch.zeros(8), 1.0)
    with pytest.raises(ValueError, match="finite"):
        VonMisesFisher(torch.full((8,), math.nan), 1.0)
    with pytest.raises(ValueError, match="d >= 2"):
        VonMisesFisher(torch.ones(1), 1.0)
    with pytest.raises(ValueError, match="no gradient in the concentration"):
        VonMisesFisher(direction(8), torch.tensor(1.0, requires_grad=True)).rsample()
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        concentration(1.0, 8)
    with pytest.raises(ValueError, match="unit length"):
        fit(torch.ones(4, 8))
    with pytest.raises(ValueError, match="class 1 has fewer than two rows"):
        fit_classes(direction(8).expand(2, 8), torch.tensor([0, 0]), 2)
    with pytest.raises(ValueError, match="identical"):
        fit(direction(8, dtype=torch.float64).expand(4, 8))
