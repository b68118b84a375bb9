"""Classify images: python scripts/dfzsl/predict.py IMAGE... --classifier output/.../classifier.safetensors"""

import argparse
import sys

import torch
from PIL import Image

from dfzsl.errors import UserError
from dfzsl.trainers.backbone import BUILT_IN, load_backbone
from dfzsl.trainers.classifier import Classifier


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--classifier", required=True, help="the classifier.safetensors of a DFZSL run")
    parser.add_argument("--weights", help="the backbone's weights file, if the run did not use a named tag")
    args = parser.parse_args()
    classifier = Classifier.load(args.classifier)
    tag = "openai" if classifier.backbone == BUILT_IN else classifier.weights
    backbone = load_backbone(classifier.backbone, args.weights or tag)
    if backbone.weights_id != classifier.weights:
        raise UserError(f"--weights: expected weights {classifier.weights}, found {backbone.weights_id}")
    for path in args.images:
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            raise UserError(f"{path}: not a readable image ({error})") from None
        features = backbone.encode_image(backbone.transform(image)[None])
        probability, label = classifier.logits(features)[0].softmax(0).max(0)
        print(f"{path}: {classifier.classnames[label]} ({probability:.0%})")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"predict.py: {error}", file=sys.stderr)
        sys.exit(2)
