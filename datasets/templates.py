"""Provide prompt templates published by CLIP's authors for ImageNet (github.com/openai/CLIP, notebooks)."""

SELECTED_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""Seven of the eighty templates, selected by CLIP's authors; they outperform the ensemble of all eighty."""
