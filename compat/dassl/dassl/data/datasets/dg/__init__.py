from ....utils.left_out import left_out
from ..build import LEFT_OUT
from .digits_dg import DigitsDG
from .office_home_dg import OfficeHomeDG
from .pacs import PACS
from .vlcs import VLCS

__all__ = ["PACS", "VLCS", "DigitsDG", "OfficeHomeDG"]

__getattr__ = left_out(__name__, LEFT_OUT["dg"])
