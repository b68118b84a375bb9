from ...utils.left_out import left_out
from .backbone import Backbone as Backbone
from .build import BACKBONE_REGISTRY as BACKBONE_REGISTRY
from .build import LEFT_OUT
from .build import build_backbone as build_backbone
from .resnet import *  # noqa: F403

__getattr__ = left_out(__name__, LEFT_OUT)
