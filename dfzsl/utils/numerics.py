"""Provide numerical helpers that all stages share: unit rows, class means, bounded portions, checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError

MAX_ELEMENTS = 2**27  # numbers of an intermediate result that are held at once: half a gigabyte in float32


def split_rows(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """The rows of x in runs so short that `width` numbers for each of them stay below AT_ONCE."""
    return x.split(max(1, MAX_ELEMENTS // width))


def unit(x: Tensor) -> Tensor:
    """Rows (n, d) of any length as unit rows, at least float32; a row that is zero stays zero.

    Powers of two are taken out first, which is exact: the square of a length can overflow or vanish.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    _, exponent = torch.frexp(x.detach().abs().amax(1, keepdim=True))
    return F.normalize(torch.ldexp(x, -exponent), dim=1)


def class_sums(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum features by class.

    Args:
        features: (n, d) features.
        labels: (n,) their classes, integers from 0 to `classes` - 1.
        classes: number of classes C.

    Returns:
        Sums (C, d) in the type of `features`, and counts (C,) as integers.
    """
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    return sums, torch.bincount(labels, minlength=classes)


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean feature (C, d) of each class, 0 where a class has none (arguments: `class_sums`)."""
    sums, counts = class_sums(features, labels, classes)
    return sums / counts.clamp(min=1)[:, None]


def check_unit_rows(
    x: Tensor, stage: str, what: str, classnames: Sequence[str] = (), labels: Tensor | None = None
) -> Tensor:
    """`x` (n, d) itself, if its rows are finite and of unit length to 1 %.

    Else UserError that names the stage and the class: `classnames[labels[i]]` of row i, `classnames[i]`
    without `labels`.
    """
    length = torch.linalg.vector_norm(x.detach().float(), dim=1)
    if (wrong := ~((length - 1).abs() < 0.01)).any():
        row = int(wrong.nonzero()[0])
        label = row if labels is None else int(labels[row])
        name = f"class '{classnames[label]}'" if classnames else f"row {label}"
        how = "is zero" if length[row] == 0 else f"has length {float(length[row]):.3g}"
        if not torch.isfinite(x[row]).all():
            how = "is not finite"
        raise UserError(f"{stage}: {name} has no direction: its {what} {how}")
    return x
