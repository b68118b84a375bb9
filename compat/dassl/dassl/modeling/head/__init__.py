from .build import HEAD_REGISTRY, build_head
from .mlp import MLP, mlp

__all__ = ["HEAD_REGISTRY", "MLP", "build_head", "mlp"]
