"""The client's side without prompts, stage by stage: python benchmarks/pipeline.py [--threads 2]

40 base and 10 new classes, d = 512, 600 virtual features per base class; the default recipe, with the vMF
generator in it. The world is made up, in the shape of CLIP's. Beside it, the neural generators at the paper's
size: 20 steps each.
"""

from __future__ import annotations

import argparse
import contextlib
import time

import torch
import torch.nn.functional as F
from tabulate import tabulate

from dfzsl.trainers.clip.aligned_text import AlignedText
from dfzsl.trainers.generation.generate import generate
from dfzsl.trainers.generation.generators import build_generator
from dfzsl.trainers.generation.training import GenerationSettings
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.recover import recover
from dfzsl.trainers.recovery.teacher import Teacher

BASE, NEW, DIM, VIRTUAL = 40, 10, 512, 600
LIMIT = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
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
    stages: list[list] = []

    @contextlib.contextmanager
    def stage(name: str):
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        stages.append([name, time.perf_counter() - wall, time.process_time() - cpu])

    def build(**settings: object) -> None:
        generate(
            virtual,
            AlignedText(text[:BASE].to(args.device), text[BASE:].to(args.device), names[BASE:]),
            settings=GenerationSettings(**settings),  # type: ignore[arg-type]
            generator=generator,
        )

    with stage("recovery from logits, d + 1 queries"):
        virtual = recover(oracle, text[:BASE], new_text=text[BASE:], generator=generator)
    with stage("stage 3 in closed form, balanced on 5 rehearsals"):
        build()
    wall, cpu = (sum(column) for column in list(zip(*stages, strict=True))[1:])
    stages.append(["all of it", wall, cpu])
    with stage(f"beside it: sampling {BASE * VIRTUAL:,} features"):
        features, labels = virtual.sample(VIRTUAL, generator)
    with stage("beside it: generator vmf and a trained classifier"):
        build(name="vmf", num_per_class=VIRTUAL, num_generated=VIRTUAL, calibrate=False)
    few = torch.arange(20 * 64) * len(features) // (20 * 64)
    for name in ("cvae", "clswgan", "tfvaegan"):
        with stage(f"beside it: {name}, 20 steps"):
            model = build_generator(name, DIM, DIM, epochs=1, holdout=0.0)
            model.fit(*(x.to(args.device) for x in (features[few], labels[few], text[:BASE])), generator)
    sampling = next(cpu for name, _, cpu in stages if "sampling" in name)
    rows = [[*stage, stage[-1] / sampling] for stage in stages]
    headers = ["stage", "seconds", "CPU seconds", "CPU of sampling's"]
    print(tabulate(rows, headers=headers, floatfmt=".1f", tablefmt="github"))
    print(f"{'under' if wall < LIMIT else 'OVER'} the limit of {LIMIT:.0f} s")


if __name__ == "__main__":
    main()
