"""Provide stage 3: build a classifier of base and new classes from virtual classes and text embeddings."""
