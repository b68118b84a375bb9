"""The von Mises-Fisher (vMF) distribution on the unit sphere of R^d, for any d >= 2.

Density (with respect to the sphere's area): f(x; mu, kappa) = C_d(kappa) exp(kappa mu.x), where
C_d(kappa) = kappa^nu / ((2 pi)^(d/2) I_nu(kappa)) and nu = d/2 - 1. Its mean is A_d(kappa) mu with
A_d = I_{nu+1} / I_nu, the mean resultant length. All scalar functions run in float64 and never form a
raw Bessel value, so they hold for kappa from 1e-6 to 1e6 and d to 4096. Plain tensor functions.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from numpy.polynomial import Polynomial
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from dfzsl.utils.numerics import class_sums

# Orders below this are reached from above by the recurrence of the Bessel functions. With nine terms of the
# expansion from this order on, the relative error is below 2e-13 at every kappa.
_LOWEST_EXPANDED_ORDER = 24.0


def _debye_polynomials(count: int) -> list[Polynomial]:
    """U_0 ... U_{count-1} of the uniform asymptotic expansion of I_nu (DLMF 10.41.9)."""
    polynomials = [Polynomial([1.0])]
    for _ in range(count - 1):
        u = polynomials[-1]
        polynomials.append(
            Polynomial([0, 0, 0.5, 0, -0.5]) * u.deriv() + (Polynomial([1, 0, -5]) * u).integ() / 8
        )
    return polynomials


_DEBYE = [(u.coef.tolist(), u.deriv().coef.tolist()) for u in _debye_polynomials(9)]


def _horner(coefficients: list[float], p: Tensor) -> Tensor:
    value = torch.full_like(p, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * p + c
    return value


def _bessel(kappa: Tensor, nu: float) -> tuple[Tensor, Tensor]:
    """(log(kappa^nu / I_nu(kappa)) + kappa, I_{nu+1}(kappa) / (kappa I_nu(kappa))) for float64 kappa >= 0.

    Both are smooth at kappa = 0 and neither cancels: Debye's uniform expansion (DLMF 10.41.3) at a high
    enough order, then I_{m-1} = I_{m+1} + (2 m / kappa) I_m downwards.
    """
    steps = max(0, math.ceil(_LOWEST_EXPANDED_ORDER - nu))
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


def _checked_kappa(kappa: Tensor | float) -> Tensor:
    if not isinstance(kappa, Tensor):
        kappa = torch.tensor(kappa, dtype=torch.float64)
    if not (torch.isfinite(kappa).all() and (kappa > 0).all()):
        raise ValueError("the concentration kappa must be finite and greater than 0")
    return kappa


def _checked_dimension(d: int) -> int:
    if d < 2:
        raise ValueError(f"the von Mises-Fisher distribution needs d >= 2, got d = {d}")
    return d


def mean_resultant_length(kappa: Tensor | float, d: int) -> Tensor:
    """A_d(kappa) = I_{d/2}(kappa) / I_{d/2-1}(kappa): the mean cosine to mu. float64, shape of kappa.

    Raises ValueError unless kappa is finite and positive and d >= 2.
    """
    kappa = _checked_kappa(kappa).double()
    return kappa * _bessel(kappa, _checked_dimension(d) / 2 - 1)[1]


def concentration(resultant: Tensor | float, d: int) -> Tensor:
    """The inverse of A_d: kappa >= 0 such that A_d(kappa) = `resultant`. float64, same shape.

    Start of Banerjee et al. (2005), kappa = R (d - R^2) / (1 - R^2), then Newton's steps with
    A_d' = 1 - A_d^2 - (d - 1) A_d / kappa. Raises ValueError outside 0 <= resultant < 1.
    """
    r = resultant.double() if isinstance(resultant, Tensor) else torch.tensor(resultant, dtype=torch.float64)
    if not ((r >= 0) & (r < 1)).all():
        raise ValueError("the mean resultant length must be at least 0 and less than 1")
    nu = _checked_dimension(d) / 2 - 1
    kappa = r * (d - r * r) / (1 - r * r)
    for _ in range(6):
        ratio = _bessel(kappa, nu)[1]
        a = kappa * ratio
        slope = (1 - a * a - (d - 1) * ratio).clamp(min=torch.finfo(torch.float64).tiny)
        # A step of more than half is never right: it comes from rounding in the slope at huge kappa.
        kappa = (kappa - (a - r) / slope).clamp(min=kappa / 2, max=2 * kappa)
    return kappa


def sample_cosine(
    kappa: Tensor, d: int, sample_shape: torch.Size, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Exact draws of w = mu.x for x ~ vMF(mu, kappa) by Wood's (1994) rejection: (w, sqrt(1 - w^2)).

    Both float64 of shape sample_shape + kappa.shape, on kappa's device; w^2 and 1 - w^2 are each computed
    without cancellation. b = (d-1) / (2 kappa + sqrt(4 kappa^2 + (d-1)^2)) is exact at every kappa.
    """
    kappa = kappa.double().expand(sample_shape + kappa.shape)
    shape = kappa.shape
    kappa = kappa.reshape(-1)
    b = (d - 1) / (2 * kappa + torch.sqrt(4 * kappa * kappa + (d - 1) ** 2))
    peak = (1 - b) / (1 + b)
    # 1 - peak^2, and below 1 - peak w and w - peak, written so that nothing cancels when w is near 1.
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
        keep = pending[accepted]
        w[keep] = (1 - below_one)[accepted]
        sine[keep] = torch.sqrt(below_one * (2 - below_one))[accepted]
        pending = pending[~accepted]
    return w.reshape(shape), sine.reshape(shape)


class VonMisesFisher(Distribution):
    """vMF distributions with mean directions `loc` (..., d) and concentrations broadcast to `loc.shape[:-1]`.

    `loc` is scaled to unit length here, so gradients in it are tangent to the sphere. Raises ValueError for
    a `loc` that is not finite or has zero length, and for kappa <= 0 or not finite.

    >>> VonMisesFisher(prototypes, torch.tensor(1000.0)).sample((600,))   # (600, C, d)
    """

    arg_constraints: ClassVar = {"loc": constraints.real_vector, "concentration": constraints.positive}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor | float) -> None:
        if loc.dim() < 1 or not loc.is_floating_point():
            raise ValueError("loc must be a floating-point tensor of shape (..., d)")
        d = _checked_dimension(loc.shape[-1])
        loc = loc.to(torch.promote_types(loc.dtype, torch.float32))  # a kappa of 1e5 is infinite in float16
        length = torch.linalg.vector_norm(loc, dim=-1, keepdim=True)
        if not (torch.isfinite(length).all() and (length > 0).all()):
            raise ValueError("loc must be finite and of non-zero length")
        kappa = _checked_kappa(concentration).to(loc)
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
        """(log C_d(kappa) + kappa, A_d(kappa) / kappa), float64, of the batch's shape."""
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
        """A_d(kappa) = E[mu.x], float64, of the batch's shape."""
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
        """Unit rows of shape sample_shape + batch_shape + (d,), differentiable in `loc`.

        x = w mu + sqrt(1 - w^2) v, with w from `sample_cosine` and v the unit part of one normal draw
        orthogonal to mu. The rejection step has no pathwise gradient in kappa: ValueError if it is asked for.
        """
        if torch.is_grad_enabled() and self.concentration.requires_grad:
            raise ValueError("draws have no gradient in the concentration: detach it, or use sample()")
        shape = torch.Size(sample_shape)
        dtype, device = self.loc.dtype, self.loc.device
        w, sine = sample_cosine(self.concentration, self._dim, shape, generator)
        w, sine = w.to(dtype), sine.to(dtype)
        normal = torch.randn(shape + self.loc.shape, dtype=dtype, device=device, generator=generator)
        # Without a gradient every step reuses the draw's memory: then a draw costs little more than a normal.
        buffer = None if torch.is_grad_enabled() and self.loc.requires_grad else normal
        tangent = normal
        # In few dimensions a draw can lie so near mu that a projection leaves rounding: a second removes it.
        for _ in range(1 if self._dim > 16 else 2):
            along = torch.einsum("...d,...d->...", tangent, self.loc)
            tangent = torch.addcmul(tangent, along[..., None], self.loc, value=-1, out=buffer)
        scale = sine / torch.linalg.vector_norm(tangent, dim=-1)
        tangent = torch.mul(tangent, scale[..., None], out=buffer)
        return torch.addcmul(tangent, w[..., None], self.loc, out=buffer)

    def sample(  # type: ignore[override]
        self, sample_shape: torch.Size | tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """As `rsample`, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """log f(x) for unit rows `value` (..., d), in `loc`'s dtype.

        Written with -|x - mu|^2 / 2 in place of mu.x - 1, which keeps float32 exact at large kappa.
        """
        log_peak = self._scalars()[0].to(self.loc.dtype)
        return log_peak - 0.5 * self.concentration * (value - self.loc).square().sum(-1)

    def entropy(self) -> Tensor:
        """-E[log f(x)] = -log C_d(kappa) - kappa A_d(kappa)."""
        log_peak, ratio = self._scalars()
        kappa = self.concentration.double()
        return (kappa * (1 - kappa * ratio) - log_peak).to(self.loc.dtype)

    def kl_to_uniform(self) -> Tensor:
        """KL(self || uniform on the sphere) = log area - entropy, of the batch's shape."""
        at_zero = self._scalars_at_zero()
        log_peak, ratio = self._scalars()
        kappa = self.concentration.double()
        return (log_peak - at_zero - kappa * (1 - kappa * ratio)).clamp(min=0).to(self.loc.dtype)

    def _scalars_at_zero(self) -> Tensor:
        """log C_d(0): minus the log of the sphere's area."""
        zero = torch.zeros((), dtype=torch.float64, device=self.loc.device)
        return _bessel(zero, self._dim / 2 - 1)[0] - self._dim / 2 * math.log(2 * math.pi)


@register_kl(VonMisesFisher, VonMisesFisher)
def _kl_vmf_vmf(p: VonMisesFisher, q: VonMisesFisher) -> Tensor:
    """log C(p) - log C(q) + A(p) (kappa_p - kappa_q mu_p.mu_q), arranged so that nothing large cancels."""
    peak_p, ratio = p._scalars()
    peak_q, _ = q._scalars()
    kappa_p, kappa_q = p.concentration.double(), q.concentration.double()
    a = kappa_p * ratio
    apart = 0.5 * (p.loc.double() - q.loc.double()).square().sum(-1)
    return (peak_p - peak_q + (kappa_q - kappa_p) * (1 - a) + kappa_q * a * apart).to(p.loc.dtype)


def fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean direction (d,) and concentration () of unit rows x (n, d), corrected for small n.

    kappa solves A_d(kappa)^2 = (n R^2 - 1) / (n - 1), whose right side is unbiased for A_d^2 where R^2 is
    not; it is 0 where the rows are no more aligned than uniform ones. Raises ValueError for n < 2, rows that
    are not unit, or identical rows.
    """
    mu, kappa = fit_classes(x, torch.zeros(len(x), dtype=torch.long, device=x.device), 1)
    return mu[0], kappa[0]


def fit_classes(x: Tensor, labels: Tensor, num_classes: int, pooled: bool = False) -> tuple[Tensor, Tensor]:
    """As `fit` for each class: mean directions (C, d) and concentrations (C,), both in x's dtype.

    `pooled` gives every class the one concentration that all classes share about their own means. Raises
    ValueError naming a class with fewer than two rows.
    """
    if x.dim() != 2 or labels.shape != (len(x),):
        raise ValueError("x must have shape (n, d) and labels (n,)")
    # The lengths need float64: at kappa = 1e6 a float32 length shifts the estimate by percents.
    lengths = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3):
        raise ValueError("x must have finite rows of unit length")
    n = torch.bincount(labels, minlength=num_classes).double()
    if (n < 2).any():
        raise ValueError(f"class {int((n < 2).nonzero()[0])} has fewer than two rows")
    sums, _ = class_sums(x.double() / lengths[:, None], labels, num_classes)
    length = torch.linalg.vector_norm(sums, dim=-1)
    # Pairs of different rows of a class: their summed cosine is n^2 R^2 - n, of n (n - 1) pairs.
    cosines, pairs = length**2 - n, n * (n - 1)
    if pooled:
        cosines, pairs = cosines.sum().expand(num_classes), pairs.sum().expand(num_classes)
    squared = (cosines / pairs).clamp(min=0)
    if (squared >= 1 - 1e-12).any():
        raise ValueError("the rows of a class are identical: their concentration is infinite")
    kappa = concentration(torch.sqrt(squared), x.shape[1])
    return (sums / length[:, None]).to(x.dtype), kappa.to(x.dtype)
