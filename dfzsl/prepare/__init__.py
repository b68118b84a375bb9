"""Data sets downloaded into CoOp's layout, and checked: `python -m dfzsl.prepare`."""
