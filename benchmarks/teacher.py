"""An owner's regression beside scikit-learn's: python benchmarks/teacher.py [--classes 50,200] [--images 100]

Rows of d = 512 by multinomial logistic regression on made-up features around a common direction, C = 3. Each
figure is processor seconds of a process of its own. "default" is scikit-learn as it comes, "tight" with its
gradient below 1e-9; "off" is how far its rows are from ours, relative to their length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from growth import exponent
from tabulate import tabulate
from torch import Tensor

from dfzsl.io.results import peak_memory
from dfzsl.trainers.recovery.logistic import fit_logistic_regression

DIM, STRENGTH = 512, 3.0
WAYS = ("ours", "default", "tight")


def features(classes: int, images: int) -> tuple[Tensor, Tensor]:
    """Unit rows (n, d), directions as unequal as CLIP's, and labels (n,)."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, DIM + 1).pow(-0.5)
    common = F.normalize(torch.randn(DIM, generator=generator), dim=0)
    own = F.normalize(torch.randn(classes, DIM, generator=generator) * scale, dim=1)
    labels = torch.arange(classes).repeat_interleave(images)
    x = F.normalize(common + 0.6 * own, dim=1)[labels]
    for part in x.split(10_000):  # in place: half a million rows are a gigabyte
        part += 0.6 * F.normalize(torch.randn(part.shape, generator=generator) * scale, dim=1)
        F.normalize(part, dim=1, out=part)
    return x, labels


def measure(way: str, classes: int, images: int, save: str) -> dict[str, float]:
    """Processor seconds and GB of one fit; its rows go to a file."""
    x, labels = features(classes, images)
    if way != "ours":
        from sklearn.linear_model import LogisticRegression

    before, started = peak_memory(), time.process_time()
    if way == "ours":
        rows = fit_logistic_regression(x, labels, classes, STRENGTH)
    else:
        tolerance = 1e-4 if way == "default" else 1e-9
        model = LogisticRegression(C=STRENGTH, tol=tolerance, max_iter=1000, fit_intercept=False)
        rows = torch.from_numpy(model.fit(x.double().numpy(), labels.numpy()).coef_)
    seconds = time.process_time() - started
    torch.save(rows.double(), save)
    return {"seconds": seconds, "GB": (peak_memory() - before) / 2**30}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--classes", default="50,100,200,500")
    flags.add_argument("--images", type=int, default=100, help="of each class")
    flags.add_argument("--ways", default=",".join(WAYS), help="what to fit with")
    flags.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.one:
        way, classes, save = args.one
        print(json.dumps(measure(way, int(classes), args.images, save)))
        return
    ways, table, ours = args.ways.split(","), [], []
    with tempfile.TemporaryDirectory() as folder:
        for classes in map(int, args.classes.split(",")):
            row: list[float] = [classes]
            rows: dict[str, Tensor] = {}
            for way in ways:
                save = str(Path(folder) / "rows.pt")
                command = [sys.executable, __file__, "--images", str(args.images)]
                ran = subprocess.run(
                    [*command, "--one", way, str(classes), save],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                found = json.loads(ran.stdout.splitlines()[-1])
                rows[way] = torch.load(save)
                if way == "ours":
                    ours.append({"names": classes, "seconds": found["seconds"]})
                    row += [found["seconds"], found["GB"]]
                else:
                    off = float((rows[way] - rows["ours"]).norm() / rows["ours"].norm())
                    row += [found["seconds"], found["seconds"] / row[1], found["GB"], off]
            table.append(row)
    heads = ["classes", "ours s", "GB"]
    for way in ways[1:]:
        heads += [f"{way} s", f"{way} / ours", "GB", "off"]
    print(tabulate(table, heads, floatfmt=".3g", intfmt=",", tablefmt="github"))
    if len(ours) > 2:
        print(f"exponent of ours: {exponent(ours, 'seconds'):.2f}")


if __name__ == "__main__":
    main()
