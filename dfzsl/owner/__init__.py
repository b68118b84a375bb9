"""Fit, import and serve teachers."""
