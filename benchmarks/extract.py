"""Extraction's throughput beside a plain DataLoader loop, and beside its two halves alone.

    python benchmarks/extract.py [--backbone ViT-B-16] [--images 2000] [--side 400] [--device cuda]

All are measured in one run on the same pictures. "decoder alone" is the loader with no encoder, "encoder
alone" the encoder on one batch again and again. Beside a GPU no loop is faster than the slower of the two;
on a CPU, where they share the cores, their times add up.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dassl.data.datasets import Datum
from PIL import Image
from tabulate import tabulate

from dfzsl.datasets.encoding import encode_datums
from dfzsl.trainers.clip.loading import load_backbone


def pictures(folder: Path, count: int, side: int) -> list[Datum]:
    """JPEG files of about a photograph's size and detail."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 24, 32, 3), dtype=np.uint8)
    datums = []
    for number, pixels in enumerate(coarse):
        path = folder / f"{number:06}.jpg"
        image = Image.fromarray(pixels).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 12, (side, side * 4 // 3, 1))
        Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype("uint8")).save(path, quality=90)
        datums.append(Datum(impath=str(path), label=number % 10))
    return datums


class Plain(torch.utils.data.Dataset):
    def __init__(self, datums: list[Datum], transform: Callable) -> None:
        self.datums, self.transform = datums, transform

    def __len__(self) -> int:
        return len(self.datums)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.datums[index].impath) as image:
            return self.transform(image.convert("RGB"))


def plain(backbone, datums: list[Datum], batch_size: int, workers: int, device: str) -> torch.Tensor:
    """The loop as it is usually written: a batch to the device, its features back."""
    loader = torch.utils.data.DataLoader(Plain(datums, backbone.transform), batch_size, num_workers=workers)
    with torch.no_grad():
        return torch.cat([backbone.encode_image(batch.to(device)).cpu() for batch in loader])


def decoder_alone(backbone, datums: list[Datum], batch_size: int, workers: int) -> None:
    for _ in torch.utils.data.DataLoader(Plain(datums, backbone.transform), batch_size, num_workers=workers):
        pass


def encoder_alone(backbone, count: int, batch_size: int, device: str) -> None:
    batch = torch.rand(batch_size, 3, *backbone.preprocess_cfg["size"], device=device)
    with torch.no_grad():
        for _ in range(max(count // batch_size, 1)):
            features = backbone.encode_image(batch)
    features.cpu()  # waits for the device


def rate(count: int, run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return count / (time.perf_counter() - started)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("--backbone", default="ViT-B-16")
    flags.add_argument("--weights", default="random")
    flags.add_argument("--precision", default="fp32")
    flags.add_argument("--images", type=int, default=2000)
    flags.add_argument("--side", type=int, default=400, help="height of a picture")
    flags.add_argument("--batch-size", type=int, default=256)
    flags.add_argument("--workers", type=int, default=os.cpu_count())
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = flags.parse_args()
    backbone = load_backbone(args.backbone, args.weights, args.device, args.precision)
    size, workers, device = args.batch_size, args.workers, args.device
    with tempfile.TemporaryDirectory() as folder:
        datums = pictures(Path(folder), args.images, args.side)
        encoder_alone(backbone, size, size, device)  # warm-up

        def ours(cache: str) -> torch.Tensor:
            place = Path(folder) / cache
            return encode_datums(backbone, datums, backbone.transform, place, size, workers, device)

        rates: dict[str, float] = {}
        for turn in range(args.rounds):
            # In turn, and the best of each counts: other work on the machine then hits all alike.
            runs: dict[str, Callable[[], object]] = {
                "decoder alone": lambda: decoder_alone(backbone, datums, size, workers),
                "encoder alone": lambda: encoder_alone(backbone, len(datums), size, device),
                "plain loop": lambda: plain(backbone, datums, size, workers, device),
                "extract": partial(ours, f"cache{turn}"),
                "extract, again (cache)": partial(ours, f"cache{turn}"),
            }
            for name, run in runs.items():
                rates[name] = max(rates.get(name, 0.0), rate(len(datums), run))
        difference = (plain(backbone, datums, size, workers, device) - ours("cache0")).abs().max().item()
    halves = [1 / rates["decoder alone"], 1 / rates["encoder alone"]]
    # Beside a GPU the halves overlap; on a CPU they share its cores.
    bound = 1 / (max(halves) if device.startswith("cuda") else sum(halves))
    rows = [
        [name, f"{r:.0f}", f"{r / rates['plain loop']:.2f}", f"{r / bound:.2f}"] for name, r in rates.items()
    ]
    print(
        f"{args.backbone} on {device}, {args.precision}, {args.images} pictures of {args.side * 4 // 3} x "
        f"{args.side}, {workers} workers, batches of {size}"
    )
    print(tabulate(rows, ["", "images/s", "of plain", "of the bound"], tablefmt="github"))
    print(f"largest difference between the plain loop's features and extract's: {difference:.1e}")


if __name__ == "__main__":
    main()
