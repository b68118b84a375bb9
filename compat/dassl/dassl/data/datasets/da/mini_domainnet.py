"""miniDomainNet (Zhou et al., Domain adaptive ensemble learning): domainnet/, with splits_mini/."""

from __future__ import annotations

from ..build import DATASET_REGISTRY
from .domainnet import DomainNet


@DATASET_REGISTRY.offer
class miniDomainNet(DomainNet):
    dataset_dir = "domainnet"
    domains = ("clipart", "painting", "real", "sketch")
    splits, validates = "splits_mini", False
