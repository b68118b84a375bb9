"""The frozen vision-language model, and the context tokens that are learned in front of its text tower."""
