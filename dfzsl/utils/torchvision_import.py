"""Import torchvision where the registry's CUDA wheel of it meets a CPU-only torch.

There torchvision's operators stay unregistered, and importing it fails on two unguarded `register_fake`
calls, for operators that nothing here uses. Declaring the two schemas lets the import pass.
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
    """Import torchvision; call this before you import anything that imports it, e.g. open_clip.

    Returns:
        The module, and the handle of the declared operators, which must stay alive, or None.

    Raises:
        RuntimeError: any error of the import but the missing `torchvision::nms`.
    """
    try:
        return importlib.import_module("torchvision"), None
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    import torch

    # The failed import leaves submodules behind that a second one would take for complete.
    for name in [name for name in sys.modules if f"{name}.".startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    return importlib.import_module("torchvision"), library
