from ...utils.left_out import left_out
from ..build import LEFT_OUT
from .vanilla import Vanilla

__all__ = ["Vanilla"]

__getattr__ = left_out(__name__, LEFT_OUT["dg"])
