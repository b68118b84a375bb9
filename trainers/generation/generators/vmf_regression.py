"""Provide the vMF generator: the von Mises-Fisher distribution of a class is predicted from its condition.

The fit is in closed form. It takes seconds where a GAN takes an hour, and cannot diverge.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.numerics import class_means

from ...recovery.ridge import leave_one_out_ridge
from ...recovery.vmf import VonMisesFisher, concentration
from .base import FeatureGenerator, device_generator, generator


@generator("vmf")
class VMFRegression(FeatureGenerator):
    """Regression of mean direction and concentration on the condition.

    With m_c the mean feature of base class c and t_c its condition, both centered over the classes,

        m_c = rho t_c + B t_c + e_c

    where rho >= 0 is the least-squares scale (0 where the dimensions differ) and B is fitted by ridge
    regression, with the strength of the least leave-one-out error. Text that does not correlate with images
    therefore predicts the mean of all classes. The concentration of a new class solves A_d(kappa) = mean over
    base classes of m_c . mu_c, with mu_c the leave-one-out prediction of the direction, so that prediction
    errors widen the distribution.

    Args:
        feature_dim: d, the dimension of features.
        condition_dim: c, the dimension of conditions.
    """

    map: Tensor
    kappa: Tensor

    def __init__(self, feature_dim: int, condition_dim: int) -> None:
        super().__init__(feature_dim, condition_dim)
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("map", torch.zeros(condition_dim, feature_dim))
        self.register_buffer("kappa", torch.ones(()))

    @torch.no_grad()
    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        conditions: Tensor,
        generator: torch.Generator,
        checkpoint: Path | None = None,
    ) -> VMFRegression:
        features, conditions = self.check(features, labels, conditions)
        self.to(features.device)
        means = class_means(features, labels, len(conditions))
        self.feature_mean.copy_(means.mean(0))
        self.condition_mean.copy_(conditions.mean(0))
        ridge, loo_prediction = leave_one_out_ridge(conditions, means)
        self.map.copy_(ridge)
        predicted = F.normalize(self.feature_mean + loo_prediction, dim=1)
        resultant = (predicted * means).sum(1).mean().clamp(1e-3, 1 - 1e-6)
        self.kappa.copy_(concentration(resultant, self.feature_dim))
        return self

    def predict(self, conditions: Tensor) -> VonMisesFisher:
        """Predict the distributions of classes with these conditions (K, c)."""
        loc = self.feature_mean + (conditions.float() - self.condition_mean) @ self.map
        return VonMisesFisher(loc, self.kappa)

    @torch.no_grad()
    def sample(self, conditions: Tensor, n: int, generator: torch.Generator) -> Tensor:
        rng = device_generator(generator, conditions.device)
        parts = [self.predict(part).sample((n,), rng).transpose(0, 1) for part in conditions.split(256)]
        return torch.cat(parts).reshape(-1, self.feature_dim)
