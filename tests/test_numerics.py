import pytest
import torch

from dfzsl.utils.numerics import class_means, class_sums


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_class_sums_and_means(kind):
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=kind)
    labels = torch.tensor([2, 0, 2])
    sums, counts = class_sums(features, labels, 4)
    assert sums.dtype == kind and counts.tolist() == [1, 0, 2, 0]
    assert sums.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]
    assert class_means(features, labels, 4).tolist() == [[3, 4], [0, 0], [3, 4], [0, 0]]
