"""The final classifier: one cosine softmax for base and new classes, and how its rows are fitted.

    logits(x) = (unit(x + shift) . r_c + b_c) / temperature

`shift` moves image features (FLPT), x . r_c is a cosine where r_c is a unit row, and b_c holds a teacher's
intercept and balances new classes against base ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.io.class_names import check_class_names
from dfzsl.io.tensors import load_tensors, save_tensors
from dfzsl.utils.errors import UserError, unknown_name
from dfzsl.utils.progress import progress_bar

from ..clip.class_prompts import ClassPrompts
from .decision import Decision

TEMPERATURE = 0.01  # CLIP's own, 1 / logit_scale
TEMPLATE = "a photo of a {}."
KINDS = {"temperature": float | int, "new_bias": float | int, "backbone": str, "weights": str}  # in a file
SHORTEST, LONGEST = 1e-3, 1e3  # of rows, whose unit is the cosine


@dataclass(frozen=True)
class ClassWeights:
    """Class weights of base (C, d) and new classes (K, d), and biases of base classes (C,).

    Attributes:
        text_map, text_shift: see `Classifier`.
        teacher_weight: mixing weight g of the teacher beside text; None where class weights are trained.
        reason: why this weight was chosen.
    """

    base: Tensor
    new: Tensor
    bias: Tensor
    text_map: Tensor | None = None
    text_shift: Tensor | None = None
    teacher_weight: float | None = None
    reason: str = ""


@dataclass(repr=False)
class Classifier:
    """Rows for base and new classes on a backbone's unit features.

    Attributes:
        weight: (C, d) rows; classnames: C different names; is_new: (C,) bool.
        bias: (C,) in units of the cosine; temperature: of the softmax.
        shift: (d,) added to a unit image feature, or None.
        text_map (d, d), text_shift (d,): a class added later with unit text feature t has the row
            t @ text_map + text_shift, or its text where they are None.
        new_bias: the bias of a class added later.
        backbone, weights: ids of the image encoder; `weights` is a tag or the hash of a file.
        texts: what is said of a class that is added later.
        decision: how the classifier was built; None for one that was loaded from a file.
    """

    weight: Tensor
    classnames: list[str]
    is_new: Tensor
    bias: Tensor
    temperature: float = TEMPERATURE
    shift: Tensor | None = None
    text_map: Tensor | None = None
    text_shift: Tensor | None = None
    new_bias: float = 0.0
    backbone: str = ""
    weights: str = ""
    texts: ClassPrompts = field(default_factory=lambda: ClassPrompts((TEMPLATE,)))
    decision: Decision | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        new = int(self.is_new.sum())
        return (
            f"Classifier({len(self.classnames) - new} base + {new} new classes, d = {self.weight.shape[1]}, "
            f"{self.backbone or 'features'} ({self.weights}))"
        )

    def __post_init__(self) -> None:
        names, shape = len(check_class_names(self.classnames, "a classifier")), tuple(self.weight.shape)
        fits = len(shape) == 2 and 0 not in shape and self.is_new.shape == self.bias.shape == (names,)
        if not fits or shape[0] != names:
            raise UserError(f"a classifier needs a row, flag and bias per class; got {shape}, {names} names")
        if any(s is not None and s.shape != shape[1:] for s in (self.shift, self.text_shift)):
            raise UserError("a classifier's shifts must have the dimension of its rows")
        if (self.text_map is None) != (self.text_shift is None) or (
            self.text_map is not None and self.text_map.shape != (shape[1], shape[1])
        ):
            raise UserError("a classifier's map of texts must be square, and have a shift beside it")
        length = torch.linalg.vector_norm(self.weight.float(), dim=1)
        if (wrong := ~((length > SHORTEST) & (length < LONGEST))).any():
            row = int(wrong.nonzero()[0])
            raise UserError(
                f"a classifier: class '{self.classnames[row]}' has a row of length {float(length[row]):.3g}; "
                "rows are finite and near unit length"
            )
        if not 0 < self.temperature < math.inf:
            raise UserError(f"a classifier's temperature must be greater than 0, got {self.temperature}")
        if not (math.isfinite(self.new_bias) and torch.isfinite(self.bias).all()):
            raise UserError("a classifier's biases must be finite")

    def logits(self, x: Tensor, classnames: Sequence[str] | None = None) -> Tensor:
        """(n, C) logits of image features x (n, d), over all classes or the named ones in that order.

        Raises UserError for a name it does not know.
        """
        weight, bias = self.weight.to(x), self.bias.to(x)
        if classnames is not None and list(classnames) != self.classnames:
            rows = self._rows(classnames)
            weight, bias = weight[rows], bias[rows]
        x = F.normalize(x, dim=1)
        if self.shift is not None:
            x = F.normalize(x + self.shift.to(x), dim=1)
        return (x @ weight.T + bias) / self.temperature

    def _rows(self, classnames: Sequence[str]) -> list[int]:
        index = {name: row for row, name in enumerate(self.classnames)}
        for name in classnames:
            if name not in index:
                raise unknown_name("class", name, index)
        return [index[name] for name in classnames]

    def extend(self, classnames: Sequence[str], text: Tensor) -> Classifier:
        """This classifier and new classes with unit text features (K, d); old rows stay as they are."""
        check_class_names(classnames, "the new classes", taken=self.classnames)
        if text.shape != (len(classnames), self.weight.shape[1]):
            raise UserError(
                f"{len(classnames)} new classes need text features ({len(classnames)}, "
                f"{self.weight.shape[1]}), got {tuple(text.shape)}"
            )
        rows = text.to(self.weight)
        if self.text_map is not None and self.text_shift is not None:
            rows = rows @ self.text_map.to(rows) + self.text_shift.to(rows)
        added = torch.ones(len(classnames), dtype=torch.bool, device=self.weight.device)
        return replace(
            self,
            weight=torch.cat([self.weight, rows]),
            classnames=[*self.classnames, *classnames],
            is_new=torch.cat([self.is_new, added]),
            bias=torch.cat([self.bias, torch.full_like(added, self.new_bias, dtype=self.bias.dtype)]),
        )

    def add(self, classnames: Sequence[str], backbone: Any, texts: ClassPrompts | None = None) -> Classifier:
        """This classifier and new classes by their names; old rows stay as they are.

        `backbone` is the one that the classifier was made on. `texts` say something else of the new classes
        than was said of the old ones; a tuned context stays.
        """
        said = (
            self.texts
            if texts is None
            else replace(texts, context=self.texts.context, words=self.texts.words)
        )
        return replace(self.extend(classnames, said.features(backbone, classnames)), texts=said)

    def save(self, path: str | os.PathLike[str]) -> None:
        tensors = {"weight": self.weight.float(), "is_new": self.is_new, "bias": self.bias.float()}
        for name in ("shift", "text_map", "text_shift"):
            if (value := getattr(self, name)) is not None:
                tensors[name] = value.float()
        if self.texts.context is not None:
            tensors["context"] = self.texts.context.float()
        about = ("classnames", "temperature", "new_bias", "backbone", "weights")
        said = {
            "templates": list(self.texts.templates),
            "prompts": self.texts.spec,
            "words": self.texts.words,
        }
        described = {name: getattr(self, name) for name in about}
        save_tensors(path, tensors, {"kind": "classifier", **described, **said})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """Read `save`'s file. Raises UserError when it is missing, broken or not a classifier."""
        tensors, about = load_tensors(path, "classifier")
        about.pop("kind")
        try:
            names = check_class_names(about.pop("classnames"), "its names")
            templates = check_class_names(about.pop("templates", [TEMPLATE]), "its texts")
            spec, words = (str(about.pop(name, "")) for name in ("prompts", "words"))
            texts = ClassPrompts(tuple(templates), {}, spec, tensors.pop("context", None), words)
            if not all(isinstance(value, KINDS[name]) for name, value in about.items()):
                raise TypeError
            is_new = tensors.pop("is_new").bool()
            rows = {name: tensor.float() for name, tensor in tensors.items()}
            if "text_shift" in rows and "text_map" not in rows:  # of version 0.1
                rows["text_map"] = torch.eye(rows["weight"].shape[1])
            return cls(classnames=names, is_new=is_new, texts=texts, **rows, **about)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{path}: an incomplete classifier file; train again to write it anew") from None


def fit_class_weights(
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    generator: torch.Generator,
    *,
    pull: float = 1.0,
    steps: int = 150,
    lr: float = 2e-3,
    anneal: bool = True,
    batch: int = 1024,
    log_prior: bool = True,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Unit rows (C, d) of a cosine softmax, trained on features (n, d) from the given unit `rows`.

    Minimises CE((x.r_c / temperature + log p_c)) + pull/2 mean_c |r_c - rows_c|^2, where p_c is the share of
    class c among the labels (logit adjustment, Menon et al. 2021). A class whose text row serves it well
    has no gradient and keeps it: the teacher is heard where text falls short. The paper's setting is
    pull 0, lr 5e-5, batch 64, anneal False.
    """
    prior = torch.zeros(len(rows), device=features.device)
    if log_prior:
        counts = torch.bincount(labels, minlength=len(rows)).to(features)
        prior = (counts.clamp(min=1) / len(labels)).log()

    def loss(x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        logits = x @ (rows + delta).T / temperature + prior
        return F.cross_entropy(logits, y) + 0.5 * pull * delta.square().sum(1).mean()

    delta = minimize_loss(
        loss,
        torch.zeros_like(rows),
        features,
        labels,
        generator,
        steps=steps,
        lr=lr,
        anneal=anneal,
        batch=batch,
    )
    return F.normalize(rows + delta, dim=1)


@torch.enable_grad()
def minimize_loss(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: Tensor,
    features: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    lr: float,
    batch: int,
    anneal: bool = True,
) -> Tensor:
    """Adam on `loss(x, y, parameter)` over batches drawn on the features' device; lr falls to 0 linearly."""
    parameter = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=lr)
    for step in progress_bar(range(steps), "fit rows", unit="step"):
        if anneal:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x, y = features, labels
        if len(features) > batch:
            rows = torch.randint(len(features), (batch,), device=features.device, generator=generator)
            x, y = features[rows], labels[rows]
        value = loss(x, y, parameter)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    if not torch.isfinite(parameter).all():
        raise UserError("the classifier diverged; lower GENERATOR.CLASSIFIER_LR")
    return parameter.detach()
