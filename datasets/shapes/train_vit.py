"""Distil the image tower of the built-in CLIP into a vision transformer: image prompts need one.

    python scripts/shapes/train_vit.py

writes datasets/shapes/vit.safetensors and vit_training.csv, at every 100 steps. The text tower stays as it is
and is stored again beside the new image tower, which learns to give each picture the feature that the first
one gives it (feature mimicry: Yang et al., CLIP-KD, CVPR 2024), on pictures that one was trained on. A
quarter of an hour on one idle core. The same seed, number of threads and machine give the same weights.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from dfzsl.datasets.shapes.train_clip import FOLDER, MEAN, STD, CaptionedPictures, options, write_log
from dfzsl.io.files import read_json
from dfzsl.io.tensors import save_tensors
from dfzsl.trainers.clip.backbone import import_open_clip
from dfzsl.trainers.clip.loading import BUILT_IN, load_backbone

LOGGED = ["step", "squared_distance", "held_out_squared_distance"]


def student(seed: int) -> nn.Module:
    """The image tower of vit.json with random weights."""
    config: Any = read_json(FOLDER / "vit.json")
    torch.manual_seed(seed)
    return import_open_clip().CLIP(**config).visual


def distance(visual: nn.Module, pictures: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of unit features of pictures (n, 3, 64, 64) from unit targets (n, d)."""
    return (F.normalize(visual(pictures).float(), dim=1) - target).square().sum(1).mean()


def save(visual: nn.Module, path: Path, about: dict) -> None:
    """Write the tower beside the built-in CLIP's text tower, as `train_clip.save` writes that."""
    tensors = {k: v for k, v in load_file(FOLDER / "clip.safetensors").items() if not k.startswith("visual.")}
    tensors |= {f"visual.{name}": value.half().contiguous() for name, value in visual.state_dict().items()}
    save_tensors(path, tensors, {"kind": "clip", **about})


def main() -> None:
    args = options(__doc__, steps=500, batch=64, lr=1e-3)

    teacher, visual = load_backbone(BUILT_IN), student(args.seed)
    held_out = CaptionedPictures(args.seed + 1, 0, 500)
    check = (torch.stack([held_out[i][0] for i in range(len(held_out))]) / 255 - MEAN) / STD
    target = teacher.encode_image(check)
    examples = CaptionedPictures(args.seed, 0, args.steps * args.batch)
    optimizer = torch.optim.AdamW(
        visual.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    log, losses, began = [], [], time.time()
    bar = tqdm(DataLoader(examples, args.batch), desc="training the ViT of shapes", unit="step")
    for step, (raw, _) in enumerate(bar, 1):
        pictures = (raw / 255 - MEAN) / STD
        loss = distance(visual, pictures, teacher.encode_image(pictures))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == args.steps:
            with torch.no_grad():
                log.append([step, np.mean(losses), distance(visual, check, target).item()])
            bar.set_postfix(loss=f"{log[-1][1]:.3f}", held_out=f"{log[-1][2]:.3f}")
            losses = []
            save(
                visual,
                args.output / "vit.safetensors",
                {"step": step, "batch": args.batch, "seed": args.seed},
            )
            write_log(args.output / "vit_training.csv", LOGGED, log)
    print(f"{args.steps} steps of {args.batch} in {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
