"""What stage 1 hands on: the virtual classes, which features are drawn from."""

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
    """Generate unit features from a text feature and 20 normal numbers: the paper's `generator` mode.

    It is made without weights: `initialize` draws them, `load_state_dict(..., assign=True)` sets them.

    Args:
        d: dimensions of a text feature and of an image feature.
    """

    noise, hidden = 20, 1024

    def __init__(self, d: int) -> None:
        super().__init__()
        self.hidden_layer = nn.Linear(d + self.noise, self.hidden, device="meta")
        self.output_layer = nn.Linear(self.hidden, d, device="meta")

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw each parameter uniformly from +-1 / sqrt(its last dimension)."""
        self.to_empty(device="cpu")
        for parameter in self.parameters():
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, text: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return unit features (n, C, d) for text features (C, d)."""
        noise = torch.randn(n, len(text), self.noise, generator=generator)
        hidden = F.leaky_relu(self.hidden_layer(torch.cat([text.expand(n, -1, -1), noise], dim=2)), 0.2)
        return F.normalize(self.output_layer(hidden), dim=2)


@dataclass(repr=False)
class VirtualClasses:
    """What recovery knows of the base classes.

    Attributes:
        mu: (C, d) unit mean directions; kappa: (C,) concentrations; classnames: C names.
        weight: (C, d) the teacher's rows as recovered: x.weight_c + bias_c decides as the teacher does (unit
            rows of a cosine teacher; at levels probabilities and labels rows that sum to zero).
        queries: what they cost. method, level: how they were got. backbone: whose features they model.
        network: the trained MLP of `generator` mode, which is then sampled in place of the vMF.
        bias: (C,) the teacher's intercepts on the scale of `weight`, or None for none.
        error: estimated relative error of `weight`, or None where there is no estimate.
        known_weight: the teacher's weight beside text as its owner found it (mixture.py), or None.
        geometry: the encoder's, if one was measured: draws then scatter as real features do.
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
        how = f"{self.method} from {self.level}, {self.queries:,} queries, {kappa}"
        return f"VirtualClasses({len(self.classnames)} classes, d = {self.mu.shape[1]}; {how})"

    @property
    def summary(self) -> str:
        """One line on what the teacher's rows rest on."""
        sure = "" if self.error is None else f", relative error {self.error:.1g} as estimated"
        asked = f" from {self.queries:,} queries" if self.queries else ""
        return f"{len(self.classnames)} classes by {self.method} at access level {self.level}{asked}{sure}"

    def sample(self, n_per_class: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Unit rows (C * n_per_class, d), class after class, and their labels.

        With a geometry: mean and mean length of the vMF, and the covariance of real features around it, a
        part of which (MIXING) lies along the differences of the class means.
        """
        parts = []
        width = n_per_class * self.mu.shape[1]
        for mu, kappa in zip(split_rows(self.mu, width), split_rows(self.kappa, width), strict=True):
            if self.network is not None:
                with torch.no_grad():
                    draws = self.network(mu, n_per_class, generator)
            elif self.geometry is not None:
                draws = self._scattered(mu, kappa, n_per_class, generator)
            else:
                draws = VonMisesFisher(mu, kappa).sample((n_per_class,), generator)
            parts.append(draws.transpose(0, 1).reshape(-1, self.mu.shape[1]))
        features = parts[0] if len(parts) == 1 else torch.cat(parts)
        labels = torch.arange(len(self.mu)).repeat_interleave(n_per_class)
        return check_unit_rows(features, STAGE, "virtual feature", self.classnames, labels), labels

    def _scattered(self, mu: Tensor, kappa: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        """Unit draws (n, C, d) around mu (C, d) with the geometry's covariance."""
        assert self.geometry is not None
        length = mean_resultant_length(kappa, mu.shape[1]).to(mu)[:, None]
        differences = float(length.mean()) * (self.mu - self.mu.mean(0)) / len(self.mu) ** 0.5
        mixed = MIXING * float(differences.square().sum())
        rest = (1 - length.square() - mixed).clamp(min=0.1 * (1 - length.square()))
        total = n * len(mu)
        along = torch.randn(total, len(self.mu), generator=generator) @ differences * MIXING**0.5
        scatter = self.geometry.noise(total, generator).view(n, *mu.shape) * rest.sqrt()
        return F.normalize(length * mu + scatter + along.view(n, *mu.shape), dim=2)

    def kept(self, features: Tensor, labels: Tensor) -> Tensor:
        """(n,) bool: the recovered teacher assigns the draw to its own class (the paper's filter)."""
        parts = split_rows(features, len(self.weight))
        return torch.cat([self.logits(part).argmax(1) for part in parts]) == labels

    def logits(self, x: Tensor) -> Tensor:
        """(n, C) scores of features x (n, d) by the recovered teacher."""
        logits = x @ self.weight.T
        return logits if self.bias is None else logits + self.bias

    def ordered_as(self, classnames: Sequence[str]) -> VirtualClasses:
        """The same classes in the order of `classnames`. Raises UserError unless the names are the same."""
        order = matching_order(self.classnames, classnames)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("mu", "kappa", "weight", "bias"):
            if values[name] is not None:
                values[name] = values[name][order]
        return VirtualClasses(**values | {"classnames": list(classnames)})

    def digest(self) -> str:
        """Return the SHA-256 of the distributions and class weights, in hexadecimal."""
        made = hashlib.sha256(json.dumps(self.classnames).encode())
        for tensor in (self.mu, self.kappa, self.weight, self.bias):
            if tensor is not None:
                made.update(tensor.cpu().contiguous().numpy().tobytes())
        return made.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all but the geometry, which has a file of its own."""
        # The file format refuses tensors that share memory, as they may where mu is the weight.
        tensors = {"mu": self.mu, "kappa": self.kappa, "weight": self.weight.clone()}
        if self.bias is not None:
            tensors["bias"] = self.bias
        if self.network is not None:
            tensors |= {f"network.{name}": value for name, value in self.network.state_dict().items()}
        names = ("classnames", "queries", "method", "level", "backbone", "error")
        about = {name: getattr(self, name) for name in names} | {"known_weight": self.owner_weight}
        save_tensors(path, tensors, {"kind": "virtual", **about})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VirtualClasses:
        """Read `save`'s file. Raises UserError when it is missing, broken or of another kind."""
        tensors, about = load_tensors(path, "virtual")
        names = check_class_names(about.get("classnames"), path)
        try:
            queries = int(about["queries"])  # type: ignore[call-overload]
            method, level, backbone = (str(about[name]) for name in ("method", "level", "backbone"))
            off = None if about.get("error") is None else float(about["error"])  # type: ignore[arg-type]
            mu, kappa, weight = (tensors.pop(name).float() for name in ("mu", "kappa", "weight"))
            bias = tensors.pop("bias").float() if "bias" in tensors else None
            known = about.get("known_weight")
            owner_weight = None if known is None else float(known)  # type: ignore[arg-type]
            if owner_weight is not None and not owner_weight >= 0:
                raise ValueError("the teacher's weight beside text is at least 0")
            if (
                mu.dim() != 2
                or 0 in mu.shape
                or mu.shape != weight.shape
                or kappa.shape != mu.shape[:1]
                or (bias is not None and bias.shape != mu.shape[:1])
                or len(names) != len(mu)
            ):
                raise ValueError("its shapes do not fit")
            if not ((mu.norm(dim=1) - 1).abs() < 1e-3).all() or not (kappa > 0).all():
                raise ValueError("directions are unit rows and concentrations greater than 0")
            network = None
            if tensors:
                network = FeatureMLP(mu.shape[1])
                state = {name.removeprefix("network."): value.float() for name, value in tensors.items()}
                network.load_state_dict(state, assign=True)
                network.requires_grad_(False).eval()
        except (KeyError, TypeError, RuntimeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path}: an incomplete file of virtual classes ({error}); recover again"
            ) from None
        return cls(
            mu, kappa, names, weight, queries, method, level, backbone, network, bias, off, owner_weight
        )


def matching_order(theirs: Sequence[str], ours: Sequence[str]) -> Tensor:
    """Indices that put `theirs` into the order of `ours`. Raises UserError unless the names are the same."""
    if sorted(theirs) != sorted(ours):
        odd = sorted(set(theirs) ^ set(ours))[:5]
        raise UserError(
            f"the teacher's class names are not the base classes: they differ in {', '.join(odd)}"
        )
    place = {name: index for index, name in enumerate(theirs)}
    return torch.tensor([place[name] for name in ours])
