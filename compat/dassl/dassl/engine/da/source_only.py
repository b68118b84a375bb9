"""What the source domains alone give."""

from __future__ import annotations

from ..build import TRAINER_REGISTRY
from ..ssl.sup_baseline import SupBaseline


@TRAINER_REGISTRY.offer
class SourceOnly(SupBaseline):
    """The cross-entropy of the source domains' images; the target's are drawn and left alone."""
