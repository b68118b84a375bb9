"""The command line `dfzsl`."""
