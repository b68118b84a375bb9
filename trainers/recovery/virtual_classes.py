"""Provide virtual classes, the result of stage 1: distributions that virtual features are drawn from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfzsl.io.class_names import check_class_names
from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import check_unit_rows, split_rows

from .feature_statistics import MIXING, FeatureStatistics
from .vmf import VonMisesFisher, mean_resultant_length

STAGE = "stage 1 (recovery)"


class FeatureMLP(nn.Module):
    """Generate image features from text embeddings and 20-dimensional normal noise (paper, mode `generator`).

    A new network has no weights: `initialize` draws them, `load_state_dict(..., assign=True)` loads them.

    Args:
        d: dimension of text embeddings and image features.
    """

    noise, hidden = 20, 1024

    def __init__(self, d: int) -> None:
        super().__init__()
        self.hidden_layer = nn.Linear(d + self.noise, self.hidden, device="meta")
        self.output_layer = nn.Linear(self.hidden, d, device="meta")

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw each parameter uniformly between -b and b, with b = 1 / sqrt(last dimension)."""
        self.to_empty(device="cpu")
        for parameter in self.parameters():
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, text: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return L2-normalized features (n, C, d) for text embeddings (C, d)."""
        noise = torch.randn(n, len(text), self.noise, generator=generator)
        hidden = F.leaky_relu(self.hidden_layer(torch.cat([text.expand(n, -1, -1), noise], dim=2)), 0.2)
        return F.normalize(self.output_layer(hidden), dim=2)


@dataclass(repr=False)
class VirtualClasses:
    """Models of the base classes that recovery has estimated.

    Attributes:
        mu: (C, d) L2-normalized mean directions.
        kappa: (C,) concentrations.
        classnames: C class names.
        weight: (C, d) recovered class weights: x.weight_c + bias_c decides as the teacher does. Those of a
            cosine teacher are L2-normalized; from probabilities and labels the weights sum to zero.
        queries: number of queries to the teacher.
        method: recovery method (`RecoverySettings.method`).
        level: access level of the teacher.
        backbone: id of the image encoder whose features are modeled.
        network: trained MLP of the method `generator`, which is sampled in place of the vMF; else None.
        bias: (C,) intercepts on the scale of `weight`, or None for none.
        error: estimated relative error of `weight`, or None without an estimate.
        owner_weight: mixing weight g that the owner measured (mixture.py), or None.
        geometry: feature statistics of the encoder, which set the covariance of samples; or None.
    """

    mu: Tensor
    kappa: Tensor
    classnames: list[str]
    weight: Tensor
    queries: int = 0
    method: str = "closed_form"
    level: str = "weights"
    backbone: str = ""
    network: FeatureMLP | None = None
    bias: Tensor | None = None
    error: float | None = None
    owner_weight: float | None = None
    geometry: FeatureStatistics | None = None

    def __repr__(self) -> str:
        kappa = f"mean kappa {float(self.kappa.mean()):.0f}"
        recovery = f"{self.method} from {self.level}, {self.queries:,} queries, {kappa}"
        return f"VirtualClasses({len(self.classnames)} classes, d = {self.mu.shape[1]}; {recovery})"

    @property
    def summary(self) -> str:
        """One line on how the class weights were recovered."""
        error = "" if self.error is None else f", estimated relative error {self.error:.1g}"
        queries = f" from {self.queries:,} queries" if self.queries else ""
        return f"{len(self.classnames)} classes by {self.method} at access level {self.level}{queries}{error}"

    def sample(self, n_per_class: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw virtual features.

        With feature statistics, draws have the mean and the mean resultant length of the vMF and the
        covariance of real features, of which the share `MIXING` lies along differences of class means.

        Args:
            n_per_class: number of features per class.
            generator: source of randomness.

        Returns:
            L2-normalized features (C * n_per_class, d), class after class, and their labels.

        Raises:
            UserError: a feature is not finite.
        """
        parts = []
        width = n_per_class * self.mu.shape[1]
        for mu, kappa in zip(split_rows(self.mu, width), split_rows(self.kappa, width), strict=True):
            if self.network is not None:
                with torch.no_grad():
                    draws = self.network(mu, n_per_class, generator)
            elif self.geometry is not None:
                draws = self._sample_with_covariance(mu, kappa, n_per_class, generator)
            else:
                draws = VonMisesFisher(mu, kappa).sample((n_per_class,), generator)
            parts.append(draws.transpose(0, 1).reshape(-1, self.mu.shape[1]))
        features = parts[0] if len(parts) == 1 else torch.cat(parts)
        labels = torch.arange(len(self.mu)).repeat_interleave(n_per_class)
        return check_unit_rows(features, STAGE, "virtual feature", self.classnames, labels), labels

    def _sample_with_covariance(
        self, mu: Tensor, kappa: Tensor, n: int, generator: torch.Generator | None
    ) -> Tensor:
        """Draw L2-normalized features (n, C, d) around mu (C, d) with the encoder's covariance."""
        assert self.geometry is not None
        length = mean_resultant_length(kappa, mu.shape[1]).to(mu)[:, None]
        differences = float(length.mean()) * (self.mu - self.mu.mean(0)) / len(self.mu) ** 0.5
        variance_along = MIXING * float(differences.square().sum())
        variance = (1 - length.square() - variance_along).clamp(min=0.1 * (1 - length.square()))
        total = n * len(mu)
        along = torch.randn(total, len(self.mu), generator=generator) @ differences * MIXING**0.5
        scatter = self.geometry.noise(total, generator).view(n, *mu.shape) * variance.sqrt()
        return F.normalize(length * mu + scatter + along.view(n, *mu.shape), dim=2)

    def assigned_to_own_class(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return whether the teacher predicts labels (n,) from features (n, d), the paper's filter."""
        parts = split_rows(features, len(self.weight))
        return torch.cat([self.logits(part).argmax(1) for part in parts]) == labels

    def logits(self, x: Tensor) -> Tensor:
        """Return the scores (n, C) of features x (n, d) by the recovered teacher."""
        logits = x @ self.weight.T
        return logits if self.bias is None else logits + self.bias

    def ordered_as(self, classnames: Sequence[str]) -> VirtualClasses:
        """Return the same classes in the order of `classnames`. Raises UserError if the names differ."""
        order = matching_order(self.classnames, classnames)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("mu", "kappa", "weight", "bias"):
            if values[name] is not None:
                values[name] = values[name][order]
        return VirtualClasses(**values | {"classnames": list(classnames)})

    def digest(self) -> str:
        """Return the SHA-256 of the distributions and class weights, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(self.classnames).encode())
        for tensor in (self.mu, self.kappa, self.weight, self.bias):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file of virtual classes. It omits `geometry`, which has its own file."""
        # Safetensors rejects tensors that share memory, as mu and weight may.
        tensors = {"mu": self.mu, "kappa": self.kappa, "weight": self.weight.clone()}
        if self.bias is not None:
            tensors["bias"] = self.bias
        if self.network is not None:
            tensors |= {f"network.{name}": value for name, value in self.network.state_dict().items()}
        names = ("classnames", "queries", "method", "level", "backbone", "error")
        metadata = {name: getattr(self, name) for name in names} | {"known_weight": self.owner_weight}
        save_tensors(path, tensors, {"kind": "virtual", **metadata})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VirtualClasses:
        """Load a file that `save` wrote. Raises UserError if it is missing, broken or of another kind."""
        tensors, metadata = load_tensors(path, "virtual")
        names = check_class_names(metadata.get("classnames"), path)
        try:
            queries = int(metadata["queries"])  # type: ignore[call-overload]
            method, level, backbone = (str(metadata[name]) for name in ("method", "level", "backbone"))
            error = metadata.get("error")
            error = None if error is None else float(error)  # type: ignore[arg-type]
            mu, kappa, weight = (tensors.pop(name).float() for name in ("mu", "kappa", "weight"))
            bias = tensors.pop("bias").float() if "bias" in tensors else None
            owner_weight = metadata.get("known_weight")
            owner_weight = None if owner_weight is None else float(owner_weight)  # type: ignore[arg-type]
            if owner_weight is not None and not owner_weight >= 0:
                raise ValueError("the mixing weight must be at least 0")
            if (
                mu.dim() != 2
                or 0 in mu.shape
                or mu.shape != weight.shape
                or kappa.shape != mu.shape[:1]
                or (bias is not None and bias.shape != mu.shape[:1])
                or len(names) != len(mu)
            ):
                raise ValueError("the shapes of its tensors do not match")
            if not ((mu.norm(dim=1) - 1).abs() < 1e-3).all() or not (kappa > 0).all():
                raise ValueError("mean directions must have length 1, concentrations must be greater than 0")
            network = None
            if tensors:
                network = FeatureMLP(mu.shape[1])
                state = {name.removeprefix("network."): value.float() for name, value in tensors.items()}
                network.load_state_dict(state, assign=True)
                network.requires_grad_(False).eval()
        except (KeyError, TypeError, RuntimeError, ValueError, OverflowError) as reason:
            raise UserError(f"{path}: incomplete file of virtual classes ({reason}); recover again") from None
        return cls(
            mu, kappa, names, weight, queries, method, level, backbone, network, bias, error, owner_weight
        )


def matching_order(classnames: Sequence[str], target: Sequence[str]) -> Tensor:
    """Return the indices that sort `classnames` into the order of `target`.

    Raises:
        UserError: the names differ.
    """
    if sorted(classnames) != sorted(target):
        unmatched = sorted(set(classnames) ^ set(target))[:5]
        raise UserError(
            f"the teacher's class names are not the base classes: they differ in {', '.join(unmatched)}"
        )
    index = {name: i for i, name in enumerate(classnames)}
    return torch.tensor([index[name] for name in target])
