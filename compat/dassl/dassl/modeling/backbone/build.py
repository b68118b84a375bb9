"""Image backbones by name."""

from __future__ import annotations

from typing import Any

from ...utils import Registry, check_availability

BACKBONE_REGISTRY = Registry("BACKBONE")
LEFT_OUT = (
    *("alexnet", "mobilenetv2", "preact_resnet18", "vgg16", "wide_resnet_16_4", "wide_resnet_28_2"),
    *("cnn_digit5_m3sda", "cnn_digitsdg", "cnn_digitsingle"),
    *(f"efficientnet_b{size}" for size in range(8)),
    *(f"shufflenet_v2_x{width}" for width in ("0_5", "1_0", "1_5", "2_0")),
)


def build_backbone(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Call what is registered under `name` with the keyword arguments (`pretrained` among them)."""
    check_availability(name, BACKBONE_REGISTRY.registered_names(), LEFT_OUT)
    if verbose:
        print(f"Backbone: {name}")
    return BACKBONE_REGISTRY.get(name)(**kwargs)
