"""Learning prompts: this text encoder beside the plain one that runs every position of every class.

    python benchmarks/prompts.py [--device cuda --precision fp16]
    python benchmarks/prompts.py --kinds    # on a CPU: float32 beside autocast to bfloat16 and torch.compile

One forward and backward pass through the text tower of ViT-B/16 (random weights), context of 4 tokens, names
of ImageNet. Each figure comes from a process of its own, both ways one after the other in one run. Seconds
are processor time on a CPU, which other programs disturb least. Memory is the peak during the pass above
what the process held before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from dfzsl.trainers.clip.backbone import MAX_CHUNK_TOKENS, Backbone
from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.clip.prompts import Prompts

N_CTX = 4
# The plain way keeps some 29 MB a class: more classes than these go through in pieces, whose gradients add
# up to the same (nothing is computed twice, so this costs no time).
PLAIN_AT_ONCE = 100


def class_names(count: int) -> list[str]:
    """ImageNet's names, made distinct; beyond a thousand, pairs of them."""
    from open_clip import IMAGENET_CLASSNAMES

    names = [*dict.fromkeys(IMAGENET_CLASSNAMES), "ballistic missile", "dark sunglasses"]
    words = [name for name in names if " " not in name]
    pairs = (f"{first} {second}" for first, second in itertools.product(words, names) if first != second)
    return list(itertools.islice(itertools.chain(names, pairs), count))


def plain_features(backbone: Backbone, names: list[str], context: Tensor) -> Tensor:
    """Unit features (B, C, d) as CoOp and CoCoOp compute them: all positions, through open_clip's modules."""
    model = backbone.model
    ids = backbone.tokenizer([" ".join(["X"] * N_CTX) + f" {name}." for name in names]).to(context.device)
    embedded = model.token_embedding(ids)
    features = []
    for one in context:
        middle = one.expand(len(names), -1, -1)
        x = torch.cat([embedded[:, :1], middle, embedded[:, 1 + N_CTX :]], dim=1)
        x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
        x = model.ln_final(x[torch.arange(len(x)), ids.argmax(1)])
        features.append(x @ model.text_projection)
    return F.normalize(torch.stack(features).float(), dim=-1)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure(args: argparse.Namespace) -> None:
    """One way, one size: seconds and memory to stdout, features and gradient to a file."""
    backbone = load_backbone("ViT-B-16", "random", args.device, args.precision)
    backbone.model.visual = None
    if args.way == "bf16":
        backbone.precision = "bf16"  # `use_precision` leaves a CPU at float32
    backbone.compiled = args.way == "compiled"
    names = class_names(args.classes)
    generator = torch.Generator().manual_seed(0)
    context = 0.02 * torch.randn(args.images, N_CTX, 512, generator=generator)
    weight = torch.randn(args.images, args.classes, 512, generator=generator).to(args.device)
    context = context.to(args.device).requires_grad_()
    layout = Prompts(backbone, names, N_CTX) if args.way != "plain" else None
    at_once = args.classes if layout else PLAIN_AT_ONCE

    def run() -> tuple[Tensor, Tensor]:
        context.grad = None
        rows = []
        for first in range(0, args.classes, at_once):
            part = slice(first, first + at_once)
            if layout:
                features = layout.encode(context)
            else:
                with backbone.autocast():
                    features = plain_features(backbone, names[part], context)
            (features * weight[:, part]).sum().backward()
            rows.append(features.detach())
        if args.device == "cuda":
            torch.cuda.synchronize()
        assert context.grad is not None
        return torch.cat(rows, 1), context.grad

    if args.device == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    seconds = []
    for _ in range(args.repeat):
        started = clock()
        features, gradient = run()
        seconds.append(clock() - started)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM")
    torch.save({"features": features.cpu(), "gradient": gradient.cpu()}, args.save)
    print(json.dumps({"seconds": min(seconds), "first": seconds[0], "memory": peak - before}))


def run_apart(args: argparse.Namespace, way: str, classes: int, images: int, repeat: int, save: Path) -> dict:
    words = [sys.executable, __file__, "--way", way, "--classes", str(classes), "--images", str(images)]
    words += ["--repeat", str(repeat), "--save", str(save)]
    words += ["--device", args.device, "--precision", args.precision]
    shown = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(shown.splitlines()[-1])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def compare_kinds(args: argparse.Namespace) -> None:
    """The fast way in float32, under autocast to bfloat16, and compiled."""
    table = []
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder) / "fp32.pt", Path(folder) / "other.pt"
        plain = run_apart(args, "fast", args.classes, args.images, 3, one)
        a = torch.load(one)
        for what, way in (("float32", "fast"), ("bfloat16", "bf16"), ("torch.compile", "compiled")):
            found = plain if way == "fast" else run_apart(args, way, args.classes, args.images, 3, other)
            b = a if way == "fast" else torch.load(other)
            apart = (difference(b["features"], a["features"]), difference(b["gradient"], a["gradient"]))
            seconds = found["seconds"]
            table.append([what, found["first"], seconds, seconds / plain["seconds"], *apart])
    heads = ["kind", "first step s", "a step s", "of float32", "features", "gradient"]
    print(tabulate(table, heads, floatfmt=".3g", tablefmt="github"))


def compare(args: argparse.Namespace) -> None:
    table, flat = [], []
    fast_repeat, plain_repeat = (10, 5) if args.device == "cuda" else (3, 1)
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder) / "plain.pt", Path(folder) / "fast.pt"
        steps = [("CoOp", 20, 1)] if args.small else [("CoOp", 100, 1), ("CoOp", 1000, 1), ("CoCoOp", 50, 8)]
        for what, classes, images in steps:
            plain = run_apart(args, "plain", classes, images, plain_repeat, one)
            fast = run_apart(args, "fast", classes, images, fast_repeat, other)
            a, b = torch.load(other), torch.load(one)
            pieces = -(-classes // PLAIN_AT_ONCE)
            table.append(
                [
                    f"{what}, {classes} classes" + (f" x {images} images" if images > 1 else ""),
                    plain["seconds"],
                    fast["seconds"],
                    plain["seconds"] / fast["seconds"],
                    f"{plain['memory'] / 2**30:.2f}" + (f" (in {pieces} pieces)" if pieces > 1 else ""),
                    f"{fast['memory'] / 2**30:.2f}",
                    plain["memory"] * (pieces if pieces > 1 else 1) / fast["memory"],
                    difference(a["features"], b["features"]),
                    difference(a["gradient"], b["gradient"]),
                ]
            )
        for classes in () if args.small else (2000, 7000, 21000):
            fast = run_apart(args, "fast", classes, 1, 1, other)
            flat.append([classes, fast["seconds"], fast["memory"] / 2**30])
    heads = [
        "step",
        "plain s",
        "here s",
        "times faster",
        "plain GB",
        "here GB",
        "times less",
        "features",
        "gradient",
    ]
    print(tabulate(table, heads, floatfmt=".3g", tablefmt="github"))
    if args.small:
        return
    print(f"\nCut into chunks of {MAX_CHUNK_TOKENS} rows, recomputed in the backward pass:\n")
    print(tabulate(flat, ["classes", "seconds", "GB"], floatfmt=".3g", tablefmt="github"))


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    flags.add_argument("--precision", default="fp32")
    flags.add_argument("--small", action="store_true", help="20 classes alone")
    flags.add_argument("--kinds", action="store_true", help="float32 beside bfloat16 and torch.compile")
    flags.add_argument("--way", choices=("plain", "fast", "bf16", "compiled"), help="measure one way alone")
    flags.add_argument("--classes", type=int, default=100)
    flags.add_argument("--images", type=int, default=1)
    flags.add_argument("--repeat", type=int, default=1)
    flags.add_argument("--save", default="/dev/null")
    arguments = flags.parse_args()
    if arguments.way:
        measure(arguments)
    elif arguments.kinds:
        compare_kinds(arguments)
    else:
        compare(arguments)
