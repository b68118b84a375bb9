"""Recover virtual base classes from the owner's teacher (stage 1)."""
