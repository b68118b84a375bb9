"""Provide helpers for all other packages: errors, logging, progress bars, numerics, distributed runs."""
