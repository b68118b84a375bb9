from ...utils.left_out import left_out
from .build import NETWORK_REGISTRY, build_network

__all__ = ["NETWORK_REGISTRY", "build_network"]

__getattr__ = left_out(
    __name__, ("fcn_3x32_gctx", "fcn_3x64_gctx", "fcn_3x32_gctx_stn", "fcn_3x64_gctx_stn", "ddaig_fcn")
)
