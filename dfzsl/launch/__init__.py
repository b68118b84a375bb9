"""Whole protocols by one command: `python -m dfzsl.launch`."""
