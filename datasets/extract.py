"""Turn a data set into a feature file, which then stands for it: `features:FILE`.

    python -m dfzsl.datasets.extract dtd --root DATA --backbone ViT-B-16 --output dtd.safetensors
    python -m dfzsl.datasets.extract folder:my/pictures --output mine.safetensors
    torchrun --nproc-per-node 4 -m dfzsl.datasets.extract imagenet --root DATA --output imagenet.safetensors

Pictures are decoded by `--workers` processes a rank while the encoder runs, and the ranks of torchrun share
them out. What is done stays in the feature cache ($DFZSL_CACHE, or ~/.cache/dfzsl): an interrupted command,
given again, goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY

from dfzsl.configs import dataset_config
from dfzsl.io.tensors import save_tensors
from dfzsl.utils.dassl_plugin import add_keys
from dfzsl.utils.errors import UserError

from .base import ClassDataset
from .encoding import default_cache_dir, encode_datums
from .features import FeatureDatum


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description="Turn a data set into a feature file.")
    flags.add_argument("data", help="a data set's config (dtd, awa2, ...), folder:PATH or csv:PATH")
    flags.add_argument("--root", default="", help="data folder, for a data set named by its config")
    flags.add_argument("--output", required=True, help="the .safetensors file to write")
    flags.add_argument("--backbone", default="ViT-B-16", help="open_clip model name")
    flags.add_argument("--weights", default="openai", help="pretrained tag, or a file")
    flags.add_argument(
        "--precision", default="fp32", help="fp32; on a GPU fp16, amp or bf16; bf16 on CPUs that have it"
    )
    flags.add_argument("--batch-size", type=int, default=256)
    flags.add_argument("--workers", type=int, default=os.cpu_count(), help="decoding processes a rank")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--cache", default=None, help=f"folder of the feature cache ({default_cache_dir()})")
    return flags


def open_dataset(data: str, root: str) -> ClassDataset:
    """The whole data set (all classes, every image) that `data` names: a config's stem, or KIND:PATH."""
    kind, _, path = data.partition(":")
    cfg = get_cfg_default()
    cfg.merge_from_file(str(dataset_config(kind)))
    cfg.merge_from_list(["DATASET.ROOT", path or root])
    return DATASET_REGISTRY.get(cfg.DATASET.NAME)(cfg)


def extract(
    dataset: ClassDataset,
    backbone: Any,
    output: str | os.PathLike[str],
    batch_size: int = 256,
    num_workers: int = 4,
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Encode a data set's pictures and class names into the feature file `output` (see `Features`).

    Within torch.distributed every rank calls this and rank 0 writes. Raises UserError for a picture that
    cannot be read, and for a data set that consists of features already.
    """
    if isinstance(dataset.test[0], FeatureDatum):
        raise UserError(f"{dataset.dataset_dir} holds features already")
    tensors: dict[str, torch.Tensor] = {}
    parts = {"train": [] if dataset.test_only else dataset.train_x, "val": dataset.val, "test": dataset.test}
    for part, datums in parts.items():
        if datums:
            tensors[f"x_{part}"] = encode_datums(
                backbone, datums, backbone.transform, cache_dir, batch_size, num_workers, device
            )
            tensors[f"y_{part}"] = torch.tensor([datum.label for datum in datums])
    tensors["text"] = backbone.class_features(dataset.all_classnames, [dataset.template])
    new = set(dataset.new_classnames)
    tensors["new"] = torch.tensor([c for c, name in enumerate(dataset.all_classnames) if name in new])
    about = {
        "kind": "features",
        "classnames": dataset.all_classnames,
        "backbone": backbone.name,
        "weights": backbone.weights_id,
        "template": dataset.template,
    }
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        save_tensors(output, tensors, about)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises UserError for a user's mistake."""
    args = parser().parse_args(argv)
    if not args.output.endswith(".safetensors"):
        raise UserError(f"--output {args.output}: a feature file ends in .safetensors")
    from dfzsl.trainers.clip.loading import load_backbone

    add_keys("MODEL.BACKBONE", WEIGHTS="openai")
    dataset = open_dataset(args.data, args.root)
    device = args.device
    if "WORLD_SIZE" in os.environ:
        # Gloo: ranks only wait for each other, and the slowest may need hours.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        backbone = load_backbone(args.backbone, args.weights, device, args.precision)
        extract(dataset, backbone, args.output, args.batch_size, args.workers, device, args.cache)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    print(f"{args.output}: {len(dataset.test)} test images, {len(dataset.all_classnames)} classes")


if __name__ == "__main__":
    from dfzsl.train import cli

    cli(main)
