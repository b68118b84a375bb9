from importlib import import_module
from typing import Any

from ...utils.left_out import left_out
from .base_dataset import DatasetBase, Datum
from .build import DATASET_REGISTRY, LEFT_OUT, build_dataset

__all__ = ["DATASET_REGISTRY", "DatasetBase", "Datum", "build_dataset"]


def __getattr__(name: str) -> Any:
    """The data sets of `da` and `dg`, as in the original; they are imported when asked for."""
    for package in () if name.startswith("_") else ("da", "dg"):
        module = import_module(f".{package}", __name__)
        if name in module.__all__:
            return getattr(module, name)
    return left_out(__name__, sum(LEFT_OUT.values(), ()))(name)
