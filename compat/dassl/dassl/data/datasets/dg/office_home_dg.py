"""Office-Home (Venkateswara et al., CVPR 2017) divided: office_home_dg/DOMAIN/{train,val}/CLASS/*.jpg."""

from __future__ import annotations

from ..build import DATASET_REGISTRY
from .digits_dg import DigitsDG


@DATASET_REGISTRY.offer
class OfficeHomeDG(DigitsDG):
    dataset_dir = "office_home_dg"
    domains = ("art", "clipart", "product", "real_world")
    archive = "office_home_dg.zip"
    data_url = "https://drive.google.com/uc?id=1gkbf_KaxoBws-GWT3XIPZ7BnkqbAxIFa"
