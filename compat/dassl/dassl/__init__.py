"""A drop-in for the public surface of Dassl.pytorch 0.6.3 that CoOp-family repositories use."""

__version__ = "0.6.3.post1"
