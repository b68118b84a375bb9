from ...utils.left_out import left_out
from ..build import LEFT_OUT
from .source_only import SourceOnly

__all__ = ["SourceOnly"]

__getattr__ = left_out(__name__, LEFT_OUT["da"])
