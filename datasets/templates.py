"""The prompt templates that CLIP's authors published for ImageNet (github.com/openai/CLIP, notebooks)."""

SELECTED_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""Seven of the eighty, chosen by CLIP's authors; their mean does better than all eighty."""
