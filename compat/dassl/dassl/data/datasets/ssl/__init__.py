from ....utils.left_out import left_out
from ..build import LEFT_OUT

__all__: list[str] = []

__getattr__ = left_out(__name__, LEFT_OUT["ssl"])
