"""Office-31 (Saenko et al., ECCV 2010): office31/DOMAIN/CLASS/*."""

from __future__ import annotations

from ..build import DATASET_REGISTRY
from .office_home import OfficeHome


@DATASET_REGISTRY.offer
class Office31(OfficeHome):
    dataset_dir = "office31"
    domains = ("amazon", "webcam", "dslr")
    lower = False
