"""Run the sweep of a protocol with one command, `python -m dfzsl.launch PROTOCOL`."""
