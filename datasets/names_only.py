"""Provide a data set of class names without images, for runs that need nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from dassl.data.datasets import DatasetBase

from .base import ClassDataset


class ClassNames(DatasetBase):
    """Data set of base and new class names without images.

    A client with a teacher and class names, but no data set, trains on virtual features with it.

    Args:
        base_classnames: the teacher's classes, in label order.
        new_classnames: classes to add.

    Attributes:
        template: prompt template.
        text_features: None, since a text encoder computes them.
        test_only: False.
    """

    template = ClassDataset.template
    text_features = None
    test_only = False

    def __init__(self, base_classnames: Sequence[str], new_classnames: Sequence[str] = ()) -> None:
        self.base_classnames = list(base_classnames)
        self.new_classnames = list(new_classnames)
        self.all_classnames = [*self.base_classnames, *self.new_classnames]
        super().__init__(train_x=[], train_u=[], val=[], test=[])

    def get_num_classes(self, data_source: object) -> int:
        return len(self.base_classnames)

    def get_lab2cname(self, data_source: object) -> tuple[dict[int, str], list[str]]:
        return dict(enumerate(self.base_classnames)), list(self.base_classnames)
