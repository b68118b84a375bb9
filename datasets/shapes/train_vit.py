"""Distill the image tower of the built-in CLIP into a vision transformer (scripts/shapes/train_vit.py).

Image prompts need a transformer. The student learns the features of the first tower on its training images
(feature mimicry: Yang et al., CLIP-KD, CVPR 2024). The text tower is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from dfzsl.io.files import read_json
from dfzsl.io.tensors import save_tensors

from .train_clip import FOLDER, MEAN, STD, CaptionedImages, open_clip, write_log

LOG_COLUMNS = ["step", "squared_distance", "held_out_squared_distance"]


def student(seed: int) -> nn.Module:
    """Build the image tower of vit.json with random weights."""
    config: Any = read_json(FOLDER / "vit.json")
    torch.manual_seed(seed)
    return open_clip.CLIP(**config).visual


def distance(visual: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared distance of normalized features of images (n, 3, 64, 64) to (n, d)."""
    return (F.normalize(visual(images).float(), dim=1) - target).square().sum(1).mean()


def save(visual: nn.Module, path: Path, about: dict) -> None:
    """Write the image tower and the text tower of the built-in CLIP, in the format of `train_clip.save`."""
    tensors = {k: v for k, v in load_file(FOLDER / "clip.safetensors").items() if not k.startswith("visual.")}
    tensors |= {f"visual.{name}": value.half().contiguous() for name, value in visual.state_dict().items()}
    save_tensors(path, tensors, {"kind": "clip", **about})


def train(
    encode_image: Callable[[Tensor], Tensor],
    steps: int = 500,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    seed: int = 1,
    output: Path = FOLDER,
) -> None:
    """Train, and write vit.safetensors and vit_training.csv into `output` every 100 steps.

    The same seed, number of threads and machine give the same weights.

    Args:
        encode_image: the first image tower, from preprocessed images (n, 3, 64, 64) to unit features (n, d).
        steps: number of batches.
        batch_size: images per batch.
        lr: peak learning rate of AdamW, one cycle.
        weight_decay: of all weights.
        seed: of the weights and of the images.
        output: folder to write into.
    """
    visual = student(seed)
    held_out = CaptionedImages(seed + 1, 0, 500)
    check = (torch.stack([held_out[i][0] for i in range(len(held_out))]) / 255 - MEAN) / STD
    target = encode_image(check)
    examples = CaptionedImages(seed, 0, steps * batch_size)
    optimizer = torch.optim.AdamW(visual.parameters(), lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    log: list[list[float]] = []
    losses: list[float] = []
    bar = tqdm(DataLoader(examples, batch_size), desc="training the ViT of shapes", unit="step")
    for step, (raw, _) in enumerate(bar, 1):
        images = (raw / 255 - MEAN) / STD
        loss = distance(visual, images, encode_image(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                log.append([step, float(np.mean(losses)), distance(visual, check, target).item()])
            bar.set_postfix(loss=f"{log[-1][1]:.3f}", held_out=f"{log[-1][2]:.3f}")
            losses = []
            save(visual, output / "vit.safetensors", {"step": step, "batch": batch_size, "seed": seed})
            write_log(output / "vit_training.csv", LOG_COLUMNS, log)
