"""Stage 3 in one function: from virtual base classes and the names' text features to the final classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.errors import UserError
from dfzsl.stages import checked, portions

from .classifier import Classifier, check_new_names, fit_rows, shift_reliability, text_shift
from .generators import build_generator
from .generators.base import device_generator

if TYPE_CHECKING:
    from ..recovery.recover import VirtualClasses

STAGE = "stage 3 (generation)"
MAX_GENERATED = 200_000  # features held at once; with thousands of new classes each gets fewer


@dataclass(frozen=True)
class StageThreeSettings:
    """All of stage 3. The config keys are the field names in capitals, under GENERATOR.

    Attributes:
        name: a generator of `generators.GENERATORS`; "none": new classes are not trained on, their rows are
            their (aligned) text features; "auto": "vmf" or "none", see `choose_generator`.
        num_per_class: virtual features per base class; num_generated: generated ones per new class.
        epochs, hidden, batch, lr: of a neural generator; 0 keeps its own (the paper's).
        holdout: share of base classes that watch the generator's training; patience: epochs without progress
            there before it stops.
        align: shift text features by one vector learned on the base classes (FLPT in feature space); those of
            new classes by the part of it that is to be trusted (`classifier.shift_reliability`).
        align_decay: weight of its squared length.
        pull, classifier_steps, classifier_batch, classifier_lr, classifier_anneal, log_prior: see
            `classifier.fit_rows`.
        calibrate: balance base against new classes on pseudo-new ones, see `calibrate`.
    """

    name: str = "auto"
    num_per_class: int = 100
    num_generated: int = 100
    epochs: int = 0
    hidden: int = 0
    batch: int = 0
    lr: float = 0.0
    holdout: float = 0.1
    patience: int = 20
    align: bool = True
    align_decay: float = 1.0
    pull: float = 1.0
    classifier_steps: int = 150
    classifier_batch: int = 1024
    classifier_lr: float = 2e-3
    classifier_anneal: bool = True
    log_prior: bool = True
    calibrate: bool = True


def build_classifier(
    virtual: VirtualClasses,
    base_text: Tensor,
    new_text: Tensor,
    *,
    new_classnames: Sequence[str],
    untuned_text: Tensor | None = None,
    shift: Tensor | None = None,
    settings: StageThreeSettings | None = None,
    generator: torch.Generator,
    backbone: str = "",
    weights: str = "",
) -> Classifier:
    """The classifier for base and new classes.

    Args:
        virtual: the recovered base classes (stage 1), in the order of `base_text`.
        base_text: (C, d) unit text features of base classes; new_text: (K, d) of new ones, K may be 0. Both
            in the tuned context when FLPT ran. Training runs on their device.
        untuned_text: (C, d) text features of base classes before FLPT, or None where it did not run.
        shift: (d,) FLPT's shift of image features, or None.
        generator: the source of everything random.
        backbone, weights: ids of the image encoder, kept in the classifier.

    Raises UserError for new names that repeat or are base names, shapes that do not fit, unknown settings.
    """
    settings = settings or StageThreeSettings()
    base_classnames = list(virtual.classnames)
    check_new_names(base_classnames, new_classnames)
    if len(base_text) != len(base_classnames) or new_text.shape != (len(new_classnames), base_text.shape[1]):
        raise UserError(
            f"{len(base_classnames)} base and {len(new_classnames)} new classes need as many text features, "
            f"got {tuple(base_text.shape)} and {tuple(new_text.shape)}"
        )
    device = base_text.device
    rng = device_generator(generator, device)
    base_text, new_text = base_text.float(), new_text.to(base_text).float()
    checked(base_text, STAGE, "text feature", base_classnames)
    checked(new_text, STAGE, "text feature", new_classnames)
    x, y = virtual.sample(_affordable(settings.num_per_class, len(base_text)), generator)
    x, y = x.to(base_text), y.to(device)
    if settings.name == "auto":
        # In the tuned context base classes make poor players: their own text was tuned on them.
        text = base_text if untuned_text is None else untuned_text.to(base_text)
        name = choose_generator(x, y, text, len(new_text), settings, rng)
        print(f"Generator chosen on base classes that play new ones: {name}")
        settings = replace(settings, name=name)
    if shift is not None:
        shift = shift.to(x)
        x = F.normalize(x + shift, dim=1)
    trust = 1.0
    if settings.align and len(new_text):
        trust = shift_reliability(
            x, y, base_text, rng, decay=settings.align_decay, batch=settings.classifier_batch
        )
    base, new, moved = _train(x, y, base_text, new_text, settings, rng, trust)
    bias = 0.0
    if settings.calibrate and len(new) and len(base) > 1:
        bias = calibrate(x, y, base_text, len(new), settings, rng, trust)
    is_new = torch.arange(len(base) + len(new), device=device) >= len(base)
    names = [*base_classnames, *new_classnames]
    return Classifier(
        weight=checked(torch.cat([base, new]), STAGE, "row of the classifier", names),
        classnames=names,
        is_new=is_new,
        bias=bias * is_new,
        shift=shift,
        text_shift=moved,
        new_bias=bias,
        backbone=backbone,
        weights=weights,
    )


def _affordable(wanted: int, classes: int) -> int:
    """How many features each of so many classes gets."""
    return min(wanted, max(1, MAX_GENERATED // classes))


def _train(
    x: Tensor,
    y: Tensor,
    base_text: Tensor,
    new_text: Tensor,
    s: StageThreeSettings,
    rng: torch.Generator,
    trust: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of base (C, d) and new classes (K, d), and the shift of new text features or None.

    `trust` is the share of base classes' shift that new ones get.
    """
    moved = None
    conditions = new_text
    if s.align and len(base_text) > 1:
        moved = text_shift(x, y, base_text, rng, decay=s.align_decay, batch=s.classifier_batch)
        base_text, conditions = F.normalize(base_text + moved, dim=1), F.normalize(new_text + moved, dim=1)
        moved = trust * moved
        new_text = F.normalize(new_text + moved, dim=1)
    rows = base_text
    if s.name != "none" and len(new_text):
        own: dict[str, Any] = {
            key: getattr(s, key) for key in ("epochs", "hidden", "batch", "lr") if getattr(s, key)
        }
        if s.name != "vmf":
            own |= {"holdout": s.holdout, "patience": s.patience}
        model = build_generator(s.name, x.shape[1], base_text.shape[1], **own)
        model.fit(x, y, base_text, rng)
        count = _affordable(s.num_generated, len(new_text))
        made = checked(model.sample(conditions, count, rng), STAGE, f"feature made by '{s.name}'")
        labels = torch.arange(len(base_text), len(base_text) + len(new_text), device=y.device)
        x, y = torch.cat([x, made]), torch.cat([y, labels.repeat_interleave(count)])
        rows = torch.cat([base_text, new_text])
    rows = fit_rows(
        x,
        y,
        rows,
        rng,
        pull=s.pull,
        steps=s.classifier_steps,
        lr=s.classifier_lr,
        anneal=s.classifier_anneal,
        batch=s.classifier_batch,
        log_prior=s.log_prior,
    )
    base = rows[: len(base_text)]
    return base, rows[len(base_text) :] if len(rows) > len(base_text) else new_text, moved


def plays(
    x: Tensor,
    y: Tensor,
    base_text: Tensor,
    num_new: int,
    s: StageThreeSettings,
    rng: torch.Generator,
    trust: float = 1.0,
    rehearsals: int = 4,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rehearsals of stage 3 in which base classes play the new ones.

    No new class has a feature to choose anything by, but base classes do: a part of them, as large a share
    as the new classes will be (at most half), is unseen while everything is trained on the others. Every base
    class plays equally often; there are at least so many `rehearsals`.

    Yields for all virtual features x: whether its class was trained on (n,), by how much the best base
    class beats the best playing one (n,), and whether it is right within its own part (n,).
    """
    classes = len(base_text)
    share = min(num_new / (classes + num_new), 0.5)
    folds = min(round(1 / share), 5, classes)
    # All drawn before any training, so that two settings are compared on the same rehearsals.
    orders = [torch.randperm(classes, device=x.device, generator=rng) for _ in range(-(-rehearsals // folds))]
    for order in orders:
        for fold in range(folds):
            playing = torch.zeros(classes, dtype=torch.bool, device=x.device)
            playing[order[fold::folds]] = True
            relabel = torch.cat([(~playing).nonzero()[:, 0], playing.nonzero()[:, 0]]).argsort()
            known = ~playing[y]
            base, new, _ = _train(
                x[known], relabel[y[known]], base_text[~playing], base_text[playing], s, rng, trust
            )
            margin, correct = _margins(x, relabel[y], base, new)
            yield known, margin, correct


def choose_generator(
    x: Tensor, y: Tensor, base_text: Tensor, num_new: int, s: StageThreeSettings, rng: torch.Generator
) -> str:
    """Whether "vmf" beats "none" on classes that play new ones, by three standard errors; the name to take.

    Whether images of unseen classes can be foretold from text depends on the data: where classes are
    compositions it is easy, where base classes are few and unlike each other it does harm.
    """
    if num_new == 0 or len(base_text) < 4:
        return "none"
    right = {}
    # Without a generator rows of players are their text, whatever the training of the others' rows.
    for name, steps in (("none", 0), ("vmf", s.classifier_steps)):
        stream = torch.Generator(x.device)
        stream.set_state(rng.get_state())  # the same rehearsals for both
        settings = replace(s, name=name, classifier_steps=steps)
        played = plays(x, y, base_text, num_new, settings, stream, rehearsals=16)
        right[name] = torch.stack([correct[~known].float().mean() for known, _, correct in played])
    gain = right["vmf"] - right["none"]
    return "vmf" if gain.mean() > 3 * gain.std() / len(gain) ** 0.5 else "none"


def calibrate(
    x: Tensor,
    y: Tensor,
    base_text: Tensor,
    num_new: int,
    s: StageThreeSettings,
    rng: torch.Generator,
    trust: float = 1.0,
) -> float:
    """The bias of new classes, in units of the cosine, that balances them against base classes.

    It is the one with the highest harmonic mean of per-class accuracies in rehearsals (`plays`).
    """
    grid = torch.linspace(-0.15, 0.15, 301, device=x.device)
    seen, unseen = torch.zeros_like(grid), torch.zeros_like(grid)
    for known, margin, correct in plays(x, y, base_text, num_new, s, rng, trust):
        seen += _curve(margin[known], correct[known], grid, above=True)
        unseen += _curve(margin[~known], correct[~known], grid, above=False)
    harmonic = 2 * seen * unseen / (seen + unseen).clamp(min=1e-12)
    return float(grid[harmonic >= 0.999 * harmonic.max()].mean())


def _margins(x: Tensor, y: Tensor, base: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the best base class beats the best new one, and whether the best of y's own part is y."""
    parts = portions(x, max(len(base), len(new)))
    tops = [((part @ base.T).max(1), (part @ new.T).max(1)) for part in parts]
    (base_top, base_class), (new_top, new_class) = (
        (torch.cat([top.values for top in part]), torch.cat([top.indices for top in part]))
        for part in zip(*tops, strict=True)
    )
    return base_top - new_top, torch.where(y < len(base), base_class == y, new_class + len(base) == y)


def _curve(margin: Tensor, correct: Tensor, grid: Tensor, above: bool) -> Tensor:
    """Accuracy at each bias of the grid: right within its part, and its part wins."""
    # The same number of features per class: the mean over features is the mean over classes.
    margins = margin[correct].sort().values
    below = torch.searchsorted(margins, grid).to(grid)
    hits = len(margins) - below if above else below
    return hits / max(len(margin), 1)
