"""The regression against scikit-learn's, an independent solver of the same problem."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from dfzsl.trainers.recovery.logistic import ROWS_PER_BLOCK, fit_logistic_regression


def data(classes: int, images: int, d: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features around a common direction, as CLIP's are; the later a class, the fewer of it."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(torch.linspace(images, 2, classes).int())
    scale = torch.arange(1, d + 1).pow(-0.5)
    means = torch.ones(d) / d**0.5 + torch.randn(classes, d, generator=g) * scale
    return F.normalize(means[y] + torch.randn(len(y), d, generator=g) * scale, dim=1), y


def reference(x: torch.Tensor, y: torch.Tensor, C: float, balanced: bool) -> torch.Tensor:
    weights = "balanced" if balanced else None
    model = LogisticRegression(C=C, tol=1e-10, max_iter=10_000, fit_intercept=False, class_weight=weights)
    rows = torch.from_numpy(model.fit(x.double().numpy(), y.numpy()).coef_)
    return torch.cat([-rows, rows]) / 2 if len(model.classes_) == 2 else rows


def apart(rows: torch.Tensor, others: torch.Tensor) -> float:
    return float((rows - others).norm() / others.norm())


@pytest.mark.parametrize("balanced", (False, True))
@pytest.mark.parametrize("C", (0.316, 3.0, 30.0))
@pytest.mark.parametrize("classes", (2, 3, 12))
def test_is_scikit_learns_to_five_digits(classes, C, balanced):
    x, y = data(classes, 40)
    rows = fit_logistic_regression(x, y, classes, C, balanced=balanced)
    assert apart(rows, reference(x, y, C, balanced)) < 1e-5
    assert rows.sum(0).abs().max() < 1e-4


def test_more_features_than_go_at_once_and_any_start_end_at_the_same_rows():
    x, y = data(6, ROWS_PER_BLOCK // 2)
    assert len(x) > ROWS_PER_BLOCK
    rows = fit_logistic_regression(x, y, 6, 3.0, tolerance=1e-8)
    assert apart(rows, reference(x, y, 3.0, False)) < 1e-5
    assert apart(fit_logistic_regression(x, y, 6, 3.0, tolerance=1e-8, start=torch.randn(6, 24)), rows) < 1e-5
    assert apart(fit_logistic_regression(x, y, 6, 3.0, tolerance=1e-4), rows) < 1e-2
    assert torch.equal(fit_logistic_regression(x, y, 6, 3.0, tolerance=1e-8), rows)


def test_a_class_without_features_gets_no_row():
    x, y = data(4, 30)
    rows = fit_logistic_regression(x, 2 * y, 8, 3.0)
    assert (rows[1::2] == 0).all()
    assert torch.equal(rows[::2], fit_logistic_regression(x, y, 4, 3.0))


def test_features_that_tell_nothing_give_no_rows():
    x = F.normalize(torch.randn(1, 24), dim=1).repeat(60, 1)
    assert (fit_logistic_regression(x, torch.arange(60) % 6, 6, 3.0) == 0).all()
