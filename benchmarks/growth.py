"""The client's side against the number of classes: python benchmarks/growth.py [--most 21000] [--figure FILE]

Recovery from logits and stage 3 by the default recipe, without prompts: a fifth of the names are base
classes, d = 512. With `--part labels` the boundary search alone, all names base classes. Each size runs in a
process of its own, which measures its processor time and by how much its memory grew. The exponents are
those of the three largest sizes. The world is made up.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

DIM = 512
SIZES = {"build": (100, 300, 1000, 3000, 10000, 21000), "labels": (28, 100, 300, 1000)}


def measure(part: str, names: int, threads: int) -> dict[str, float]:
    """Processor seconds, seconds and GB of one size."""
    import torch
    import torch.nn.functional as F

    from dfzsl.io.results import peak_memory
    from dfzsl.trainers.clip.aligned_text import AlignedText
    from dfzsl.trainers.generation.generate import generate
    from dfzsl.trainers.recovery.open_oracle import open_oracle
    from dfzsl.trainers.recovery.recover import recover
    from dfzsl.trainers.recovery.teacher import Teacher

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    base = names // 5 if part == "build" else names
    deviation = 0.4 * F.normalize(torch.randn(names, DIM, generator=generator), dim=1)
    noise = 0.4 * F.normalize(torch.randn(names, DIM, generator=generator), dim=1)
    text = F.normalize(F.normalize(torch.randn(DIM, generator=generator), dim=0) + deviation + noise, dim=1)
    classnames = [f"class {i}" for i in range(names)]
    teacher = Teacher(deviation[:base] - deviation[:base].mean(0), classnames[:base], "", True)
    oracle = open_oracle(teacher, "logits" if part == "build" else "labels")
    before = peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    virtual = recover(oracle, text[:base], new_text=text[base:], generator=generator)
    if part == "build":
        generate(virtual, AlignedText(text[:base], text[base:], classnames[base:]), generator=generator)
    found = {
        "names": names,
        "CPU seconds": time.process_time() - cpu,
        "seconds": time.perf_counter() - wall,
        "GB": (peak_memory() - before) / 2**30,
    }
    if part == "labels":
        true = F.normalize(teacher.weight, dim=1)
        cosine = F.cosine_similarity(virtual.weight, true - true.mean(0), dim=1)
        found |= {"queries": virtual.queries, "1e6 (1 - cosine)": 1e6 * (1 - float(cosine.double().mean()))}
    return found


def exponent(rows: list[dict[str, float]], key: str) -> float:
    """Of key ~ names^exponent, by least squares on logarithms of the three largest sizes."""
    points = [(math.log(row["names"]), math.log(max(row[key], 1e-6))) for row in rows[-3:]]
    x, y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def draw(rows: list[dict[str, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("CPU seconds", "GB"), strict=True):
        names = [row["names"] for row in rows]
        axes.loglog(names, [row[key] for row in rows], "o-", label=f"exponent {exponent(rows, key):.2f}")
        linear = [rows[-1][key] * n / names[-1] for n in names]
        axes.loglog(names, linear, ":", color="grey", label="linear")
        axes.set(xlabel="base and new classes", title=key)
        axes.legend()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--part", choices=SIZES, default="build", help="what grows")
    flags.add_argument("--most", type=int, help="the largest size")
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--figure", type=Path, help="SVG or PNG to write")
    flags.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.one:
        print(json.dumps(measure(args.part, args.one, args.threads)))
        return
    rows = []
    for size in SIZES[args.part]:
        if not args.most or size <= args.most:
            command = [sys.executable, __file__, "--part", args.part, "--one", str(size)]
            command += ["--threads", str(args.threads)]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(ran.stdout.splitlines()[-1]))
    for row in rows:
        row["of the least"] = row["CPU seconds"] / rows[0]["CPU seconds"]
    print(tabulate(rows, headers="keys", floatfmt=",.2f", intfmt=",", tablefmt="github"))
    if len(rows) > 2:
        print(f"exponents: time {exponent(rows, 'CPU seconds'):.2f}, memory {exponent(rows, 'GB'):.2f}")
        if args.figure:
            draw(rows, args.figure)


if __name__ == "__main__":
    main()
