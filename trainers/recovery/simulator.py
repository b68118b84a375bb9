"""Train prototypes of the base classes as the paper does: on vMF draws, their moments, or a generator.

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
from .responses import QueryFunction
from .settings import RecoverySettings
from .virtual_classes import FeatureMLP
from .vmf import VonMisesFisher


def simulate(
    query: QueryFunction,
    oracle: Oracle,
    text: Tensor,
    kappa: Tensor,
    options: RecoverySettings,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Train prototypes by the paper's simulator.

    The prototypes mu start at the text embeddings. Each epoch draws x ~ vMF(mu_c, kappa), `draws` per class,
    and takes one step. At level logits the loss is the mean squared error between cos(x, mu) and the
    teacher's cosines. At level weights it is the cross-entropy of the teacher's logits of x.

    Args:
        query: returns the teacher's responses to unit features (n, d).
        oracle: the teacher's oracle.
        text: (C, d) L2-normalized text embeddings.
        kappa: (C,) concentrations.
        options: epochs, learning rate and draws.
        generator: source of the draws.

    Returns:
        (C, d) L2-normalized prototypes.

    Raises:
        UserError: the teacher gives no cosines, or the budget is too small.
    """
    white_box = oracle.level == "weights"
    if not white_box and (oracle.level != "logits" or not oracle.normalized):
        raise UserError(
            "the simulator needs a cosine teacher at access level logits or weights; "
            "set RECOVERY.METHOD to closed_form"
        )
    if oracle.budget and (needed := options.epochs * options.draws * len(text)) > oracle.budget:
        raise UserError(
            f"the simulator needs {needed:,} queries, TEACHER.BUDGET is {oracle.budget:,}; set "
            "RECOVERY.METHOD to closed_form, or lower RECOVERY.EPOCHS or DRAWS"
        )
    mu = nn.Parameter(text.clone())
    labels = torch.arange(len(text)).repeat(options.draws)

    def loss() -> Tensor:
        x = VonMisesFisher(mu, kappa).rsample((options.draws,), generator).flatten(0, 1)
        if white_box:
            return F.cross_entropy(query(x), labels)
        return F.mse_loss(x @ F.normalize(mu, dim=1).T, query(x).to(x))

    _optimize([mu], loss, options)
    return F.normalize(mu.detach(), dim=1)


def simulate_moments(weight: Tensor, text: Tensor, kappa: Tensor, options: RecoverySettings) -> Tensor:
    """Train prototypes as `simulate` does, on the expected loss in place of draws.

    Args:
        weight: (C, d) the teacher's class weights.
        text: (C, d) L2-normalized text embeddings, where the prototypes start.
        kappa: (C,) concentrations.
        options: epochs and learning rate.

    Returns:
        (C, d) L2-normalized prototypes.
    """
    a, b = (t.float() for t in VonMisesFisher(text, kappa).second_moment)
    weight = unit(weight)
    mu = nn.Parameter(text.clone())
    _optimize([mu], lambda: expected_loss(F.normalize(mu, dim=1), weight, a, b), options)
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


def _optimize(
    parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], options: RecoverySettings
) -> None:
    """Run the paper's optimizer: Adam, weight decay 5e-4, learning rate lr (1 + 0.001 epoch)^-0.75."""
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
    """Train a `FeatureMLP` on the teacher's cross-entropy of its features.

    Args:
        weight: (C, d) the teacher's class weights.
        bias: (C,) the teacher's intercepts, or None.
        text: (C, d) L2-normalized text embeddings.
        options: epochs, learning rate and draws.
        generator: source of initial weights and noise.

    Returns:
        The network, in evaluation mode.
    """
    network = FeatureMLP(text.shape[1])
    network.initialize(generator)
    labels = torch.arange(len(text)).repeat(options.draws)

    def loss() -> Tensor:
        x = network(text, options.draws, generator).flatten(0, 1)
        return F.cross_entropy(F.linear(x, weight, bias), labels)

    _optimize(network.parameters(), loss, options)
    return network.requires_grad_(False).eval()
