"""Recover virtual base classes from a teacher and class names (stage 1).

`recover` models each class as a von Mises-Fisher distribution. It first recovers the teacher's class weights
as far as the access level determines them (setting `method`), then estimates the mean direction of each
class (`directions`) and the concentration (`concentration`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfzsl.utils.errors import UserError
from dfzsl.utils.numerics import check_unit_rows, unit
from dfzsl.utils.progress import progress_bar

from .class_directions import (
    MEAN_RESULTANT_LENGTH,
    class_directions,
    common_direction,
    estimate_class_mean_cosine,
    paper_concentration,
    typical_concentration,
)
from .feature_statistics import FeatureStatistics
from .oracle import Oracle
from .responses import RecoveredWeights
from .settings import RecoverySettings
from .simulator import simulate, simulate_moments, train_generator
from .virtual_classes import STAGE, VirtualClasses, matching_order
from .weight_recovery import recover_class_weights


def recover(
    oracle: Oracle,
    text: Tensor,
    classnames: Sequence[str] | None = None,
    new_text: Tensor | None = None,
    generator: torch.Generator | None = None,
    geometry: FeatureStatistics | None = None,
    **settings,
) -> VirtualClasses:
    """Model every base class of a teacher as a von Mises-Fisher distribution.

    Args:
        oracle: the teacher at an access level (oracle.py).
        text: (C, d) L2-normalized text embeddings of `classnames`.
        classnames: C names, the teacher's in any order; by default in the teacher's order.
        new_text: (K, d) text embeddings of the new classes, or None.
        generator: source of all random draws.
        geometry: feature statistics of the encoder, or None. They set the common mean direction of image
            features and the covariance of virtual features.
        settings: fields of `RecoverySettings`.

    Returns:
        The base classes in the order of `classnames`.

    Raises:
        UserError: names or shapes do not match, the method does not support the access level, or the
            teacher's responses are faulty or stop.
    """
    options = RecoverySettings(**settings)
    names = list(oracle.classnames if classnames is None else classnames)
    order = matching_order(oracle.classnames, names)
    text, all_text = _check_inputs(oracle, names, text, new_text, geometry)
    kappa = torch.full((len(names),), _concentration(oracle, text, all_text, options))
    label = torch.argsort(order)

    with progress_bar(
        desc="recover", unit="query", unit_scale=True, disable=oracle.level == "weights"
    ) as queries:

        def query(x: Tensor) -> Tensor:
            """Query the teacher, and sort its responses into the order of `names`."""
            responses = oracle(x)
            queries.update(len(x))
            if responses.dim() == 2 and len(names) > 1 and (responses == responses[:, :1]).all():
                raise UserError(f"{STAGE}: all class scores of the teacher are identical")
            return label[responses] if oracle.level == "labels" else responses[:, order]

        def recover_weights() -> RecoveredWeights:
            if oracle.weight is not None:
                weight = oracle.weight[order].float()
                bias = None if oracle.bias is None else oracle.bias[order].float()
                return RecoveredWeights(unit(weight) if oracle.normalized else weight, bias, 0.0)
            return recover_class_weights(
                query,
                oracle.level,
                names,
                text,
                rays=options.rays,
                bisections=options.bisections,
                tolerance=options.tolerance,
                budget=oracle.budget,
                generator=generator,
            )

        # The methods that compare cosines have no intercepts.
        network = bias = error = None
        if options.method == "simulator":
            weight = simulate(query, oracle, text, kappa, options, generator)
        else:
            recovered = recover_weights()
            weight, error = recovered.weight, recovered.error
            if options.method == "moments":
                weight = simulate_moments(weight, text, kappa, options)
            else:
                bias = recovered.bias
    if options.method == "generator":
        network = train_generator(weight, bias, text, options, generator)
    mu = _directions(oracle, weight, text, all_text, geometry, options)
    return VirtualClasses(
        check_unit_rows(mu, STAGE, "mean direction", names),
        kappa,
        names,
        weight,
        oracle.queries,
        options.method,
        oracle.level,
        oracle.backbone,
        network,
        bias,
        error=error,
        owner_weight=oracle.card.weight if oracle.card else None,
        geometry=geometry,
    )


def _check_inputs(
    oracle: Oracle,
    names: list[str],
    text: Tensor,
    new_text: Tensor | None,
    geometry: FeatureStatistics | None,
) -> tuple[Tensor, Tensor]:
    """Return L2-normalized text embeddings of the base classes, and of base and new classes together."""
    if geometry is not None and len(geometry.mean) != oracle.dim:
        raise UserError(f"the geometry has {len(geometry.mean)} dimensions, the teacher {oracle.dim}")
    if text.shape != (len(names), oracle.dim):
        raise UserError(f"text features have shape {tuple(text.shape)}, expected {(len(names), oracle.dim)}")
    text = check_unit_rows(unit(text.float()), STAGE, "text feature", names)
    if new_text is None:
        return text, text
    new_text = check_unit_rows(unit(new_text.float()), f"{STAGE}, new classes", "text feature")
    return text, torch.cat([text, new_text])


def _concentration(oracle: Oracle, text: Tensor, all_text: Tensor, options: RecoverySettings) -> float:
    """Return the concentration that all classes share."""
    if options.concentration == "paper":
        # The paper's released code includes the new classes in its mode gmm.
        kappa = paper_concentration(all_text if options.method == "gmm" else text)
    else:
        measured = oracle.card.coherence if oracle.card else None
        kappa = typical_concentration(oracle.dim, options.coherence or measured or MEAN_RESULTANT_LENGTH)
    if not options.theta * kappa < torch.finfo(torch.float32).max:
        raise UserError(f"RECOVERY.THETA {options.theta} makes the concentration infinite; lower it")
    return options.theta * kappa


def _directions(
    oracle: Oracle,
    weight: Tensor,
    text: Tensor,
    all_text: Tensor,
    geometry: FeatureStatistics | None,
    options: RecoverySettings,
) -> Tensor:
    """Return the mean direction (C, d) of each class."""
    if options.method in ("generator", "gmm"):
        return text
    if options.directions == "teacher":
        return unit(weight)
    common = common_direction(all_text) if geometry is None else geometry.mean.to(text)
    measured = oracle.card.cone if oracle.card else None
    return class_directions(weight, common, options.cone or measured or estimate_class_mean_cosine(text))
