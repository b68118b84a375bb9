"""Stage 3: from virtual base classes and the names' text features to one classifier for base and new."""
