from ....utils.left_out import left_out
from ..build import LEFT_OUT
from .domainnet import DomainNet
from .mini_domainnet import miniDomainNet
from .office31 import Office31
from .office_home import OfficeHome
from .visda17 import VisDA17

__all__ = ["DomainNet", "Office31", "OfficeHome", "VisDA17", "miniDomainNet"]

__getattr__ = left_out(__name__, LEFT_OUT["da"])
