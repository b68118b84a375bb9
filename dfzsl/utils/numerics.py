"""Provide numerical helpers: L2 normalization, class means, row blocks of bounded size, checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfzsl.utils.errors import UserError

MAX_ELEMENTS = 2**27  # of an intermediate result in memory: 512 MiB in float32


def split_rows(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """Split x into blocks of rows for which `width` numbers per row are at most MAX_ELEMENTS."""
    return x.split(max(1, MAX_ELEMENTS // width))


def unit(x: Tensor) -> Tensor:
    """L2-normalize the rows of x (n, d), in float32 or better. A zero row stays zero.

    Each row is first scaled by a power of two, which is exact, because its squared length may overflow or
    underflow.
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
    """Check that rows are finite and L2-normalized to 1 %.

    Args:
        x: rows, shape (n, d).
        stage: stage that uses the rows, for the message.
        what: description of a row, for the message.
        classnames: names of the classes, for the message.
        labels: class of each row, shape (n,); by default row i belongs to class i.

    Returns:
        x.

    Raises:
        UserError: a row is zero, not finite or of another length.
    """
    length = torch.linalg.vector_norm(x.detach().float(), dim=1)
    if (invalid := ~((length - 1).abs() < 0.01)).any():
        row = int(invalid.nonzero()[0])
        label = row if labels is None else int(labels[row])
        name = f"class '{classnames[label]}'" if classnames else f"row {label}"
        problem = "is zero" if length[row] == 0 else f"has length {float(length[row]):.3g}, not 1"
        if not torch.isfinite(x[row]).all():
            problem = "is not finite"
        raise UserError(f"{stage}: the {what} of {name} {problem}")
    return x
