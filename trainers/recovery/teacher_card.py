"""Provide the model card of a teacher, and measure it by cross-validation on the owner's images.

The regression strength C and the mixing weight g of text_c + g u_c (mixture.py) improve a client's classifier
more than anything that the client can do without images (docs/accuracy.md). The card holds numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError, one_line
from dfzsl.utils.numerics import class_means
from dfzsl.utils.progress import progress_bar

from .logistic import FLOAT32_TOLERANCE, fit_logistic_regression
from .mixture import teacher_rows

CANDIDATE_STRENGTHS = (0.316, 3.0, 30.0)  # the paper's C, and two with weaker regularization
CANDIDATE_TEACHER_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
NUM_FOLDS = 3
MIN_MEDIAN_IMAGES = 3  # images of the median class; with fewer there is no cross-validation
# Accuracies at neighboring weights are smoothed, because they are noisy samples of one curve.
SMOOTHING_KERNEL = (1, 2, 3, 2, 1)
ONE_STANDARD_ERROR_TOLERANCE = 0.5  # in standard errors
MAX_IMAGES = 10_000  # over all classes; more take hours and hardly change the result


@dataclass(frozen=True)
class TeacherCard:
    """Model card of a teacher, measured by its owner.

    Attributes:
        images: number of training images of each class.
        strength: C of the logistic regression.
        weight: mixing weight g of text_c + g u_c; None if there were no text or too few images to measure it.
        accuracy: cross-validated accuracies "text", "teacher" and "mixture" in percent, or None.
        coherence: mean resultant length of the classes; None where every class has one image.
        cone: class-mean cosine, i.e. mean cosine of class means to their common mean; None like `coherence`.
        text: description of the prompts with which the weight was measured (`ClassPrompts.description`).
    """

    images: list[int]
    strength: float
    weight: float | None = None
    accuracy: dict[str, float] | None = None
    coherence: float | None = None
    cone: float | None = None
    text: str = ""

    def prompt_mismatch(self, prompts: str) -> str:
        """Return a warning if the weight was measured with prompts other than `prompts`, else ""."""
        if self.weight is None or not self.text or self.text == prompts:
            return ""
        measured = f"the owner measured the mixing weight {self.weight:g} with the prompts {self.text}"
        return f"{measured}, not {prompts}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object, classes: int) -> TeacherCard:
        """Create a card from the values of `as_dict`, as a file holds them.

        Raises:
            UserError: the values are not those of a card for this number of classes.
        """
        try:
            if not isinstance(values, Mapping):
                raise TypeError
            images = [int(count) for count in values["images"]]
            strength = float(values["strength"])
            weight = None if values["weight"] is None else float(values["weight"])
            accuracy = values["accuracy"]
            if accuracy is not None:
                accuracy = {str(name): float(value) for name, value in accuracy.items()}
            coherence, cone = (
                None if values[name] is None else float(values[name]) for name in ("coherence", "cone")
            )
            valid = len(images) == classes and min(images) >= 0 and strength > 0
            valid = valid and all(value is None or 0 < value < 1 for value in (coherence, cone))
            valid = valid and (weight is None or 0 <= weight <= CANDIDATE_TEACHER_WEIGHTS[-1])
            text = values.get("text", "")
            if not isinstance(text, str) or not valid:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            raise UserError("its card (images, strength, weight, ...) is not that of a teacher") from None
        return cls(images, strength, weight, accuracy, coherence, cone, one_line(text))


def rank_in_class(labels: Tensor) -> Tensor:
    """Return, for each image of labels (n,), the number of earlier images of the same class (n,)."""
    order = labels.sort(stable=True).indices
    count = torch.bincount(labels)
    position = torch.arange(len(labels), device=labels.device)
    rank = torch.empty_like(labels)
    rank[order] = position - (count.cumsum(0) - count)[labels[order]]
    return rank


def estimate_class_spread(
    features: Tensor, labels: Tensor, classes: int
) -> tuple[float | None, float | None]:
    """Estimate mean resultant length and class-mean cosine, corrected for few images per class.

    Args:
        features: (n, d) L2-normalized features.
        labels: (n,) their classes.
        classes: number of classes.

    Returns:
        `TeacherCard.coherence` and `TeacherCard.cone`; None and None if no class has two images.
    """
    mean = class_means(features, labels, classes)
    count = torch.bincount(labels, minlength=classes).to(features)
    mean, count = mean[count > 1], count[count > 1]
    if not len(mean):
        return None, None
    square = ((count * mean.square().sum(1) - 1) / (count - 1)).mean().clamp(1e-4, 0.9998)
    coherence = float(square.sqrt())
    return round(coherence, 4), round(min(max(float(mean.mean(0).norm()) / coherence, 0.01), 0.99), 4)


def one_standard_error_choice(correct: Tensor) -> tuple[int, int]:
    """Choose a strength and a mixing weight by the one-standard-error rule (Breiman et al., 1984).

    The strength is that with the highest maximum of the smoothed accuracy curve. The weight is the least one
    within `ONE_STANDARD_ERROR_TOLERANCE` paired standard errors of this maximum: among weights that classify
    base classes equally well, the least one assigns the fewest images of new classes to base classes.

    Args:
        correct: (strengths, weights, n) bool, whether each held-out image was classified correctly.

    Returns:
        Indices of the strength and of the weight.
    """
    kernel = torch.tensor(SMOOTHING_KERNEL, dtype=torch.float64) / sum(SMOOTHING_KERNEL)
    padding = len(SMOOTHING_KERNEL) // 2
    accuracy = F.pad(correct.double().mean(2)[:, None], [padding] * 2, mode="replicate")
    curve = F.conv1d(accuracy, kernel[None, None])[:, 0]
    best = int(curve.max(1).values.argmax())
    peak = int(curve[best].argmax())
    difference = correct[best, peak].double() - correct[best].double()
    error = difference.std(1, correction=0) / correct.shape[2] ** 0.5
    within = curve[best, peak] - curve[best] <= ONE_STANDARD_ERROR_TOLERANCE * error
    return best, int(within.int().argmax())


def cross_validate(
    features: Tensor,
    labels: Tensor,
    text: Tensor,
    strengths: Sequence[float] = CANDIDATE_STRENGTHS,
    *,
    balanced: bool = False,
) -> TeacherCard:
    """Choose regression strength and mixing weight by cross-validation.

    Args:
        features: (n, d) L2-normalized features.
        labels: (n,) their classes.
        text: (C, d) L2-normalized text embeddings of the classes.
        strengths: candidates for C.
        balanced: whether to weight classes equally.

    Returns:
        The model card, without `text`. If the median class has fewer than `MIN_MEDIAN_IMAGES` images, it has
        the first strength and no mixing weight.
    """
    classes = len(text)
    images = torch.bincount(labels, minlength=classes)
    spread = estimate_class_spread(features, labels, classes)
    if images.double().median() < MIN_MEDIAN_IMAGES:
        return TeacherCard(images.tolist(), strengths[0], None, None, *spread)
    rank = rank_in_class(labels)
    selected = rank < max(MIN_MEDIAN_IMAGES, MAX_IMAGES // classes)
    features, labels, fold = features[selected], labels[selected], rank[selected] % NUM_FOLDS
    correct = torch.zeros(len(strengths), len(CANDIDATE_TEACHER_WEIGHTS) + 1, len(labels), dtype=torch.bool)
    progress = progress_bar(total=NUM_FOLDS * len(strengths), desc="cross-validation", unit="fit")
    for test_fold in range(NUM_FOLDS):
        train, test = fold != test_fold, fold == test_fold
        train_x, train_y = features[train], labels[train]
        if not test.any() or len(train_y.unique()) < 2:
            continue
        x, y = features[test], labels[test]
        text_scores = x @ text.T
        weight = None
        for row, strength in enumerate(strengths):
            weight = fit_logistic_regression(
                train_x,
                train_y,
                classes,
                strength,
                balanced=balanced,
                tolerance=FLOAT32_TOLERANCE,
                start=weight,
            )
            teacher_scores = x @ teacher_rows(weight)[0].to(x).T
            scores = [text_scores + g * teacher_scores for g in CANDIDATE_TEACHER_WEIGHTS] + [teacher_scores]
            correct[row, :, test.cpu()] = torch.stack([s.argmax(1) == y for s in scores]).cpu()
            progress.update()
    progress.close()
    best, column = one_standard_error_choice(correct[:, :-1])
    percent = 100 * correct[best].double().mean(1)
    accuracy = {
        "text": float(percent[0]),
        "teacher": float(percent[-1]),
        "mixture": float(percent[column]),
    }
    accuracy = {name: round(value, 2) for name, value in accuracy.items()}
    return TeacherCard(images.tolist(), strengths[best], CANDIDATE_TEACHER_WEIGHTS[column], accuracy, *spread)
