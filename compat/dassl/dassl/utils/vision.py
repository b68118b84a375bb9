"""The import of torchvision, late and guarded."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

_libraries: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """torchvision, also beside a torch whose build has none of torchvision's compiled operators.

    There its import stops at declaring the meta kernels of nms and qnms, with "operator torchvision::nms does
    not exist". Declaring just these two schemas lets it through; transforms need none of the operators.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        # The declarations last as long as the object.
        _libraries.append(library)
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    except ImportError as error:
        raise ImportError("image transforms need torchvision: pip install torchvision") from error
    return torchvision
