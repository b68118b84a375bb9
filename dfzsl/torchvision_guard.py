"""Import torchvision where its compiled operators do not load.

The registry's Linux wheel of torchvision is a CUDA build. Beside a CPU-only torch its operators stay
unregistered, and importing it fails on two unguarded `register_fake` calls, for operators that nothing
here uses. Declaring the two schemas lets the import pass.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def import_torchvision() -> tuple[ModuleType, torch.library.Library | None]:
    """Import torchvision, once, and return the module (and the library handle that must stay alive).

    Call it before anything that imports torchvision (open_clip does). Every error but the missing
    `torchvision::nms` passes through.
    """
    try:
        return importlib.import_module("torchvision"), None
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    # The failed import leaves submodules behind that a second import would take for complete.
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return importlib.import_module("torchvision"), library
