"""Provide the von Mises-Fisher (vMF) distribution on the unit sphere of R^d, for any d >= 2.

Density (with respect to the sphere's area): f(x; mu, kappa) = C_d(kappa) exp(kappa mu.x), where
C_d(kappa) = kappa^nu / ((2 pi)^(d/2) I_nu(kappa)) and nu = d/2 - 1. Its mean is A_d(kappa) mu with
A_d = I_{nu+1} / I_nu, the mean resultant length. All scalar functions run in float64 and never form a
raw Bessel value, so they hold for kappa from 1e-6 to 1e6 and d to 4096.

Sampling follows Wood (1994), the estimate of the concentration Banerjee et al. (2005).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from numpy.polynomial import Polynomial
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from dfzsl.utils.numerics import class_sums

# Lower orders are computed by downward recurrence of the Bessel functions. With nine terms of the expansion
# at this order and above, the relative error is below 2e-13 at every kappa.
_MIN_EXPANSION_ORDER = 24.0


def _debye_polynomials(count: int) -> list[Polynomial]:
    """Return U_0 ... U_{count-1} of the uniform asymptotic expansion of I_nu (DLMF 10.41.9)."""
    polynomials = [Polynomial([1.0])]
    for _ in range(count - 1):
        u = polynomials[-1]
        polynomials.append(
            Polynomial([0, 0, 0.5, 0, -0.5]) * u.deriv() + (Polynomial([1, 0, -5]) * u).integ() / 8
        )
    return polynomials


_DEBYE = [(u.coef.tolist(), u.deriv().coef.tolist()) for u in _debye_polynomials(9)]


def _horner(coefficients: list[float], p: Tensor) -> Tensor:
    """Evaluate a polynomial at p by Horner's scheme."""
    value = torch.full_like(p, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * p + c
    return value


def _bessel(kappa: Tensor, nu: float) -> tuple[Tensor, Tensor]:
    """Return log(kappa^nu / I_nu(kappa)) + kappa and I_{nu+1}(kappa) / (kappa I_nu(kappa)).

    Debye's uniform expansion (DLMF 10.41.3) gives both at a high enough order; lower orders follow from
    I_{m-1} = I_{m+1} + (2 m / kappa) I_m. Both are smooth at kappa = 0 and free of cancellation.

    Args:
        kappa: float64, at least 0.
        nu: order.
    """
    steps = max(0, math.ceil(_MIN_EXPANSION_ORDER - nu))
    top = nu + steps
    s = torch.sqrt(top * top + kappa * kappa)
    p = top / s
    series, slope = torch.zeros_like(s), torch.zeros_like(s)
    for k, (u, derivative) in enumerate(_DEBYE):
        series = series + _horner(u, p) / top**k
        slope = slope + _horner(derivative, p) / top**k
    log_scaled = top * torch.log(top + s) - top * top / (s + kappa)
    log_scaled = log_scaled + 0.5 * torch.log(2 * math.pi * s) - torch.log(series)
    ratio = 1 / (top + s) - 0.5 / (s * s) - top / s**3 * slope / series
    for order in range(steps):
        ratio = 1 / (2 * (top - order) + kappa * kappa * ratio)
        log_scaled = log_scaled + torch.log(ratio)
    return log_scaled, ratio


def _check_kappa(kappa: Tensor | float) -> Tensor:
    if not isinstance(kappa, Tensor):
        kappa = torch.tensor(kappa, dtype=torch.float64)
    if not (torch.isfinite(kappa).all() and (kappa > 0).all()):
        raise ValueError("the concentration kappa must be finite and greater than 0")
    return kappa


def _check_dimension(d: int) -> int:
    if d < 2:
        raise ValueError(f"the von Mises-Fisher distribution needs d >= 2, got d = {d}")
    return d


def mean_resultant_length(kappa: Tensor | float, d: int) -> Tensor:
    """Return A_d(kappa) = I_{d/2}(kappa) / I_{d/2-1}(kappa), the mean cosine to mu.

    Args:
        kappa: concentrations of any shape.
        d: dimension.

    Returns:
        float64, in the shape of kappa.

    Raises:
        ValueError: kappa is not finite and positive, or d < 2.
    """
    kappa = _check_kappa(kappa).double()
    return kappa * _bessel(kappa, _check_dimension(d) / 2 - 1)[1]


def concentration(resultant: Tensor | float, d: int) -> Tensor:
    """Return the concentration kappa with A_d(kappa) = `resultant`.

    Newton's method with A_d' = 1 - A_d^2 - (d - 1) A_d / kappa, starting from the approximation
    kappa = R (d - R^2) / (1 - R^2) of Banerjee et al. (2005).

    Args:
        resultant: mean resultant lengths R of any shape.
        d: dimension.

    Returns:
        float64, in the shape of `resultant`.

    Raises:
        ValueError: a length is not in [0, 1).
    """
    r = resultant.double() if isinstance(resultant, Tensor) else torch.tensor(resultant, dtype=torch.float64)
    if not ((r >= 0) & (r < 1)).all():
        raise ValueError("the mean resultant length must be at least 0 and less than 1")
    nu = _check_dimension(d) / 2 - 1
    kappa = r * (d - r * r) / (1 - r * r)
    for _ in range(6):
        ratio = _bessel(kappa, nu)[1]
        a = kappa * ratio
        slope = (1 - a * a - (d - 1) * ratio).clamp(min=torch.finfo(torch.float64).tiny)
        # At huge kappa the slope has rounding errors. Exact steps never change kappa by more than a factor 2.
        kappa = (kappa - (a - r) / slope).clamp(min=kappa / 2, max=2 * kappa)
    return kappa


def sample_cosine(
    kappa: Tensor, d: int, sample_shape: torch.Size, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw w = mu.x for x ~ vMF(mu, kappa) by the rejection sampling of Wood (1994).

    w and sqrt(1 - w^2) are each computed without cancellation. The constant of the proposal,
    b = (d-1) / (2 kappa + sqrt(4 kappa^2 + (d-1)^2)), is exact at every kappa.

    Args:
        kappa: concentrations.
        d: dimension.
        sample_shape: shape of the draws per concentration.
        generator: source of randomness.

    Returns:
        w and sqrt(1 - w^2), float64 of shape sample_shape + kappa.shape.
    """
    kappa = kappa.double().expand(sample_shape + kappa.shape)
    shape = kappa.shape
    kappa = kappa.reshape(-1)
    b = (d - 1) / (2 * kappa + torch.sqrt(4 * kappa * kappa + (d - 1) ** 2))
    peak = (1 - b) / (1 + b)
    # This is 1 - peak^2. It and the gaps below are written so that nothing cancels when w is near 1.
    spread = 4 * b / (1 + b) ** 2
    w, sine = torch.empty_like(kappa), torch.empty_like(kappa)
    pending = torch.arange(kappa.numel(), device=kappa.device)
    while pending.numel():
        k, bp, x0, x0_spread = (t[pending] for t in (kappa, b, peak, spread))
        half = torch.full((2, pending.numel()), (d - 1) / 2, dtype=torch.float64, device=kappa.device)
        gamma = torch._standard_gamma(half, generator=generator)
        z = gamma[0] / (gamma[0] + gamma[1])
        u = torch.rand(pending.numel(), dtype=torch.float64, device=kappa.device, generator=generator)
        below_one = 2 * bp * z / (1 - (1 - bp) * z)  # 1 - w
        gap = 2 * bp / (1 + bp) - below_one  # w - peak, as 1 - peak = 2b / (1 + b)
        log_ratio = k * gap + (d - 1) * torch.log1p(-x0 * gap / x0_spread)
        accepted = torch.log(u) <= log_ratio
        index = pending[accepted]
        w[index] = (1 - below_one)[accepted]
        sine[index] = torch.sqrt(below_one * (2 - below_one))[accepted]
        pending = pending[~accepted]
    return w.reshape(shape), sine.reshape(shape)


class VonMisesFisher(Distribution):
    """The von Mises-Fisher distribution, batched.

    Args:
        loc: (..., d) mean directions. They are L2-normalized here, so gradients in `loc` are tangent to the
            sphere.
        concentration: kappa, broadcast to `loc.shape[:-1]`.

    Raises:
        ValueError: `loc` is not finite or zero, or kappa is not finite and positive.

    >>> VonMisesFisher(prototypes, torch.tensor(1000.0)).sample((600,))   # (600, C, d)
    """

    arg_constraints: ClassVar = {"loc": constraints.real_vector, "concentration": constraints.positive}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor | float) -> None:
        if loc.dim() < 1 or not loc.is_floating_point():
            raise ValueError("loc must be a floating-point tensor of shape (..., d)")
        d = _check_dimension(loc.shape[-1])
        loc = loc.to(torch.promote_types(loc.dtype, torch.float32))  # in float16 a kappa of 1e5 is infinite
        length = torch.linalg.vector_norm(loc, dim=-1, keepdim=True)
        if not (torch.isfinite(length).all() and (length > 0).all()):
            raise ValueError("loc must be finite and of non-zero length")
        kappa = _check_kappa(concentration).to(loc)
        batch = torch.broadcast_shapes(loc.shape[:-1], kappa.shape)
        self.loc = (loc / length).expand((*batch, d))
        self.concentration = kappa.expand(batch)
        super().__init__(batch, torch.Size((d,)), validate_args=False)

    def expand(self, batch_shape, _instance=None) -> VonMisesFisher:
        new = self._get_checked_instance(VonMisesFisher, _instance)
        batch = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch + self.event_shape)
        new.concentration = self.concentration.expand(batch)
        Distribution.__init__(new, batch, self.event_shape, validate_args=False)
        return new

    @property
    def _dim(self) -> int:
        return self.event_shape[0]

    def _scalars(self) -> tuple[Tensor, Tensor]:
        """Return log C_d(kappa) + kappa and A_d(kappa) / kappa, float64, in the batch shape."""
        log_scaled, ratio = _bessel(self.concentration.double(), self._dim / 2 - 1)
        return log_scaled - self._dim / 2 * math.log(2 * math.pi), ratio

    @property
    def mean(self) -> Tensor:
        """E[x] = A_d(kappa) mu, (..., d)."""
        return self.mean_resultant_length.to(self.loc)[..., None] * self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def mean_resultant_length(self) -> Tensor:
        """A_d(kappa) = E[mu.x], float64, batch shape."""
        return self.concentration.double() * self._scalars()[1]

    @property
    def second_moment(self) -> tuple[Tensor, Tensor]:
        """(a, b) of E[x x^T] = a I + b mu mu^T: a = A_d / kappa, b = 1 - d a. float64, batch shape."""
        ratio = self._scalars()[1]
        return ratio, 1 - self._dim * ratio

    @property
    def variance(self) -> Tensor:
        """The diagonal of Cov[x], (..., d)."""
        a, b = (t.to(self.loc)[..., None] for t in self.second_moment)
        return a + b * self.loc**2 - self.mean**2

    def rsample(  # type: ignore[override]
        self, sample_shape: torch.Size | tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw samples that are differentiable in `loc`.

        x = w mu + sqrt(1 - w^2) v, with w from `sample_cosine` and v the normalized part of a normal draw
        that is orthogonal to mu.

        Args:
            sample_shape: shape of the draws per distribution.
            generator: source of randomness.

        Returns:
            Unit vectors of shape sample_shape + batch_shape + (d,).

        Raises:
            ValueError: the concentration requires a gradient, which rejection sampling does not have.
        """
        if torch.is_grad_enabled() and self.concentration.requires_grad:
            raise ValueError("samples have no gradient in the concentration: detach it, or use sample()")
        shape = torch.Size(sample_shape)
        dtype, device = self.loc.dtype, self.loc.device
        w, sine = sample_cosine(self.concentration, self._dim, shape, generator)
        w, sine = w.to(dtype), sine.to(dtype)
        normal = torch.randn(shape + self.loc.shape, dtype=dtype, device=device, generator=generator)
        # Without gradients all steps reuse this memory, so a sample costs little more than a normal draw.
        buffer = None if torch.is_grad_enabled() and self.loc.requires_grad else normal
        tangent = normal
        # In few dimensions a draw can be so close to mu that one projection leaves rounding errors.
        for _ in range(1 if self._dim > 16 else 2):
            along = torch.einsum("...d,...d->...", tangent, self.loc)
            tangent = torch.addcmul(tangent, along[..., None], self.loc, value=-1, out=buffer)
        scale = sine / torch.linalg.vector_norm(tangent, dim=-1)
        tangent = torch.mul(tangent, scale[..., None], out=buffer)
        return torch.addcmul(tangent, w[..., None], self.loc, out=buffer)

    def sample(  # type: ignore[override]
        self, sample_shape: torch.Size | tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw samples as `rsample` does, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log f(x) for unit vectors `value` (..., d).

        The term -|x - mu|^2 / 2 in place of mu.x - 1 keeps float32 accurate at large kappa.
        """
        log_peak = self._scalars()[0].to(self.loc.dtype)
        return log_peak - 0.5 * self.concentration * (value - self.loc).square().sum(-1)

    def entropy(self) -> Tensor:
        """Return -E[log f(x)] = -log C_d(kappa) - kappa A_d(kappa)."""
        log_peak, ratio = self._scalars()
        kappa = self.concentration.double()
        return (kappa * (1 - kappa * ratio) - log_peak).to(self.loc.dtype)

    def kl_to_uniform(self) -> Tensor:
        """Return KL(self || uniform on the sphere) = log area - entropy."""
        at_zero = self._scalars_at_zero()
        log_peak, ratio = self._scalars()
        kappa = self.concentration.double()
        return (log_peak - at_zero - kappa * (1 - kappa * ratio)).clamp(min=0).to(self.loc.dtype)

    def _scalars_at_zero(self) -> Tensor:
        """Return log C_d(0), minus the logarithm of the area of the sphere."""
        zero = torch.zeros((), dtype=torch.float64, device=self.loc.device)
        return _bessel(zero, self._dim / 2 - 1)[0] - self._dim / 2 * math.log(2 * math.pi)


@register_kl(VonMisesFisher, VonMisesFisher)
def _kl_vmf_vmf(p: VonMisesFisher, q: VonMisesFisher) -> Tensor:
    """Return log C(p) - log C(q) + A(p) (kappa_p - kappa_q mu_p.mu_q), without cancellation."""
    peak_p, ratio = p._scalars()
    peak_q, _ = q._scalars()
    kappa_p, kappa_q = p.concentration.double(), q.concentration.double()
    a = kappa_p * ratio
    distance = 0.5 * (p.loc.double() - q.loc.double()).square().sum(-1)
    return (peak_p - peak_q + (kappa_q - kappa_p) * (1 - a) + kappa_q * a * distance).to(p.loc.dtype)


def fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate mean direction and concentration, corrected for small n.

    kappa solves A_d(kappa)^2 = (n R^2 - 1) / (n - 1) with the mean resultant length R. The right side is an
    unbiased estimate of A_d^2, which R^2 is not. kappa is 0 if the samples are no more aligned than uniform
    ones.

    Args:
        x: (n, d) unit vectors.

    Returns:
        Mean direction (d,) and concentration ().

    Raises:
        ValueError: n < 2, or vectors that are not of unit length or are identical.
    """
    mu, kappa = fit_classes(x, torch.zeros(len(x), dtype=torch.long, device=x.device), 1)
    return mu[0], kappa[0]


def fit_classes(x: Tensor, labels: Tensor, num_classes: int, pooled: bool = False) -> tuple[Tensor, Tensor]:
    """Estimate mean direction and concentration of each class as `fit` does.

    Args:
        x: (n, d) unit vectors.
        labels: (n,) their classes.
        num_classes: number of classes C.
        pooled: whether to estimate one concentration that all classes share.

    Returns:
        Mean directions (C, d) and concentrations (C,), in the dtype of x.

    Raises:
        ValueError: like `fit`; the message names a class with fewer than two vectors.
    """
    if x.dim() != 2 or labels.shape != (len(x),):
        raise ValueError("x must have shape (n, d) and labels (n,)")
    # In float32, rounding of the lengths would shift an estimate of kappa = 1e6 by percents.
    lengths = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3):
        raise ValueError("x must have finite rows of unit length")
    n = torch.bincount(labels, minlength=num_classes).double()
    if (n < 2).any():
        raise ValueError(f"class {int((n < 2).nonzero()[0])} has fewer than two rows")
    sums, _ = class_sums(x.double() / lengths[:, None], labels, num_classes)
    length = torch.linalg.vector_norm(sums, dim=-1)
    # The cosines of the n (n - 1) pairs of different vectors of a class sum to n^2 R^2 - n.
    cosines, pairs = length**2 - n, n * (n - 1)
    if pooled:
        cosines, pairs = cosines.sum().expand(num_classes), pairs.sum().expand(num_classes)
    squared = (cosines / pairs).clamp(min=0)
    if (squared >= 1 - 1e-12).any():
        raise ValueError("the rows of a class are identical: their concentration is infinite")
    kappa = concentration(torch.sqrt(squared), x.shape[1])
    return (sums / length[:, None]).to(x.dtype), kappa.to(x.dtype)
