"""Stage 1: a von Mises-Fisher distribution for each base class, from the teacher and the class names.

`recover` first learns what it can of the teacher's rows (its method), then places the classes on the sphere
(directions) and says how tightly their features lie around them (concentration).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfzsl.utils.errors import UserError, unknown
from dfzsl.utils.numerics import checked, unit
from dfzsl.utils.progress import bar

from .class_directions import (
    COHERENCE,
    class_directions,
    common_direction,
    cone_of,
    geometry_concentration,
    paper_concentration,
)
from .extract import extract_rows
from .feature_statistics import Geometry
from .oracle import Oracle
from .responses import Ask, Extracted
from .virtual_classes import STAGE, FeatureMLP, VirtualClasses, matching_order
from .vmf import VonMisesFisher

METHODS = ("closed_form", "moments", "simulator", "gmm", "generator")


@dataclass
class RecoverySettings:
    """Config keys RECOVERY.*, in upper case. The paper's own values: configs/trainers/DFZSL/paper/.

    method: how the teacher is learned.
        closed_form  its rows, exactly where the access level shows them (extract.py)
        simulator    the paper: prototypes learned on vMF draws, epochs x draws x classes queries
        moments      the simulator's expected loss from the vMF's second moment: no draws, d queries
        gmm          the paper's: nothing is learned, prototypes are the text features
        generator    the paper's: an MLP from text and noise instead of a vMF
    directions: mean directions of the classes: "geometry" (class_directions.py), or "teacher": the learned
        rows. gmm and generator start from the text features instead.
    concentration: "geometry" (one value from `coherence`) or "paper" (angles between text features).
    theta: factor on the concentration.
    epochs, lr, draws: of simulator, moments and generator; draws per class and epoch.
    coherence: mean cosine of a class's features to their mean; cone: of class means to their common mean. 0:
        what the teacher's card says, else 0.88, amid real data sets, and `cone_of` the texts.
    rays, bisections: the price of a teacher that answers labels alone.
    tolerance: relative error of the rows below which no more logits or probabilities are asked for.
    num_per_class, filter, fresh: the virtual-feature loader's (datasets/virtual_features.py).
    """

    method: str = "closed_form"
    directions: str = "geometry"
    concentration: str = "geometry"
    theta: float = 1.0
    epochs: int = 1000
    lr: float = 3e-3
    draws: int = 50
    coherence: float = 0.0
    cone: float = 0.0
    rays: float = 1.25
    bisections: int = 12
    tolerance: float = 0.02
    num_per_class: int = 100
    filter: bool = False
    fresh: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("method", METHODS),
            ("directions", ("geometry", "teacher")),
            ("concentration", ("geometry", "paper")),
        ):
            if (value := getattr(self, name)) not in known:
                raise unknown(f"RECOVERY.{name.upper()}", value, known)
        for name in ("theta", "lr", "epochs", "draws", "bisections", "tolerance", "num_per_class"):
            if not getattr(self, name) > 0:
                raise UserError(f"RECOVERY.{name.upper()} must be greater than 0, got {getattr(self, name)}")
        if not self.rays > 1:
            raise UserError(f"RECOVERY.RAYS must be greater than 1, got {self.rays}")


def recover(
    oracle: Oracle,
    text: Tensor,
    classnames: Sequence[str] | None = None,
    new_text: Tensor | None = None,
    generator: torch.Generator | None = None,
    geometry: Geometry | None = None,
    **settings,
) -> VirtualClasses:
    """Model every base class of the teacher as a vMF distribution.

    Args:
        oracle: the teacher at some access level (oracle.py).
        text: (C, d) unit text features of `classnames`, which defaults to the oracle's own order; another
            order is matched by name.
        new_text: (K, d) text features of the new classes, if they are known already.
        geometry: of the encoder, if one was measured: its mean direction is then where images lie, and the
            virtual features scatter as it says.
        settings: fields of `RecoverySettings`.

    Raises UserError for names or shapes that do not match, an access level that the method cannot use, and a
    teacher whose answers are faulty or stop.
    """
    options = RecoverySettings(**settings)
    if geometry is not None and len(geometry.mean) != oracle.dim:
        raise UserError(f"the geometry is of {len(geometry.mean)} dimensions, the teacher of {oracle.dim}")
    names = list(oracle.classnames if classnames is None else classnames)
    order = matching_order(oracle.classnames, names)
    if text.shape != (len(names), oracle.dim):
        raise UserError(f"text features have shape {tuple(text.shape)}, expected {(len(names), oracle.dim)}")
    text = checked(unit(text.float()), STAGE, "text feature", names)
    all_text = text
    if new_text is not None:
        all_text = torch.cat([text, checked(unit(new_text.float()), f"{STAGE}, new classes", "text feature")])
    place = torch.argsort(order)

    def ask(x: Tensor) -> Tensor:
        answers = oracle(x)
        if answers.dim() == 2 and len(names) > 1 and (answers == answers[:, :1]).all():
            raise UserError(f"{STAGE}: the teacher gives every class the same score: it tells none apart")
        return place[answers] if oracle.level == "labels" else answers[:, order]

    def rows() -> Extracted:
        if oracle.weight is not None:
            weight = oracle.weight[order].float()
            bias = None if oracle.bias is None else oracle.bias[order].float()
            return Extracted(unit(weight) if oracle.normalized else weight, bias, 0.0)
        return extract_rows(
            ask,
            oracle.level,
            names,
            text,
            rays=options.rays,
            bisections=options.bisections,
            tolerance=options.tolerance,
            budget=oracle.budget,
            generator=generator,
        )

    def told(name: str) -> float | None:
        return getattr(oracle.card, name, None)

    if options.concentration == "paper":
        # The released gmm mode looks at the new names as well.
        rule = paper_concentration(all_text if options.method == "gmm" else text)
    else:
        rule = geometry_concentration(oracle.dim, options.coherence or told("coherence") or COHERENCE)
    if not options.theta * rule < torch.finfo(torch.float32).max:
        raise UserError(f"RECOVERY.THETA {options.theta} makes the concentration infinite; lower it")
    kappa = torch.full((len(names),), options.theta * rule)

    network = bias = None  # the methods that compare cosines know of no intercept
    known = None if options.method == "simulator" else rows()
    if known is None:
        weight = simulate(ask, oracle, text, kappa, options, generator)
    elif options.method == "moments":
        weight = simulate_moments(known.weight, text, kappa, options)
    else:
        weight, bias = known.weight, known.bias
    if options.method == "generator":
        network = train_generator(weight, bias, text, options, generator)
        mu = text
    elif options.method == "gmm":
        mu = text
    elif options.directions == "teacher":
        mu = unit(weight)
    else:
        common = common_direction(all_text) if geometry is None else geometry.mean.to(text)
        mu = class_directions(weight, common, options.cone or told("cone") or cone_of(text))
    checked(mu, STAGE, "mean direction", names)
    return VirtualClasses(
        mu,
        kappa,
        names,
        weight,
        oracle.queries,
        options.method,
        oracle.level,
        oracle.backbone,
        network,
        bias,
        error=known.error if known else None,
        known_weight=oracle.card.weight if oracle.card else None,
        geometry=geometry,
    )


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
    """`simulate` with its expected loss: for rows D = mu - w and E[x x^T] = a I + b mu_c mu_c^T,

    E (cos(x, mu_k) - cos(x, w_k))^2 = a |D_k|^2 + b (D_k.mu_c)^2, averaged over drawn class c and row k.
    """
    a, b = (t.float() for t in VonMisesFisher(text, kappa).second_moment)
    weight = unit(weight)
    mu = nn.Parameter(text.clone())

    def loss() -> Tensor:
        unit = F.normalize(mu, dim=1)
        difference = unit - weight
        return a.mean() * difference.square().sum(1).mean() + (b[:, None] * (unit @ difference.T) ** 2).mean()

    _descend([mu], loss, options)
    return F.normalize(mu.detach(), dim=1)


def _descend(
    parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], options: RecoverySettings
) -> None:
    """The paper's optimiser: Adam with weight decay 5e-4 and lr falling as (1 + 0.001 epoch)^-0.75."""
    optimizer = torch.optim.Adam(parameters, lr=options.lr, weight_decay=5e-4)
    with torch.enable_grad():
        for epoch in bar(range(options.epochs), "recover", unit="epoch"):
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
