"""Load the image encoder that a classifier reads."""

from __future__ import annotations

import os

import torch

from dfzsl.trainers.clip.backbone import Backbone
from dfzsl.trainers.clip.loading import BUILT_INS, load_backbone
from dfzsl.trainers.generation.classifier import Classifier
from dfzsl.utils.errors import UserError


def load_encoder(
    classifier: Classifier,
    weights: str = "",
    device: str | torch.device = "cpu",
    source: object = "the classifier",
) -> Backbone:
    """Load the backbone whose image features a classifier reads.

    Args:
        classifier: names the backbone and its weights.
        weights: pretrained tag or weights file; by default the tag that the classifier names.
        device: device of the encoder.
        source: where the classifier comes from, for error messages.

    Returns:
        The backbone.

    Raises:
        UserError: the classifier names no backbone, or was built for other weights.
    """
    if not classifier.backbone:
        raise UserError(
            f"{source} was built from features without a backbone; it cannot read images and class names"
        )
    tag = "openai" if classifier.backbone in BUILT_INS else classifier.weights
    if not weights and os.path.exists(tag):
        raise UserError(f"{source} names the weights file {tag}; if you trust it, pass it with --weights")
    backbone = load_backbone(classifier.backbone, weights or tag, device)
    if backbone.weights_id != classifier.weights:
        raise UserError(f"--weights: expected weights {classifier.weights}, found {backbone.weights_id}")
    return backbone
