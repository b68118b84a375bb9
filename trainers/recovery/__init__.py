"""Stage 1: from the owner's teacher to virtual base classes."""
