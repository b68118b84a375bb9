"""Import torchvision also if its wheel was built for CUDA and torch is CPU-only.

In that combination torchvision's operators are not registered, and its import fails in `register_fake` for
two operators that this project does not use. Declaring the two schemas makes the import succeed.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def import_torchvision() -> tuple[ModuleType, object]:
    """Import torchvision. Call this before importing a library that imports it, e.g. open_clip.

    Returns:
        The module, and the handle of the declared operators, which must stay alive, or None.

    Raises:
        RuntimeError: the import failed for another reason than the missing `torchvision::nms`.
    """
    try:
        return importlib.import_module("torchvision"), None
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    import torch

    # The failed import leaves incomplete submodules, which a second import would use.
    for name in [name for name in sys.modules if f"{name}.".startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    return importlib.import_module("torchvision"), library
