"""What an owner can say of a teacher beside its rows, found by cross-validation on their own images.

The strength C of the regression and the weight g of text_c + g u_c (mixture.py) are worth more to a client
than anything the client can do (docs/accuracy.md); they are numbers, and the images stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError, one_line
from dfzsl.utils.numerics import class_means
from dfzsl.utils.progress import bar

from .logistic import COARSE, regression
from .mixture import teacher_rows

STRENGTHS = (0.316, 3.0, 30.0)  # the paper's, and two that trust the images more
WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
FOLDS = 3
LEAST_IMAGES = 3  # of the median class: below it nothing can be left out
SMOOTH = (1, 2, 3, 2, 1)  # neighbours in WEIGHTS: their accuracies are one curve and noise
WITHIN = 0.5  # standard errors that a lesser weight may stand below the best
MOST_IMAGES = 10_000  # in all, as many of each class: beyond, the folds would take hours and tell no more


@dataclass(frozen=True)
class TeacherCard:
    """Of a teacher, by its owner.

    Attributes:
        images: training images of each class; strength: the regression's C.
        weight: g of text_c + g u_c, None where text or images were too few to find it.
        accuracy: cross-validated accuracies in percent: "text", "teacher", "mixture".
        coherence: mean length of the classes' mean features; cone: mean cosine of these means to their own
            mean. None where every class has one image.
        text: what was said of a class when the weight was measured, as `ClassPrompts.description` puts it.
    """

    images: list[int]
    strength: float
    weight: float | None = None
    accuracy: dict[str, float] | None = None
    coherence: float | None = None
    cone: float | None = None
    text: str = ""

    def measured_elsewhere(self, text: str) -> str:
        """What a client who says `text` of a class should know; "" where the weight belongs to that."""
        if self.weight is None or not self.text or self.text == text:
            return ""
        return (
            f"the owner measured the teacher's weight {self.weight:g} beside the text {self.text}, not {text}"
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def of(cls, words: object, classes: int) -> TeacherCard:
        """The card in a file's words. Raises UserError for one that is not of so many classes."""
        try:
            if not isinstance(words, Mapping):
                raise TypeError
            images = [int(count) for count in words["images"]]
            strength = float(words["strength"])
            weight = None if words["weight"] is None else float(words["weight"])
            accuracy = words["accuracy"]
            if accuracy is not None:
                accuracy = {str(name): float(value) for name, value in accuracy.items()}
            coherence, cone = (
                None if words[name] is None else float(words[name]) for name in ("coherence", "cone")
            )
            sound = len(images) == classes and min(images) >= 0 and strength > 0
            sound = sound and all(value is None or 0 < value < 1 for value in (coherence, cone))
            text = words.get("text", "")
            if not isinstance(text, str) or not sound or not (weight is None or 0 <= weight <= WEIGHTS[-1]):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            raise UserError("its card (images, strength, weight, ...) is not that of a teacher") from None
        return cls(images, strength, weight, accuracy, coherence, cone, one_line(text))


def rank_in_class(labels: Tensor) -> Tensor:
    """(n,) how many images of the same class stand before each image."""
    order = labels.sort(stable=True).indices
    count = torch.bincount(labels)
    place = torch.arange(len(labels), device=labels.device)
    rank = torch.empty_like(labels)
    rank[order] = place - (count.cumsum(0) - count)[labels[order]]
    return rank


def estimate_class_spread(
    features: Tensor, labels: Tensor, classes: int
) -> tuple[float | None, float | None]:
    """`TeacherCard.coherence` and `TeacherCard.cone`, without the part that few images add to the length of a mean."""
    mean = class_means(features, labels, classes)
    count = torch.bincount(labels, minlength=classes).to(features)
    mean, count = mean[count > 1], count[count > 1]
    if not len(mean):
        return None, None
    square = ((count * mean.square().sum(1) - 1) / (count - 1)).mean().clamp(1e-4, 0.9998)
    coherence = float(square.sqrt())
    return round(coherence, 4), round(min(max(float(mean.mean(0).norm()) / coherence, 0.01), 0.99), 4)


def one_standard_error_choice(right: Tensor) -> tuple[int, int]:
    """Which strength and weight to take: `right` (strengths, weights, n) says of each left-out image whether
    it was classified rightly.

    The strength whose smoothed curve of accuracies reaches highest, and the least weight that stands no more
    than `WITHIN` paired standard errors below the best there (Breiman et al., 1984, allow one): of weights
    that base classes cannot tell apart, the least one draws the fewest pictures of new classes to them.
    """
    kernel = torch.tensor(SMOOTH, dtype=torch.float64) / sum(SMOOTH)
    rate = F.pad(right.double().mean(2)[:, None], [len(SMOOTH) // 2] * 2, mode="replicate")
    curve = F.conv1d(rate, kernel[None, None])[:, 0]
    best = int(curve.max(1).values.argmax())
    top = int(curve[best].argmax())
    apart = right[best, top].double() - right[best].double()
    error = apart.std(1, correction=0) / right.shape[2] ** 0.5
    return best, int((curve[best, top] - curve[best] <= WITHIN * error).int().argmax())


def cross_validate(
    features: Tensor,
    labels: Tensor,
    text: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    *,
    balanced: bool = False,
) -> TeacherCard:
    """The card with the strength and the weight that classify left-out images well.

    features (n, d) unit rows with labels (n,), text (C, d) of the classes. Three folds for each strength, of
    which `one_standard_error_choice` takes one, and a weight. Where the median class has fewer than three images nothing is left
    out, and the first strength stands.
    """
    classes = len(text)
    images = torch.bincount(labels, minlength=classes)
    spread = estimate_class_spread(features, labels, classes)
    if images.double().median() < LEAST_IMAGES:
        return TeacherCard(images.tolist(), strengths[0], None, None, *spread)
    rank = rank_in_class(labels)
    few = rank < max(LEAST_IMAGES, MOST_IMAGES // classes)
    features, labels, fold = features[few], labels[few], rank[few] % FOLDS
    right = torch.zeros(len(strengths), len(WEIGHTS) + 1, len(labels), dtype=torch.bool)
    tries = bar(total=FOLDS * len(strengths), desc="cross-validation", unit="fit")
    for left_out in range(FOLDS):
        kept, tried = fold != left_out, fold == left_out
        learned, named = features[kept], labels[kept]
        if not tried.any() or len(named.unique()) < 2:
            continue
        x, y = features[tried], labels[tried]
        by_text = x @ text.T
        weight = None
        for row, strength in enumerate(strengths):
            weight = regression(
                learned, named, classes, strength, balanced=balanced, tolerance=COARSE, start=weight
            )
            by_teacher = x @ teacher_rows(weight)[0].to(x).T
            scores = [by_text + g * by_teacher for g in WEIGHTS] + [by_teacher]
            right[row, :, tried.cpu()] = torch.stack([s.argmax(1) == y for s in scores]).cpu()
            tries.update()
    tries.close()
    best, column = one_standard_error_choice(right[:, :-1])
    rate = 100 * right[best].double().mean(1)
    accuracy = {
        "text": float(rate[0]),
        "teacher": float(rate[-1]),
        "mixture": float(rate[column]),
    }
    accuracy = {name: round(value, 2) for name, value in accuracy.items()}
    return TeacherCard(images.tolist(), strengths[best], WEIGHTS[column], accuracy, *spread)
