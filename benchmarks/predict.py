"""`dfzsl predict` against what decoding and encoding allow: python benchmarks/predict.py [--pictures 1000]

Pictures of about a photograph's detail are written to a temporary folder. Decoding (file to the encoder's
input) and encoding are timed alone, one after the other in one process; with w processes that decode, on c
cores, nothing can take less than max(decode / w, encode, (decode + encode) / c). The command's time is that
of its loop, without imports.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from extract import pictures
from tabulate import tabulate

from dfzsl.client.predict import Jsonl, find_images, predict
from dfzsl.datasets.encoding import read_image
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.generation.classifier import Classifier


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--pictures", type=int, default=1000)
    flags.add_argument("--side", type=int, default=384, help="pixels")
    flags.add_argument("--backbone", default="shapes")
    flags.add_argument("--weights", default="openai")
    flags.add_argument("--rounds", type=int, default=3, help="the best is kept, of each")
    args = flags.parse_args()
    backbone = load_backbone(args.backbone, args.weights)
    rows = F.normalize(torch.randn(100, backbone.dim), dim=1)
    zeros = torch.zeros(100)
    classifier = Classifier(rows, [f"class {c}" for c in range(100)], zeros.bool(), zeros)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    table = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        pictures(Path(folder), args.pictures, args.side)
        paths = find_images([folder])
        for workers in (0, cores):
            best = {"decode": float("inf"), "encode": float("inf"), "predict": float("inf")}
            for _ in range(args.rounds):
                started = time.perf_counter()
                inputs = [backbone.transform(read_image(path)) for path in paths]
                best["decode"] = min(best["decode"], time.perf_counter() - started)
                started = time.perf_counter()
                for batch in torch.stack(inputs).split(64):
                    backbone.encode_image(batch)
                best["encode"] = min(best["encode"], time.perf_counter() - started)
                report = Jsonl(io.StringIO())
                started = time.perf_counter()
                for found, _ in predict(classifier, backbone, paths, 3, num_workers=workers):
                    for row in found:
                        report.add(*row)
                best["predict"] = min(best["predict"], time.perf_counter() - started)
            total = best["decode"] + best["encode"]
            bound = max(best["decode"] / workers, best["encode"], total / cores) if workers else total
            rates = [args.pictures / seconds for seconds in (*best.values(), bound)]
            table.append((workers, *rates, bound / best["predict"]))
    headers = (
        "processes that decode",
        "decode / s",
        "encode / s",
        "predict / s",
        "bound / s",
        "share of the bound",
    )
    size = f"{args.pictures} pictures {args.side} pixels high"
    print(f"{size}, {args.backbone}, {cores} cores, {torch.get_num_threads()} threads")
    print(
        tabulate(
            table, headers=headers, tablefmt="github", floatfmt=(".0f", ".0f", ".0f", ".0f", ".0f", ".2f")
        )
    )


if __name__ == "__main__":
    main()
