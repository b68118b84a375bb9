"""Download data sets into CoOp's layout and check them (`python -m dfzsl.prepare`)."""
