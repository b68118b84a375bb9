"""Extraction beside a plain open_clip loop and beside its two halves alone, and what its cache costs.

    python benchmarks/extract.py [--backbone ViT-B-16] [--images 2000] [--side 400] [--device cuda]

All are measured in one run on the same pictures. The plain loop is open_clip's transform and model as they
are, in a DataLoader. "decoder alone" is that loop without its encoder, "encoder alone" the encoder on one
batch again and again; below them the same halves as they are here. With w processes that decode on c cores
nothing can take less than max(decode / w, encode, (decode + encode) / c). Ratios are of processor time, of
all processes, on a CPU, where the bound is the sum of the halves here; beside a GPU they are of time, and the
bound is the slower half.
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
import torch.nn.functional as F
from dassl.data.datasets import Datum
from PIL import Image
from safetensors.torch import load_file
from tabulate import tabulate

from dfzsl.datasets.encoding import _image_batches, _load_part, encode_datums, encode_files
from dfzsl.io.tensors import save_tensors
from dfzsl.trainers.clip.backbone import cpu_has_bf16
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


class Loops:
    """The ways to be compared."""

    def __init__(self, backbone, datums: list[Datum], batch_size: int, workers: int, device: str) -> None:
        self.backbone, self.datums, self.device = backbone, datums, torch.device(device)
        self.batch_size, self.workers = batch_size, workers
        self.batch = torch.rand(batch_size, 3, *backbone.preprocess_cfg["size"], device=device)

    def loader(self) -> torch.utils.data.DataLoader:
        images = Plain(self.datums, self.backbone.transform)
        return torch.utils.data.DataLoader(images, self.batch_size, num_workers=self.workers)

    def open_clip(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self.backbone.autocast():
            return F.normalize(self.backbone.model.encode_image(batch).float(), dim=-1)

    def plain(self) -> torch.Tensor:
        """The loop as it is usually written: a batch to the device, its features back."""
        return torch.cat([self.open_clip(batch.to(self.device)).cpu() for batch in self.loader()])

    def decode_plain(self) -> None:
        for _ in self.loader():
            pass

    def decode(self) -> None:
        batches = torch.arange(len(self.datums)).split(self.batch_size)
        paths = [datum.impath for datum in self.datums]
        for _ in _image_batches(paths, self.backbone.transform, batches, self.workers, self.device):
            pass

    @torch.inference_mode()
    def encode(self, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for batch in torch.arange(len(self.datums)).split(self.batch_size):
            features = how(self.batch[: len(batch)])
        features.cpu()  # waits for the device

    def extract(self, cache: Path, precision: str) -> torch.Tensor:
        was, self.backbone.precision = self.backbone.precision, precision
        try:
            transform = self.backbone.transform
            return encode_datums(
                self.backbone, self.datums, transform, cache, self.batch_size, self.workers, self.device
            )
        finally:
            self.backbone.precision = was

    def before_they_are_kept(self) -> torch.Tensor:
        paths = [datum.impath for datum in self.datums]
        found = encode_files(self.backbone, paths, self.batch_size, self.workers, self.device)
        return torch.cat([features.cpu() for _, features, _ in found])


def cost(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and processor seconds of this process and of those it has started and seen end."""
    started, used = time.perf_counter(), sum(os.times()[:4])
    run()
    return time.perf_counter() - started, sum(os.times()[:4]) - used


def best(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """The least cost of each, in turn: other work on the machine then hits all alike."""
    found: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds, used = cost(run)
            least = found.get(name, (seconds, used))
            found[name] = min(seconds, least[0]), min(used, least[1])
    return found


def cache_table(folder: Path, rows: int, rounds: int, dim: int = 512) -> str:
    """What a cache of so many rows takes on the disk, and until its rows are at hand."""
    x = torch.empty(rows, dim, dtype=torch.float16)
    for part in x.split(1 << 16):
        part.copy_(F.normalize(torch.randn(len(part), dim), dim=1))
    half, full = folder / "half.safetensors", folder / "full.safetensors"
    save_tensors(half, {"features": x}, {"kind": "image features"})
    save_tensors(full, {"features": x.float()}, {"kind": "image features"})
    del x
    found = best(
        {
            "float32, load_file and isfinite": lambda: load_file(full)["features"].isfinite().all(),
            "float16, as it is read here": lambda: _load_part(half, "image features", (rows, dim)),
        },
        rounds,
    )
    sizes = dict(zip(found, (full.stat().st_size, half.stat().st_size), strict=True))
    first = next(iter(found.values()))[1]
    table = [
        [name, f"{sizes[name] / 1e9:.2f}", f"{seconds:.3f}", f"{used:.3f}", f"{first / max(used, 1e-3):.1f}"]
        for name, (seconds, used) in found.items()
    ]
    head = [f"cache of {rows:,} rows, d = {dim}", "GB", "seconds", "CPU seconds", "of plain"]
    return tabulate(table, head, tablefmt="github", disable_numparse=True)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("--backbone", default="ViT-B-16")
    flags.add_argument("--weights", default="random", help="random, or what --weights of extract names")
    flags.add_argument("--precision", default="fp32")
    flags.add_argument("--images", type=int, default=2000)
    flags.add_argument("--side", type=int, default=400, help="height of a picture")
    flags.add_argument("--batch-size", type=int, default=256)
    flags.add_argument("--workers", type=int, default=os.cpu_count())
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--rows", type=int, default=100_000, help="rows of the cache that is read")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = flags.parse_args()
    backbone = load_backbone(args.backbone, args.weights, args.device, args.precision)
    beside_gpu = args.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder:
        datums = pictures(Path(folder), args.images, args.side)
        loops = Loops(backbone, datums, args.batch_size, args.workers, args.device)
        loops.encode(backbone.encode_image)  # warm-up
        turns = iter(range(1000))

        def fresh(precision: str) -> torch.Tensor:
            return loops.extract(Path(folder) / f"cache{next(turns)}", precision)

        rounded = fresh(backbone.precision).float()
        runs: dict[str, Callable[[], object]] = {
            "plain loop": loops.plain,
            "decoder alone": loops.decode_plain,
            "encoder alone": partial(loops.encode, loops.open_clip),
            "decoder here: bytes": loops.decode,
            "encoder here: channels-last": partial(loops.encode, backbone.encode_image),
            "extract": partial(fresh, backbone.precision),
        }
        if backbone.precision == "fp32" and (beside_gpu or cpu_has_bf16()):
            runs["extract, bf16"] = partial(fresh, "bf16")
        found = best(runs, args.rounds)
        plain = loops.plain()
        exact = (loops.before_they_are_kept() - plain).abs().max().item()
        half = fresh("bf16").float() if "extract, bf16" in runs else None
        second = cache_table(Path(folder), args.rows, args.rounds)
    which = 0 if beside_gpu else 1
    halves = [found[name][which] for name in ("decoder here: bytes", "encoder here: channels-last")]
    bound = max(halves) if beside_gpu else sum(halves)
    rows = [
        [
            name,
            f"{args.images / each[0]:.0f}",
            f"{1000 * each[1] / args.images:.2f}",
            f"{found['plain loop'][which] / max(each[which], 1e-6):.2f}",
            f"{bound / max(each[which], 1e-6):.2f}",
        ]
        for name, each in found.items()
    ]
    print(
        f"{args.backbone} on {args.device}, {backbone.precision}, {args.images} pictures of "
        f"{args.side * 4 // 3} x {args.side}, {args.workers} workers, batches of {args.batch_size}"
    )
    head = ["", "images/s", "CPU ms an image", "of plain", "of the bound"]
    print(tabulate(rows, head, tablefmt="github", disable_numparse=True))
    print(
        f"\nlargest difference from the plain loop's features: {exact:.1e}; as they are kept: "
        f"{(rounded - plain).abs().max():.1e}, least cosine {F.cosine_similarity(rounded, plain).min():.7f}"
    )
    if half is not None:
        print(f"bf16: least cosine {F.cosine_similarity(half, plain).min():.5f}")
    print(f"\n{second}")


if __name__ == "__main__":
    main()
