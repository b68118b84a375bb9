"""Train the CLIP of Shapes on captioned images drawn as needed (scripts/shapes/train_clip.py).

Training truncates the text at the longest caption, which is exact since the text transformer is causal, and
uses only the token embeddings that captions need; see `save` for their format.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dfzsl.io.files import atomic, read_json
from dfzsl.io.tensors import save_tensors
from dfzsl.utils.torchvision_import import import_torchvision

import_torchvision()
import open_clip  # noqa: E402

from dfzsl.datasets.shapes.captions import captioned_image, vocabulary  # noqa: E402

FOLDER = Path(__file__).parent
MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
LOG_COLUMNS = ["step", "loss", "held_out_loss", "held_out_recall_at_1_of_500", "logit_scale"]


class CaptionedImages(Dataset):
    """Training examples from `start` to `start + count`: image (3, 64, 64), uint8, and tokens (77,)."""

    def __init__(self, seed: int, start: int, count: int) -> None:
        self.seed, self.start, self.count = seed, start, count
        self.tokenizer = open_clip.SimpleTokenizer()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, caption = captioned_image(self.seed, self.start + index)
        return torch.from_numpy(image).permute(2, 0, 1), self.tokenizer(caption)[0]


class TrainableCLIP(nn.Module):
    """open_clip's CLIP with a token table that contains only the rows `ids`."""

    def __init__(self, config: dict, ids: Tensor) -> None:
        super().__init__()
        self.clip = open_clip.CLIP(**config)
        self.clip.visual.to(memory_format=torch.channels_last)
        self.ids = ids
        self.rows = nn.Parameter(self.clip.token_embedding.weight[ids].clone())
        del self.clip.token_embedding

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images (n, 3, 64, 64), uint8, to L2-normalized features (n, d)."""
        images = ((images / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)
        return F.normalize(self.clip.visual(images).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode tokens (n, 77) to L2-normalized features (n, d), in groups of similar length."""
        order = tokens.argmax(dim=-1).argsort(stable=True)
        rows = torch.cat([self._encode_text(tokens[part]) for part in order.chunk(4)])
        return F.normalize(rows.float(), dim=-1)[order.argsort()]

    def _encode_text(self, tokens: Tensor) -> Tensor:
        clip, end = self.clip, tokens.argmax(dim=-1)
        length = int(end.max()) + 1
        indices = torch.searchsorted(self.ids, tokens[:, :length].contiguous())
        x = self.rows[indices] + clip.positional_embedding[:length]
        x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
        x = clip.ln_final(x[torch.arange(len(x)), end])
        return x @ clip.text_projection

    def loss(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Compute the symmetric contrastive loss of Radford et al. (2021)."""
        logits = self.clip.logit_scale.exp() * self.encode_image(images) @ self.encode_text(tokens).t()
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def caption_token_ids() -> Tensor:
    """Return the sorted ids (k,), int64, of all tokens of captions, including the padding token 0."""
    return torch.cat([open_clip.tokenize(text)[0] for text in vocabulary()]).unique()


def save(model: TrainableCLIP, path: Path, about: dict) -> None:
    """Write the weights as float16 safetensors under open_clip's names, except the token table.

    `token_embedding.weight` (49408, w) is stored as `token_embedding.ids` (k,), int32, and
    `token_embedding.rows` (k, w), the rows of the tokens that captions use. All other rows are zero.
    """
    tensors = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.clip.state_dict().items()
        if name != "attn_mask"
    }
    tensors["token_embedding.ids"] = model.ids.int()
    tensors["token_embedding.rows"] = model.rows.half()
    save_tensors(
        path, {name: value.contiguous() for name, value in tensors.items()}, {"kind": "clip", **about}
    )


@torch.no_grad()
def evaluate_retrieval(model: TrainableCLIP, images: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Compute the loss and the recall at 1 of captions on held-out examples."""
    model.eval()
    image, text = model.encode_image(images), model.encode_text(tokens)
    logits = model.clip.logit_scale.exp() * image @ text.t()
    target = torch.arange(len(logits))
    model.train()
    return F.cross_entropy(logits, target).item(), (logits.argmax(1) == target).float().mean().item()


def write_log(path: Path, columns: list[str], log: list[list[float]]) -> None:
    """Write the training log as CSV. The first column is the step."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([step, *(f"{value:.4f}" for value in values)] for step, *values in log)


def train(
    steps: int = 1000,
    batch_size: int = 256,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    seed: int = 1,
    output: Path = FOLDER,
) -> None:
    """Train, and write clip.safetensors and clip_training.csv into `output` every 100 steps.

    The same seed, number of threads and machine give the same weights.

    Args:
        steps: number of batches.
        batch_size: images per batch.
        lr: peak learning rate of AdamW, one cycle.
        weight_decay: of the matrices.
        seed: of the weights and of the images.
        output: folder to write into.
    """
    torch.manual_seed(seed)
    config: Any = read_json(FOLDER / "clip.json")
    model = TrainableCLIP(config, caption_token_ids())
    held_out = CaptionedImages(seed + 1, 0, 500)
    check = [torch.stack(part) for part in zip(*(held_out[i] for i in range(len(held_out))), strict=True)]
    examples = CaptionedImages(seed, 0, steps * batch_size)
    batches = DataLoader(examples, batch_size, num_workers=1, prefetch_factor=8)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)

    log: list[list[float]] = []
    losses: list[float] = []
    model.train()
    bar = tqdm(batches, desc="training the CLIP of shapes", unit="step")
    for step, (images, tokens) in enumerate(bar, 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(images, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.clip.logit_scale.clamp_(max=np.log(100))
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            mean_loss = float(np.mean(losses))
            held_out_loss, recall = evaluate_retrieval(model, *check)
            log.append([step, mean_loss, held_out_loss, recall, model.clip.logit_scale.exp().item()])
            bar.set_postfix(loss=f"{mean_loss:.3f}", recall=f"{recall:.3f}")
            losses = []
            save(model, output / "clip.safetensors", {"step": step, "batch": batch_size, "seed": seed})
            write_log(output / "clip_training.csv", LOG_COLUMNS, log)
