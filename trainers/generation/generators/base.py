"""What all generators share: the interface, the registry, files, and the training loop of the neural ones."""

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
    """Class decorator: register a generator under `name`, the value of GENERATOR.NAME."""

    def decorate(cls: type[FeatureGenerator]) -> type[FeatureGenerator]:
        cls.name = name
        GENERATORS[name] = cls
        return cls

    return decorate


def build_generator(name: str, feature_dim: int, condition_dim: int, **settings: Any) -> FeatureGenerator:
    """The registered generator; `settings` are its keyword arguments. UserError if unknown."""
    if name not in GENERATORS:
        raise unknown_name("generator", name, GENERATORS)
    known = {
        parameter.name
        for cls in GENERATORS[name].__mro__
        if issubclass(cls, FeatureGenerator)
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for setting in settings:
        if setting not in known:
            raise unknown_name(f"setting of the generator '{name}'", setting, known)
    return GENERATORS[name](feature_dim, condition_dim, **settings)


def load_generator(path: str | os.PathLike[str]) -> FeatureGenerator:
    """Read what `FeatureGenerator.save` wrote. Raises UserError when the file is missing or broken."""
    tensors, about = load_tensors(path, "generator")
    try:
        dims = int(str(about["feature_dim"])), int(str(about["condition_dim"]))
        model = build_generator(str(about["name"]), *dims, **dict(about["settings"]))  # type: ignore[call-overload]
        model.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: the tensors are not those of a generator ({error})") from None
    return model


def device_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A random stream on `device` that is determined by (and advances) `generator`."""
    if generator.device == device:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)


class FeatureGenerator(nn.Module):
    """A distribution of unit features given a condition vector.

    Args:
        feature_dim: d; condition_dim: length of a condition (a text feature: also d).
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
        """Learn from unit features (n, d), labels (n,) and the conditions (C, c) of the classes 0 ... C-1.

        All tensors lie on one device, which is where it trains. Everything random comes from `generator`.
        What trains for long keeps its state in the file `checkpoint`, and goes on from there.
        """
        raise NotImplementedError

    def sample(self, conditions: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Unit features (K * n, d), class-major, for conditions (K, c)."""
        raise NotImplementedError

    def check(self, features: Tensor, labels: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Features and conditions in float32.

        Raises UserError for shapes that do not fit, values not finite, or a class without features."""
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
            raise UserError("the features or conditions for the generator have values that are not finite")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(conditions):
            raise UserError(f"labels must lie in 0 ... {len(conditions) - 1}, one for each condition")
        if (torch.bincount(labels, minlength=len(conditions)) == 0).any():
            raise UserError("every class the generator learns from needs at least one feature")
        return features.float(), conditions.float()

    def save(self, path: str | os.PathLike[str]) -> None:
        about = {
            "kind": "generator",
            "name": self.name,
            "feature_dim": self.feature_dim,
            "condition_dim": self.condition_dim,
            "settings": self.settings,
        }
        save_tensors(path, self.state_dict(), about)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Make a linear layer without weights: `NeuralGenerator.fit` draws them, `load_generator` reads them."""
    return nn.Linear(inputs, outputs, device="meta")


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """One hidden layer of leaky ReLUs (slope 0.2): the networks of the f-VAEGAN family."""
    return nn.Sequential(linear(inputs, hidden), nn.LeakyReLU(0.2), linear(hidden, outputs))


def update(loss: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
    """One step of these optimisers on the loss, for whose parameters alone it has a gradient; detached."""
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
    """E D(fake, a) - E D(real, a) + penalty E (|grad_x D(x, a)| - 1)^2, x at random points between real and
    fake (WGAN-GP, Gulrajani et al. 2017), for features (n, d), conditions (n, c) and D made by `mlp`.

    D's hidden layer is linear in x, so its value between two points lies between its values there, and the
    slope has a closed form: half the arithmetic of two graphs, one for the slope and one for its gradient.
    """
    layers: Any = critic
    first, activation, last = layers
    parts = first.weight.split([real.shape[1], a.shape[1]], 1)
    of_features, of_conditions = (part.contiguous() for part in parts)
    beside = torch.addmm(first.bias, a, of_conditions.T)
    at_real, at_fake = (torch.cat([real, fake]) @ of_features.T).view(2, len(real), -1) + beside
    scores = last(activation(torch.stack([at_real, at_fake]))).mean((1, 2))
    mix = torch.rand(len(real), 1, device=real.device, generator=rng)
    between = torch.lerp(at_fake.detach(), at_real.detach(), mix)
    gate = torch.where(between > 0, 1.0, activation.negative_slope)
    slope = (gate * last.weight) @ of_features
    return scores[1] - scores[0] + penalty * ((slope.norm(dim=1) - 1) ** 2).mean()


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `_prefixed` got."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


class NeuralGenerator(FeatureGenerator):
    """The training loop of neural generators: batches drawn on the device, monitored, stopped in time.

    Networks see features centred and scaled to unit variance on average, so that the direction in which all
    of CLIP's image features lie need not be learned; conditions likewise.

    The monitor needs no image: a share `holdout` of the base classes is kept out of training, and after each
    epoch the features generated from their conditions are compared with their own by the squared Frechet
    distance of isotropic Gaussians, mean over classes of |m - m'|^2 + d (s - s')^2. The best epoch's state is
    kept, and training stops when `patience` epochs bring nothing better. With `holdout` 0 (the paper), or
    fewer than 4 classes, training classes are monitored, and only to catch divergence.

    Args:
        hidden: hidden units; latent: noise dimensions, 0 for `condition_dim`; epochs: most passes;
        batch: features a step; lr: Adam's step size (betas 0.5, 0.999).
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
        own = {"hidden": hidden, "latent": latent, "epochs": epochs, "batch": batch, "lr": lr}
        self.settings = {**own, "holdout": holdout, "patience": patience, **settings}
        self.history: list[float] = []
        self.optimizers: list[torch.optim.Adam] = []
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_scale", torch.ones(()))
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("condition_scale", torch.ones(()))

    def networks_input(self, conditions: Tensor) -> Tensor:
        return (conditions - self.condition_mean) / self.condition_scale

    def start(self, x: Tensor, y: Tensor, a: Tensor, rng: torch.Generator) -> None:
        """Make the optimisers. Called once, after the weights are initialised."""
        raise NotImplementedError

    def step(self, batches: Callable[[], tuple[Tensor, Tensor]], rng: torch.Generator) -> Tensor:
        """One update from as many batches (x, a) as it needs; returns its loss, detached."""
        raise NotImplementedError

    def generate(self, a: Tensor, rng: torch.Generator) -> Tensor:
        """Scaled features (n, d) for scaled conditions (n, c)."""
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch."""

    def adam(self, *modules: nn.Module, lr: float | None = None) -> torch.optim.Adam:
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
        self.to_empty(device=device)  # every parameter and buffer is set below
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
        a = self.networks_input(conditions)

        classes = len(conditions)
        held = math.ceil(self.holdout * classes) if classes >= 4 else 0
        order = torch.randperm(classes, device=device, generator=rng)
        watched = order[:held] if held else order
        training = ~torch.isin(labels, order[:held])
        x_train, y_train = x[training], labels[training]
        means = class_means(features, labels, classes)[watched]

        def batches() -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(x_train), (self.batch,), device=device, generator=rng)
            return x_train[rows], a[y_train[rows]]

        spread = (features - class_means(features, labels, classes)[labels]).square().mean().sqrt()

        def distance() -> float:
            n = 32
            made = self.sample(conditions[watched], n, rng).view(len(watched), n, -1)
            made_mean = made.mean(1, keepdim=True)
            # Unbiased in n: the mean of n draws is off by s^2 / n per coordinate.
            deviation = (made - made_mean).square().sum(1).mean(1) / (n - 1)
            apart = (made_mean[:, 0] - means).square().sum(1) - self.feature_dim * deviation / n
            return float((apart + self.feature_dim * (deviation.sqrt() - spread) ** 2).mean())

        self.optimizers = []
        self.start(x_train, y_train, a, rng)
        if checkpoint is not None and checkpoint.exists():
            epoch, best, since, best_state = self._go_on(checkpoint, rng)
        else:
            self.history = [distance()]
            epoch, best, since, best_state = 0, math.inf, 0, None
        with progress_bar(desc=f"train {self.name}", total=self.epochs, initial=epoch, unit="epoch") as shown:
            while epoch < self.epochs and since < max(self.patience, 1):
                self.start_epoch(epoch)
                losses = [self.step(batches, rng) for _ in range(math.ceil(len(x_train) / self.batch))]
                now = distance()
                if not (torch.isfinite(torch.stack(losses)).all() and math.isfinite(now)):
                    if best_state is None:
                        raise UserError(
                            f"the generator '{self.name}' diverged in its first epoch; "
                            "lower GENERATOR.LR or choose GENERATOR.NAME vmf"
                        )
                    warnings.warn(
                        f"the generator '{self.name}' diverged in epoch {epoch + 1} of {self.epochs}; "
                        f"the state of epoch {epoch - since} is kept",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    break
                self.history.append(now)
                epoch, since = epoch + 1, since + 1
                if now < best or not held:
                    best, best_state, since = now, copy.deepcopy(self.state_dict()), 0
                shown.update()
                if checkpoint is not None:
                    self._keep(checkpoint, epoch, best, since, best_state, rng)
        if best_state is not None:
            self.load_state_dict(best_state)
        return self

    def _keep(
        self,
        path: Path,
        epoch: int,
        best: float,
        since: int,
        best_state: dict[str, Tensor] | None,
        rng: torch.Generator,
    ) -> None:
        """Write all that the next epoch depends on; with `since` 0 the state is the best one."""
        tensors = {"rng": rng.get_state(), **_prefixed("now", self.state_dict())}
        if since and best_state:
            tensors |= _prefixed("best", best_state)
        for index, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state_dict()["state"].items():
                tensors |= _prefixed(f"optimizer {index} {parameter}", state)
        about = {"epoch": epoch, "best": best, "since": since, "history": self.history}
        save_tensors(path, tensors, {"kind": CHECKPOINT, "name": self.name, **about})

    def _go_on(self, path: Path, rng: torch.Generator) -> tuple[int, float, int, dict[str, Tensor]]:
        """Read what `_keep` wrote: its epoch, best, since and best_state. Raises UserError when it is broken
        or of another generator."""
        tensors, about = load_tensors(path, CHECKPOINT)
        try:
            if about["name"] != self.name:
                raise KeyError(self.name)
            for index, optimizer in enumerate(self.optimizers):
                whole = optimizer.state_dict()
                count = sum(len(group["params"]) for group in whole["param_groups"])
                states = (_without(f"optimizer {index} {parameter}", tensors) for parameter in range(count))
                # One that has made no step yet has none.
                whole["state"] = {parameter: state for parameter, state in enumerate(states) if state}
                optimizer.load_state_dict(whole)
            self.load_state_dict(_without("now", tensors))
            self.history = list(about["history"])  # type: ignore[call-overload]
            epoch, best, since = (about[key] for key in ("epoch", "best", "since"))
            best_state = _without("best", tensors) if since else copy.deepcopy(self.state_dict())
            rng.set_state(tensors["rng"])
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise UserError(f"{path}: not what this generator kept; delete it to train anew") from None
        return epoch, best, since, best_state  # type: ignore[return-value]

    @torch.no_grad()
    def sample(self, conditions: Tensor, n: int, generator: torch.Generator) -> Tensor:
        rng = device_generator(generator, conditions.device)
        a = self.networks_input(conditions.float()).repeat_interleave(n, 0)
        made = torch.cat([self.generate(part, rng) for part in a.split(8192)]) if len(a) else a
        return F.normalize(self.feature_mean + self.feature_scale * made, dim=1)
