"""ResNets (He et al., CVPR 2016) as backbones, of torchvision's blocks and with its weights.

resnet18, 34, 50, 101, 152; and 18, 50 and 101 with MixStyle after some layers (resnet18_ms_l1, _ms_l12,
_ms_l123) or EFDMix (_efdmix_l1, ...). Parameters have torchvision's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...utils.vision import import_torchvision
from ..ops import EFDMix, MixStyle
from .backbone import Backbone
from .build import BACKBONE_REGISTRY

# depth: (torchvision's block, blocks in each of the four layers)
CONFIGURATIONS = {
    18: ("BasicBlock", (2, 2, 2, 2)),
    34: ("BasicBlock", (3, 4, 6, 3)),
    50: ("Bottleneck", (3, 4, 6, 3)),
    101: ("Bottleneck", (3, 4, 23, 3)),
    152: ("Bottleneck", (3, 8, 36, 3)),
}


def __getattr__(name: str) -> Any:
    """BasicBlock and Bottleneck: torchvision's, imported when asked for."""
    if name in ("BasicBlock", "Bottleneck"):
        return getattr(import_torchvision().models.resnet, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


class ResNet(Backbone):
    """Features after the last layer, averaged over the places.

    block: BasicBlock, Bottleneck or a class with their signature and `expansion`. ms_class: a module that
    mixes features between images, applied after the layers in `ms_layers` ("layer1" to "layer3").
    """

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        ms_class: Any = None,
        ms_layers: Sequence[str] = (),
        ms_p: float = 0.5,
        ms_a: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.inplanes = 64
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2)
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self._out_features = 512 * block.expansion
        if wrong := set(ms_layers) - {"layer1", "layer2", "layer3"}:
            raise ValueError(f"features are mixed after layer1, layer2 or layer3, not {sorted(wrong)}")
        self.mixstyle = ms_class(p=ms_p, alpha=ms_a) if ms_layers else None
        if ms_layers:
            print(f"Insert {type(self.mixstyle).__name__} after {list(ms_layers)}")
        self.ms_layers = list(ms_layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        width, shortcut = planes * block.expansion, None
        if stride != 1 or self.inplanes != width:
            shortcut = nn.Sequential(
                nn.Conv2d(self.inplanes, width, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(width),
            )
        first = block(self.inplanes, planes, stride, shortcut)
        self.inplanes = width
        return nn.Sequential(first, *(block(width, planes) for _ in range(blocks - 1)))

    def featuremaps(self, x: Tensor) -> Tensor:
        """(B, out_features, H / 32, W / 32)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in ("layer1", "layer2", "layer3"):
            x = getattr(self, name)(x)
            if self.mixstyle is not None and name in self.ms_layers:
                x = self.mixstyle(x)
        return self.layer4(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.global_avgpool(self.featuremaps(x)).flatten(1)


def _register(depth: int, suffix: str = "", **mixing: Any) -> Any:
    """Register `resnet{depth}{suffix}(pretrained=True)` and return it."""

    def build(pretrained: bool = True, **kwargs: Any) -> ResNet:
        models = import_torchvision().models
        block, layers = CONFIGURATIONS[depth]
        model = ResNet(getattr(models.resnet, block), layers, **mixing)
        if pretrained:
            weights = models.get_weight(f"ResNet{depth}_Weights.IMAGENET1K_V1").get_state_dict(progress=False)
            model.load_state_dict(weights, strict=False)
        return model

    build.__name__ = build.__qualname__ = f"resnet{depth}{suffix}"
    BACKBONE_REGISTRY.register(build)
    return build


_built = [_register(depth) for depth in CONFIGURATIONS]
_built += [
    _register(
        depth, f"_{name}_l{'123'[:last]}", ms_class=kind, ms_layers=["layer1", "layer2", "layer3"][:last]
    )
    for name, kind in (("ms", MixStyle), ("efdmix", EFDMix))
    for depth in (18, 50, 101)
    for last in (1, 2, 3)
]
globals().update({build.__name__: build for build in _built})
__all__ = ["ResNet", *(build.__name__ for build in _built)]
