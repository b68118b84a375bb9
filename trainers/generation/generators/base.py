"""Provide the interface, registry and files of generators, and the training loop of neural generators."""

from __future__ import annotations

import copy
import inspect
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import UserError, unknown_name
from dfzsl.utils.numerics import class_means
from dfzsl.utils.progress import progress_bar

CHECKPOINT = "generator checkpoint"
GENERATORS: dict[str, type[FeatureGenerator]] = {}


def generator(name: str) -> Callable[[type[FeatureGenerator]], type[FeatureGenerator]]:
    """Register a generator class under `name`, the value of GENERATOR.NAME (class decorator)."""

    def decorate(cls: type[FeatureGenerator]) -> type[FeatureGenerator]:
        cls.name = name
        GENERATORS[name] = cls
        return cls

    return decorate


def build_generator(name: str, feature_dim: int, condition_dim: int, **settings: Any) -> FeatureGenerator:
    """Create a registered generator.

    Args:
        name: its name in `GENERATORS`.
        feature_dim: d, the dimension of features.
        condition_dim: c, the dimension of conditions.
        settings: its keyword arguments.

    Raises:
        UserError: the name or a setting is unknown.
    """
    if name not in GENERATORS:
        raise unknown_name("generator", name, GENERATORS)
    setting_names = {
        parameter.name
        for cls in GENERATORS[name].__mro__
        if issubclass(cls, FeatureGenerator)
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for setting in settings:
        if setting not in setting_names:
            raise unknown_name(f"setting of the generator '{name}'", setting, setting_names)
    return GENERATORS[name](feature_dim, condition_dim, **settings)


def load_generator(path: str | os.PathLike[str]) -> FeatureGenerator:
    """Load a generator that `FeatureGenerator.save` wrote.

    Raises:
        UserError: the file is missing or broken.
    """
    tensors, metadata = load_tensors(path, "generator")
    try:
        dims = int(str(metadata["feature_dim"])), int(str(metadata["condition_dim"]))
        model = build_generator(str(metadata["name"]), *dims, **dict(metadata["settings"]))  # type: ignore[call-overload]
        model.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a valid generator file ({error})") from None
    return model


def device_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Return a random generator on `device`, seeded from `generator` (which this advances)."""
    if generator.device == device:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)


class FeatureGenerator(nn.Module):
    """Distribution of L2-normalized features given a condition vector (the text embedding of a class).

    Args:
        feature_dim: d, the dimension of features.
        condition_dim: c, the dimension of conditions; d for text embeddings.
    """

    name: ClassVar[str]
    feature_mean: Tensor
    condition_mean: Tensor

    def __init__(self, feature_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.feature_dim, self.condition_dim = feature_dim, condition_dim
        self.settings: dict[str, Any] = {}

    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        conditions: Tensor,
        generator: torch.Generator,
        checkpoint: Path | None = None,
    ) -> FeatureGenerator:
        """Fit the generator to features of base classes.

        Args:
            features: (n, d) L2-normalized features, on the device of the training.
            labels: (n,) classes, 0 to C - 1.
            conditions: (C, c) conditions of the classes.
            generator: source of all random draws.
            checkpoint: file for the state of a neural generator, from which an interrupted training resumes.

        Returns:
            The generator itself.

        Raises:
            UserError: shapes do not match, values are not finite, a class has no features, or training
                diverged in the first epoch.
        """
        raise NotImplementedError

    def sample(self, conditions: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Generate features.

        Args:
            conditions: (K, c) conditions of K classes.
            n: number of features per class.
            generator: source of all random draws.

        Returns:
            (K * n, d) L2-normalized features, sorted by class.
        """
        raise NotImplementedError

    def check(self, features: Tensor, labels: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Validate the arguments of `fit`.

        Returns:
            Features and conditions in float32.

        Raises:
            UserError: shapes do not match, values are not finite, or a class has no features.
        """
        if features.dim() != 2 or features.shape[1] != self.feature_dim or labels.shape != features.shape[:1]:
            raise UserError(
                f"a generator needs features (n, {self.feature_dim}) and labels (n,), "
                f"got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        if conditions.dim() != 2 or conditions.shape[1] != self.condition_dim:
            raise UserError(
                f"conditions must have shape (C, {self.condition_dim}), got {tuple(conditions.shape)}"
            )
        if not (torch.isfinite(features).all() and torch.isfinite(conditions).all()):
            raise UserError("features or conditions for the generator have values that are not finite")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(conditions):
            raise UserError(f"labels must be 0 to {len(conditions) - 1}, one class per condition")
        if (torch.bincount(labels, minlength=len(conditions)) == 0).any():
            raise UserError("every training class of a generator needs at least one feature")
        return features.float(), conditions.float()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the generator to a safetensors file."""
        metadata = {
            "kind": "generator",
            "name": self.name,
            "feature_dim": self.feature_dim,
            "condition_dim": self.condition_dim,
            "settings": self.settings,
        }
        save_tensors(path, self.state_dict(), metadata)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer whose weights are set later, by `NeuralGenerator.fit` or `load_generator`."""
    return nn.Linear(inputs, outputs, device="meta")


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a network with one hidden layer of leaky ReLUs (slope 0.2), as in f-VAEGAN."""
    return nn.Sequential(linear(inputs, hidden), nn.LeakyReLU(0.2), linear(hidden, outputs))


def update(loss: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
    """Take one step of each optimizer on the loss; return the loss, detached.

    Only the parameters of these optimizers receive gradients.
    """
    inputs = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward(inputs=inputs)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def critic_loss(
    critic: nn.Sequential, real: Tensor, fake: Tensor, a: Tensor, penalty: float, rng: torch.Generator
) -> Tensor:
    """Compute the critic loss of WGAN-GP (Gulrajani et al., 2017).

        E D(fake, a) - E D(real, a) + penalty E (|grad_x D(x, a)| - 1)^2

    with x at random points between real and fake. The pre-activations of D's hidden layer are linear in x, so
    that the gradient has a closed form. This halves the cost against double backpropagation.

    Args:
        critic: D, a network of `mlp`.
        real: (n, d) features.
        fake: (n, d) generated features.
        a: (n, c) conditions.
        penalty: weight of the gradient penalty.
        rng: source of the random points.
    """
    layers: Any = critic
    first, activation, last = layers
    parts = first.weight.split([real.shape[1], a.shape[1]], 1)
    feature_weight, condition_weight = (part.contiguous() for part in parts)
    condition_part = torch.addmm(first.bias, a, condition_weight.T)
    at_real, at_fake = (torch.cat([real, fake]) @ feature_weight.T).view(2, len(real), -1) + condition_part
    scores = last(activation(torch.stack([at_real, at_fake]))).mean((1, 2))
    mix = torch.rand(len(real), 1, device=real.device, generator=rng)
    between = torch.lerp(at_fake.detach(), at_real.detach(), mix)
    activation_slope = torch.where(between > 0, 1.0, activation.negative_slope)
    gradient = (activation_slope * last.weight) @ feature_weight
    return scores[1] - scores[0] + penalty * ((gradient.norm(dim=1) - 1) ** 2).mean()


def _add_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names `prefix`/name."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _remove_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `_add_prefix` put under `prefix`, with their own names."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


class NeuralGenerator(FeatureGenerator):
    """Base class of generators that are trained by gradient descent.

    Features and conditions are standardized: centered and scaled to unit variance on average.

    Early stopping needs no image. A share `holdout` of the base classes is excluded from training. After each
    epoch, the features generated for these classes are compared with their virtual features by the squared
    Frechet distance of isotropic Gaussians, the mean over classes of |m - m'|^2 + d (s - s')^2. Training
    stops after `patience` epochs without improvement, and the state of the best epoch is restored. With
    `holdout` 0 (the paper) or fewer than 4 classes, the distance is computed on training classes and serves
    to detect divergence only.

    Args:
        feature_dim: d, the dimension of features.
        condition_dim: c, the dimension of conditions.
        hidden: hidden units.
        latent: noise dimensions; 0: `condition_dim`.
        epochs: maximal number of epochs.
        batch: batch size.
        lr: learning rate of Adam (betas 0.5, 0.999).
        holdout: share of classes for early stopping.
        patience: epochs without improvement before training stops.
        settings: keyword arguments of the subclass, which `save` stores.
    """

    feature_scale: Tensor
    condition_scale: Tensor

    def __init__(
        self,
        feature_dim: int,
        condition_dim: int,
        *,
        hidden: int = 1024,
        latent: int = 0,
        epochs: int = 120,
        batch: int = 64,
        lr: float = 3e-5,
        holdout: float = 0.1,
        patience: int = 20,
        **settings: Any,
    ) -> None:
        super().__init__(feature_dim, condition_dim)
        self.hidden, self.latent, self.epochs, self.batch, self.lr = (
            hidden,
            latent or condition_dim,
            epochs,
            batch,
            lr,
        )
        self.holdout, self.patience = holdout, patience
        common = {"hidden": hidden, "latent": latent, "epochs": epochs, "batch": batch, "lr": lr}
        self.settings = {**common, "holdout": holdout, "patience": patience, **settings}
        self.history: list[float] = []
        self.optimizers: list[torch.optim.Adam] = []
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_scale", torch.ones(()))
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("condition_scale", torch.ones(()))

    def standardize_conditions(self, conditions: Tensor) -> Tensor:
        """Return the conditions (n, c) as the networks read them."""
        return (conditions - self.condition_mean) / self.condition_scale

    def start(self, x: Tensor, y: Tensor, a: Tensor, rng: torch.Generator) -> None:
        """Create the optimizers; called once, after the weights are initialized.

        Args:
            x: (n, d) standardized training features.
            y: (n,) their labels.
            a: (C, c) standardized conditions of all classes.
            rng: source of random draws.
        """
        raise NotImplementedError

    def step(self, batches: Callable[[], tuple[Tensor, Tensor]], rng: torch.Generator) -> Tensor:
        """Take one training step on batches (x, a) of `batches()`; return its loss, detached."""
        raise NotImplementedError

    def generate(self, a: Tensor, rng: torch.Generator) -> Tensor:
        """Generate standardized features (n, d) for standardized conditions (n, c)."""
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Prepare an epoch; called before each one."""

    def adam(self, *modules: nn.Module, lr: float | None = None) -> torch.optim.Adam:
        """Create an optimizer of these modules, which checkpoints include."""
        parameters = [p for module in modules for p in module.parameters()]
        lr = self.lr if lr is None else lr
        self.optimizers.append(torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999), fused=True))
        return self.optimizers[-1]

    @torch.enable_grad()
    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        conditions: Tensor,
        generator: torch.Generator,
        checkpoint: Path | None = None,
    ) -> NeuralGenerator:
        features, conditions = self.check(features, labels, conditions)
        device = features.device
        # Every parameter and buffer is set below.
        self.to_empty(device=device)
        rng = device_generator(generator, device)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, 0.02, generator=rng)
        self.feature_mean.copy_(features.mean(0))
        self.feature_scale.copy_((features - self.feature_mean).square().mean().sqrt().clamp(min=1e-6))
        self.condition_mean.copy_(conditions.mean(0))
        self.condition_scale.copy_((conditions - self.condition_mean).square().mean().sqrt().clamp(min=1e-6))
        x = (features - self.feature_mean) / self.feature_scale
        a = self.standardize_conditions(conditions)

        classes = len(conditions)
        num_holdout = math.ceil(self.holdout * classes) if classes >= 4 else 0
        order = torch.randperm(classes, device=device, generator=rng)
        monitored = order[:num_holdout] if num_holdout else order
        is_training = ~torch.isin(labels, order[:num_holdout])
        x_train, y_train = x[is_training], labels[is_training]
        means = class_means(features, labels, classes)[monitored]

        def batches() -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(x_train), (self.batch,), device=device, generator=rng)
            return x_train[rows], a[y_train[rows]]

        deviation = (features - class_means(features, labels, classes)[labels]).square().mean().sqrt()

        def distance() -> float:
            n = 32
            samples = self.sample(conditions[monitored], n, rng).view(len(monitored), n, -1)
            sample_means = samples.mean(1, keepdim=True)
            variance = (samples - sample_means).square().sum(1).mean(1) / (n - 1)
            # The mean of n samples deviates by variance / n per coordinate; subtract this bias.
            mean_distance = (sample_means[:, 0] - means).square().sum(1) - self.feature_dim * variance / n
            return float((mean_distance + self.feature_dim * (variance.sqrt() - deviation) ** 2).mean())

        self.optimizers = []
        self.start(x_train, y_train, a, rng)
        if checkpoint is not None and checkpoint.exists():
            epoch, best, stale_epochs, best_state = self._load_checkpoint(checkpoint, rng)
        else:
            self.history = [distance()]
            epoch, best, stale_epochs, best_state = 0, math.inf, 0, None
        with progress_bar(
            desc=f"train {self.name}", total=self.epochs, initial=epoch, unit="epoch"
        ) as progress:
            while epoch < self.epochs and stale_epochs < max(self.patience, 1):
                self.start_epoch(epoch)
                losses = [self.step(batches, rng) for _ in range(math.ceil(len(x_train) / self.batch))]
                current = distance()
                if not (torch.isfinite(torch.stack(losses)).all() and math.isfinite(current)):
                    if best_state is None:
                        raise UserError(
                            f"the generator '{self.name}' diverged in its first epoch; "
                            "lower GENERATOR.LR or set GENERATOR.NAME vmf"
                        )
                    warnings.warn(
                        f"the generator '{self.name}' diverged in epoch {epoch + 1} of {self.epochs}; "
                        f"the state of epoch {epoch - stale_epochs} is used",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    break
                self.history.append(current)
                epoch, stale_epochs = epoch + 1, stale_epochs + 1
                if current < best or not num_holdout:
                    best, best_state, stale_epochs = current, copy.deepcopy(self.state_dict()), 0
                progress.update()
                if checkpoint is not None:
                    self._save_checkpoint(checkpoint, epoch, best, stale_epochs, best_state, rng)
        if best_state is not None:
            self.load_state_dict(best_state)
        return self

    def _save_checkpoint(
        self,
        path: Path,
        epoch: int,
        best: float,
        stale_epochs: int,
        best_state: dict[str, Tensor] | None,
        rng: torch.Generator,
    ) -> None:
        """Write the training state; with `stale_epochs` 0 the current state is the best one."""
        tensors = {"rng": rng.get_state(), **_add_prefix("now", self.state_dict())}
        if stale_epochs and best_state:
            tensors |= _add_prefix("best", best_state)
        for index, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state_dict()["state"].items():
                tensors |= _add_prefix(f"optimizer {index} {parameter}", state)
        metadata = {"epoch": epoch, "best": best, "since": stale_epochs, "history": self.history}
        save_tensors(path, tensors, {"kind": CHECKPOINT, "name": self.name, **metadata})

    def _load_checkpoint(self, path: Path, rng: torch.Generator) -> tuple[int, float, int, dict[str, Tensor]]:
        """Restore the training state; return epoch, best distance, epochs since then and the best state.

        Raises:
            UserError: the file is broken or belongs to another generator.
        """
        tensors, metadata = load_tensors(path, CHECKPOINT)
        try:
            if metadata["name"] != self.name:
                raise KeyError(self.name)
            for index, optimizer in enumerate(self.optimizers):
                optimizer_state = optimizer.state_dict()
                count = sum(len(group["params"]) for group in optimizer_state["param_groups"])
                states = (
                    _remove_prefix(f"optimizer {index} {parameter}", tensors) for parameter in range(count)
                )
                # A parameter without a step has no state.
                optimizer_state["state"] = {
                    parameter: state for parameter, state in enumerate(states) if state
                }
                optimizer.load_state_dict(optimizer_state)
            self.load_state_dict(_remove_prefix("now", tensors))
            self.history = list(metadata["history"])  # type: ignore[call-overload]
            epoch, best, stale_epochs = (metadata[key] for key in ("epoch", "best", "since"))
            best_state = _remove_prefix("best", tensors) if stale_epochs else copy.deepcopy(self.state_dict())
            rng.set_state(tensors["rng"])
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise UserError(
                f"{path}: not a checkpoint of the generator '{self.name}'; delete it to restart the training"
            ) from None
        return epoch, best, stale_epochs, best_state  # type: ignore[return-value]

    @torch.no_grad()
    def sample(self, conditions: Tensor, n: int, generator: torch.Generator) -> Tensor:
        rng = device_generator(generator, conditions.device)
        a = self.standardize_conditions(conditions.float()).repeat_interleave(n, 0)
        samples = torch.cat([self.generate(part, rng) for part in a.split(8192)]) if len(a) else a
        return F.normalize(self.feature_mean + self.feature_scale * samples, dim=1)
