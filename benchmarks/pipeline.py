"""The client's side without prompts, stage by stage: python benchmarks/pipeline.py [--threads 2]

40 base and 10 new classes, d = 512, 600 virtual features per base class; the default recipe, with the vMF
generator in it. The world is made up, in the shape of CLIP's. Beside it, the neural generators at the paper's
size: 20 steps each.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from tabulate import tabulate

from dfzsl.trainers.generators import build_generator
from dfzsl.trainers.oracles import open_oracle
from dfzsl.trainers.pipeline import StageThreeSettings, build_classifier
from dfzsl.trainers.recovery import recover
from dfzsl.trainers.teacher import Teacher

BASE, NEW, DIM, VIRTUAL = 40, 10, 512, 600
LIMIT = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    deviation = 0.4 * F.normalize(torch.randn(BASE + NEW, DIM, generator=generator), dim=1)
    noise = 0.4 * F.normalize(torch.randn(BASE + NEW, DIM, generator=generator), dim=1)
    axis = F.normalize(torch.randn(DIM, generator=generator), dim=0)
    text = F.normalize(axis + deviation + noise, dim=1)
    names = [f"class {i}" for i in range(BASE + NEW)]
    weight = deviation[:BASE] - deviation[:BASE].mean(0)
    oracle = open_oracle(Teacher(weight, names[:BASE]), "logits")
    stages = []

    def stage(name: str, start: float) -> None:
        stages.append([name, time.perf_counter() - start])

    start = begin = time.perf_counter()
    virtual = recover(oracle, text[:BASE], new_text=text[BASE:], generator=generator)
    stage(f"recovery ({virtual.queries} queries)", start)
    start = time.perf_counter()
    features, labels = virtual.sample(VIRTUAL, generator)
    stage(f"sampling ({len(features):,} features)", start)
    start = time.perf_counter()
    model = build_generator("vmf", DIM, DIM).fit(features, labels, text[:BASE], generator)
    made = model.sample(text[BASE:], VIRTUAL, generator)
    stage(f"generator vmf (fit, {len(made):,} features)", start)
    for calibrate in (False, True):
        start = time.perf_counter()
        build_classifier(
            virtual,
            text[:BASE],
            text[BASE:],
            new_classnames=names[BASE:],
            settings=StageThreeSettings(
                name="vmf", num_per_class=VIRTUAL, num_generated=VIRTUAL, calibrate=calibrate
            ),
            generator=generator,
        )
        stage(f"all of stage 3, {'and' if calibrate else 'not'} calibrated", start)
    total = time.perf_counter() - begin
    stages.append(["all of it", total])
    few = torch.arange(20 * 64) * len(features) // (20 * 64)
    for name in ("cvae", "clswgan", "tfvaegan"):
        start = time.perf_counter()
        model = build_generator(name, DIM, DIM, epochs=1, holdout=0.0)
        model.fit(features[few], labels[few], text[:BASE], generator)
        stage(f"beside it: {name}, 20 steps", start)
    print(tabulate(stages, headers=["stage", "seconds"], floatfmt=".2f", tablefmt="github"))
    print(f"{'under' if total < LIMIT else 'OVER'} the limit of {LIMIT:.0f} s")


if __name__ == "__main__":
    main()
