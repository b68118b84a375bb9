"""Learn prototypes of the base classes as the paper does: on draws, on their moments, or by a generator.

Tang et al., Data-Free Generalized Zero-Shot Learning, AAAI 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import unit
from dfzsl.utils.progress import progress_bar

from .oracle import Oracle
from .responses import Ask
from .settings import RecoverySettings
from .virtual_classes import FeatureMLP
from .vmf import VonMisesFisher


def simulate(
    ask: Ask,
    oracle: Oracle,
    text: Tensor,
    kappa: Tensor,
    options: RecoverySettings,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The paper's simulator: prototypes (C, d) that start at the text features and learn on their own draws.

    Each epoch draws x ~ vMF(mu_c, kappa), `draws` per class, and takes one step on: with logits, the mean
    squared error between cos(x, mu) and the teacher's cosines; with the weights, the cross-entropy of the
    teacher's own logits of x.
    """
    white_box = oracle.level == "weights"
    if not white_box and (oracle.level != "logits" or not oracle.normalized):
        raise UserError(
            "the simulator compares cosines: it needs a cosine teacher that answers logits, or its weights; "
            "set RECOVERY.METHOD to closed_form"
        )
    if oracle.budget and (wanted := options.epochs * options.draws * len(text)) > oracle.budget:
        raise UserError(
            f"the simulator asks {wanted:,} questions, TEACHER.BUDGET is {oracle.budget:,}; set "
            "RECOVERY.METHOD to closed_form, or lower RECOVERY.EPOCHS or DRAWS"
        )
    mu = nn.Parameter(text.clone())
    labels = torch.arange(len(text)).repeat(options.draws)

    def loss() -> Tensor:
        x = VonMisesFisher(mu, kappa).rsample((options.draws,), generator).flatten(0, 1)
        if white_box:
            return F.cross_entropy(ask(x), labels)
        return F.mse_loss(x @ F.normalize(mu, dim=1).T, ask(x).to(x))

    _descend([mu], loss, options)
    return F.normalize(mu.detach(), dim=1)


def simulate_moments(weight: Tensor, text: Tensor, kappa: Tensor, options: RecoverySettings) -> Tensor:
    """Learn prototypes (C, d) as `simulate` does, by the expected loss in place of draws.

    Args:
        weight: (C, d) the teacher's class weights.
        text: (C, d) L2-normalized text embeddings, where the prototypes start.
        kappa: (C,) concentrations.
        options: epochs and learning rate.
    """
    a, b = (t.float() for t in VonMisesFisher(text, kappa).second_moment)
    weight = unit(weight)
    mu = nn.Parameter(text.clone())
    _descend([mu], lambda: expected_loss(F.normalize(mu, dim=1), weight, a, b), options)
    return F.normalize(mu.detach(), dim=1)


def expected_loss(mu: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the simulator's expected loss over draws x of all classes.

    With D = mu - w and E[x x^T] = a I + b mu_c mu_c^T,

        E (cos(x, mu_k) - cos(x, w_k))^2 = a |D_k|^2 + b (D_k.mu_c)^2,

    averaged over the drawn class c and the prototype k.

    Args:
        mu: (C, d) unit prototypes.
        weight: (C, d) unit class weights of the teacher.
        a, b: (C,) second moments of the draws.
    """
    difference = mu - weight
    return a.mean() * difference.square().sum(1).mean() + (b[:, None] * (mu @ difference.T) ** 2).mean()


def _descend(
    parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], options: RecoverySettings
) -> None:
    """The paper's optimiser: Adam with weight decay 5e-4 and lr falling as (1 + 0.001 epoch)^-0.75."""
    optimizer = torch.optim.Adam(parameters, lr=options.lr, weight_decay=5e-4)
    with torch.enable_grad():
        for epoch in progress_bar(range(options.epochs), "recover", unit="epoch"):
            optimizer.param_groups[0]["lr"] = options.lr * (1 + 0.001 * epoch) ** -0.75
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()


def train_generator(
    weight: Tensor,
    bias: Tensor | None,
    text: Tensor,
    options: RecoverySettings,
    generator: torch.Generator | None = None,
) -> FeatureMLP:
    """Train `FeatureMLP` until the teacher assigns its features to their text's class."""
    network = FeatureMLP(text.shape[1])
    network.initialize(generator)
    labels = torch.arange(len(text)).repeat(options.draws)

    def loss() -> Tensor:
        x = network(text, options.draws, generator).flatten(0, 1)
        return F.cross_entropy(F.linear(x, weight, bias), labels)

    _descend(network.parameters(), loss, options)
    return network.requires_grad_(False).eval()
