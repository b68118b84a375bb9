"""What TEXT.PROMPTS changes on the built-in world: python benchmarks/texts.py [--root data] [--seeds 1 2 3]

Sentences describe each class as the captions do that the CLIP learned from; none was chosen by looking
at a picture's label. The teacher is fitted on the training pictures of the base classes, its card beside
the same texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

import dfzsl
from dfzsl.datasets.encoding import encode_datums
from dfzsl.datasets.extract import open_dataset
from dfzsl.datasets.labeled_images import LabeledFeatures
from dfzsl.datasets.shapes.captions import caption
from dfzsl.datasets.shapes.world import classes
from dfzsl.io.results import harmonic_mean
from dfzsl.trainers.clip.class_prompts import ClassPrompts
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.generation.classifier import Classifier


def said_of_each(count: int) -> dict[str, list[str]]:
    """{class: captions of it as plain photographs}"""
    rng = np.random.default_rng(0)
    return {c.name: [caption(c, "photo", rng) for _ in range(count)] for c in classes()}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--root", default="data")
    flags.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    flags.add_argument("--sentences", type=int, default=20, help="of each class")
    args = flags.parse_args()
    backbone, names = load_backbone("shapes"), [c.name for c in classes()]
    dataset, found = open_dataset("shapes", args.root), {}
    for part, datums in (("train", dataset.train_x), ("test", dataset.test)):
        x = encode_datums(backbone, datums, backbone.transform, num_workers=0).float()
        labels = torch.tensor([datum.label for datum in datums])
        found[part] = LabeledFeatures(x, labels, names, backbone.identity, [])
    base = found["train"].select_classes(names[:60])
    table = []
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.json"
        said.write_text(json.dumps(said_of_each(args.sentences)), encoding="utf-8")
        for label, text in (
            ("a photo of a {}.", ""),
            ("CLIP's 80 templates", "ensemble"),
            (f"{args.sentences} sentences a class", str(said)),
        ):
            texts = ClassPrompts.parse(text)
            rows = texts.features(backbone, names)
            teacher = dfzsl.fit_teacher(
                base.features,
                base.labels,
                base.classnames,
                backbone.identity,
                text=rows[:60],
                prompts=texts.description,
                generator=torch.Generator().manual_seed(1),
            )
            is_new = torch.arange(120) >= 60
            plain = Classifier(
                rows, names, is_new, torch.zeros(120), backbone="shapes", weights=backbone.weights_id
            )
            tried = [("CLIP", [dfzsl.evaluate(plain, found["test"])])]
            built = [dfzsl.build(teacher, names[60:], text=text, seed=seed) for seed in args.seeds]
            tried.append(("DFZSL", [dfzsl.evaluate(made, found["test"]) for made in built]))
            for method, results in tried:
                mean = [statistics.mean(getattr(r, key) for r in results) for key in ("base", "new")]
                joint = [
                    statistics.mean(getattr(r, f"joint_{key}") for r in results) for key in ("base", "new")
                ]
                table.append((method, label, *mean, harmonic_mean(*mean), harmonic_mean(*joint)))
    headers = ("method", "text", "base", "new", "H", "H among all classes")
    print(tabulate(sorted(table, reverse=True), headers=headers, tablefmt="github", floatfmt=".1f"))


if __name__ == "__main__":
    main()
