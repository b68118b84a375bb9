"""Classify images: python -m dfzsl.predict IMAGE... --classifier output/.../classifier.safetensors"""

import argparse
import os

import torch

from dfzsl.datasets.encoding import read_image
from dfzsl.errors import UserError
from dfzsl.train import cli
from dfzsl.trainers.clip.loading import BUILT_IN, load_backbone
from dfzsl.trainers.generation.classifier import Classifier


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--classifier", required=True, help="the classifier.safetensors of a DFZSL run")
    parser.add_argument("--weights", help="the backbone's weights file, if the run did not use a named tag")
    args = parser.parse_args()
    classifier = Classifier.load(args.classifier)
    tag = "openai" if classifier.backbone == BUILT_IN else classifier.weights
    if not args.weights and os.path.exists(tag):
        raise UserError(f"{args.classifier} asks for the file {tag}; give it with --weights if you trust it")
    backbone = load_backbone(classifier.backbone, args.weights or tag)
    if backbone.weights_id != classifier.weights:
        raise UserError(f"--weights: expected weights {classifier.weights}, found {backbone.weights_id}")
    for path in args.images:
        features = backbone.encode_image(backbone.transform(read_image(path))[None])
        probability, label = classifier.logits(features)[0].softmax(0).max(0)
        print(f"{path}: {classifier.classnames[label]} ({probability:.0%})")


if __name__ == "__main__":
    cli(main)
