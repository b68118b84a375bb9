"""Provide the frozen vision-language model, prompts of classes and prompt learners."""
