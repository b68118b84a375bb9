"""Provide the command line `dfzsl`: one click group, with a module for each group of commands.

No module of this package imports torch, matplotlib or open_clip at its top: a command imports what it needs
when it runs, so that help and shell completion are fast.
"""
