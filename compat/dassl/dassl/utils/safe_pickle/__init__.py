"""Pickles and checkpoints from anywhere, read in bounded time and memory without running what they name.

This package imports nothing of Dassl, so that others can take it as it stands.
"""

from .checkpoint import check_script, load
from .unpickler import PLAIN, Call, Inert, Unpickler

__all__ = ["PLAIN", "Call", "Inert", "Unpickler", "check_script", "load"]
